"""A saved adapter on its base gives the answers of its run."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_exp import load_adapter
from lora_exp.after.loading import check_apart, load_base, side_by_side
from lora_exp.after.merging import merge
from lora_exp.after.saved import find
from lora_exp.errors import AdapterError, ConfigError, SavedError
from tests.after.copies import copy_run, copy_with_weights

Trained = Callable[..., Path]
IDS = torch.tensor([[5, 9, 101, 7, 300, 12]])


def test_load_adapter_gives_a_model_and_a_tokenizer(trained: Trained) -> None:
    run = trained("peft=lora")
    model, tokenizer = load_adapter(run)
    assert isinstance(model, peft.PeftModel)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer.chat_template
    merged, _ = load_adapter(run / "adapter", merge=True)
    assert not isinstance(merged, peft.PeftModel)
    trainable, _ = load_adapter(run, merge=True, trainable=True)
    assert trainable.training
    assert all(p.requires_grad for p in trainable.parameters())
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, merged(IDS).logits, atol=1e-4)


def test_only_the_weights_of_a_trainable_adapter_take_gradients(trained: Trained) -> None:
    model, _ = load_adapter(trained("peft=lora"), trainable=True)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_the_base_is_quantised_as_in_the_run_unless_an_argument_sets_it(trained: Trained) -> None:
    run = trained("peft=lora", "quant=nf4")
    quantized = load_adapter(run)[0].get_base_model()
    assert quantized.config.quantization_config.bnb_4bit_quant_type == "nf4"
    plain = load_adapter(run, quant="none")[0].get_base_model()
    assert getattr(plain, "quantization_method", None) is None
    merged = load_adapter(run, merge=True)[0]
    assert merged.dtype == torch.float32
    assert not hasattr(merged.config, "quantization_config")


def test_adapters_side_by_side_share_the_weights_and_answer_as_alone(trained: Trained) -> None:
    runs = [trained("peft=lora"), trained("peft=lora", "seed=7", "peft.r=4"), trained("peft=ia3")]
    saved = [find(run) for run in runs]
    base = load_base(saved[0])
    loaded = side_by_side(saved, base)
    addresses = {p.data_ptr() for p in base.model.parameters()}
    for run, adapted in zip(runs, loaded, strict=True):
        adapted_addresses = {p.data_ptr() for p in adapted.model.get_base_model().parameters()}
        assert addresses <= adapted_addresses
        alone, _ = load_adapter(run)
        with torch.no_grad():
            assert torch.equal(adapted.model(IDS).logits, alone(IDS).logits)
    plain, _ = load_adapter("lora_exp/assets/tiny")
    with torch.no_grad():
        assert torch.equal(base.model(IDS).logits, plain(IDS).logits)


def test_a_reward_adapter_loads_with_its_head(trained: Trained) -> None:
    run = trained("algorithm=reward", "data=demo_pairs", "samples.rows=0")
    model, _ = load_adapter(run)
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    head = next(value for name, value in saved.items() if name.endswith("score.weight"))
    assert torch.equal(model.get_base_model().score.weight, head)


def test_a_fully_trained_model_loads(trained: Trained) -> None:
    model, tokenizer = load_adapter(trained("peft=none", "train.max_steps=2"))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokenizer.chat_template


def test_old_weights_are_read_but_pickles_are_not(trained: Trained, tmp_path: Path) -> None:
    run, file, weights = copy_with_weights(trained("peft=lora"), tmp_path / "run")
    file.unlink()
    torch.save(weights, run / "adapter" / "adapter_model.bin")
    model, _ = load_adapter(run)
    alone, _ = load_adapter(trained("peft=lora"))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, alone(IDS).logits)
    torch.save({"weights": weights, "code": print}, run / "adapter" / "adapter_model.bin")
    with pytest.raises(AdapterError, match="holds code where numbers belong"):
        load_adapter(run)


def test_a_tokenizer_that_came_with_an_adapter_runs_no_code(
    trained: Trained, tmp_path: Path
) -> None:
    run = copy_run(trained("peft=lora"), tmp_path / "run")
    (run / "adapter" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = run / "adapter" / "tokenizer_config.json"
    custom = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    config.write_text(json.dumps(json.loads(config.read_text()) | custom))
    with contextlib.suppress(SavedError):
        load_adapter(run)
    assert not (tmp_path / "ran").exists()


def test_weights_that_do_not_fit_are_refused(trained: Trained, tmp_path: Path) -> None:
    run, file, weights = copy_with_weights(trained("peft=lora"), tmp_path / "run")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="its weights are damaged"):
        load_adapter(run)
    save_file({}, file)
    with pytest.raises(AdapterError, match="holds no weights"):
        load_adapter(run)
    save_file(dict(list(weights.items())[2:]), file)
    with pytest.raises(AdapterError, match="2 of its weights have no match"):
        load_adapter(run)
    save_file({key: value[:, :-1].contiguous() for key, value in weights.items()}, file)
    with pytest.raises(AdapterError, match=r"does not fit this base: size mismatch"):
        load_adapter(run)


def test_another_base_needs_the_same_weights(trained: Trained, tmp_path: Path) -> None:
    run = copy_run(trained("peft=lora"), tmp_path / "run")
    moved = tmp_path / "moved"
    shutil.copytree("lora_exp/assets/tiny", moved)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SavedError, match="empty is a folder without a model"):
        load_adapter(run, base=str(tmp_path / "empty"))
    with pytest.raises(SavedError, match="is an adapter, not a base"):
        load_adapter(run, base=str(run / "adapter"))
    load_adapter(run, base=str(moved))  # another path and name, but the same hash
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="trained on a base of other weights"):
        load_adapter(run, base=str(moved))
    record = json.loads((run / "run.json").read_text())
    hub_run = shutil.copytree(run, tmp_path / "of the hub")
    (hub_run / "run.json").write_text(json.dumps(record | {"base": "a" * 40}))
    with pytest.raises(AdapterError, match=rf"tiny, not on .* give --base tiny={moved}"):
        load_adapter(hub_run, base=str(moved))  # a commit and a hash cannot be compared
    load_adapter(hub_run, base=f"tiny={moved}")
    alone = tmp_path / "alone"
    shutil.copytree(run / "adapter", alone)
    shutil.copytree("lora_exp/assets/tiny", tmp_path / "x" / "tiny")
    load_adapter(alone, base=str(tmp_path / "x" / "tiny"))  # the folder's name equals the base's
    with pytest.raises(AdapterError, match=rf"tiny, not on .* give --base tiny={moved}"):
        load_adapter(alone, base=str(moved))
    with pytest.raises(AdapterError, match="tiny, not on llama"):
        load_adapter(alone, base=f"llama={moved}")
    model, _ = load_adapter(alone, base=f"tiny={moved}")  # the name that the user gives is trusted
    assert torch.equal(model.base_model.model.model.norm.weight, weights["model.norm.weight"])
    config = json.loads((alone / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "nowhere")
    (alone / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="nowhere cannot be loaded"):
        load_adapter(alone)


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_an_adapter_whose_initialization_changed_its_base_cannot_be_combined(
    trained: Trained, tmp_path: Path, start: str
) -> None:
    plain, folder = (
        trained("peft=lora"),
        copy_run(trained("peft=lora"), tmp_path / "run") / "adapter",
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": start}))
    name = start.partition("_niter")[0]
    with pytest.raises(AdapterError, match=rf"changes the base itself \({name}\)"):
        check_apart(find(folder))
    with pytest.raises(AdapterError, match=f"only plain LoRAs are combined, this has {name}"):
        merge([plain, folder], tmp_path / "merged")
