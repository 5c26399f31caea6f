"""A saved adapter on its base answers as the run did when it saved it."""

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
from tests.after.test_saved import copied

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
    trains, _ = load_adapter(run, merge=True, trainable=True)
    assert trains.training
    assert all(p.requires_grad for p in trains.parameters())
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, merged(IDS).logits, atol=1e-4)


def test_an_adapter_to_train_on_takes_gradients_and_no_others_do(trained: Trained) -> None:
    model, _ = load_adapter(trained("peft=lora"), trainable=True)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains
    assert all("lora_" in name for name in trains)


def test_the_base_is_quantised_as_in_the_run_or_as_asked(trained: Trained) -> None:
    run = trained("peft=lora", "quant=nf4")
    held = load_adapter(run)[0].get_base_model()
    assert held.config.quantization_config.bnb_4bit_quant_type == "nf4"
    plain = load_adapter(run, quant="none")[0].get_base_model()
    assert getattr(plain, "quantization_method", None) is None
    merged = load_adapter(run, merge=True)[0]
    assert merged.dtype == torch.float32
    assert not hasattr(merged.config, "quantization_config")


def test_adapters_side_by_side_share_the_weights_and_answer_as_alone(trained: Trained) -> None:
    runs = [trained("peft=lora"), trained("peft=lora", "seed=7", "peft.r=4"), trained("peft=ia3")]
    several = [find(run) for run in runs]
    base = load_base(several[0])
    loaded = side_by_side(several, base)
    places = {p.data_ptr() for p in base.model.parameters()}
    for run, each in zip(runs, loaded, strict=True):
        own = {p.data_ptr() for p in each.model.get_base_model().parameters()}
        assert places <= own
        alone, _ = load_adapter(run)
        with torch.no_grad():
            assert torch.equal(each.model(IDS).logits, alone(IDS).logits)
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
    run = copied(trained("peft=lora"), tmp_path / "run")
    file = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
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
    run = copied(trained("peft=lora"), tmp_path / "run")
    (run / "adapter" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = run / "adapter" / "tokenizer_config.json"
    told = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    config.write_text(json.dumps(json.loads(config.read_text()) | told))
    with contextlib.suppress(SavedError):
        load_adapter(run)
    assert not (tmp_path / "ran").exists()


def test_what_does_not_fit_is_refused(trained: Trained, tmp_path: Path) -> None:
    run = copied(trained("peft=lora"), tmp_path / "run")
    file = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
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
    run = copied(trained("peft=lora"), tmp_path / "run")
    moved = tmp_path / "moved"
    shutil.copytree("lora_exp/assets/tiny", moved)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SavedError, match="empty is a folder without a model"):
        load_adapter(run, base=str(tmp_path / "empty"))
    with pytest.raises(SavedError, match="is an adapter, not a base"):
        load_adapter(run, base=str(run / "adapter"))
    load_adapter(run, base=str(moved))  # elsewhere, by another name, with the same hash
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="trained on a base of other weights"):
        load_adapter(run, base=str(moved))
    record = json.loads((run / "run.json").read_text())
    of_the_hub = shutil.copytree(run, tmp_path / "of the hub")
    (of_the_hub / "run.json").write_text(json.dumps(record | {"base": "a" * 40}))
    with pytest.raises(AdapterError, match=rf"tiny, not on .*: --base tiny={moved}"):
        load_adapter(of_the_hub, base=str(moved))  # a commit and a hash tell nothing
    load_adapter(of_the_hub, base=f"tiny={moved}")
    alone = tmp_path / "alone"
    shutil.copytree(run / "adapter", alone)
    shutil.copytree("lora_exp/assets/tiny", tmp_path / "x" / "tiny")
    load_adapter(alone, base=str(tmp_path / "x" / "tiny"))  # its name is the known one
    with pytest.raises(AdapterError, match=rf"tiny, not on .*: --base tiny={moved}"):
        load_adapter(alone, base=str(moved))
    with pytest.raises(AdapterError, match="tiny, not on llama"):
        load_adapter(alone, base=f"llama={moved}")
    model, _ = load_adapter(alone, base=f"tiny={moved}")  # who says so is believed
    assert torch.equal(model.base_model.model.model.norm.weight, weights["model.norm.weight"])
    config = json.loads((alone / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "nowhere")
    (alone / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="nowhere cannot be loaded"):
        load_adapter(alone)


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_an_adapter_whose_start_rewrote_its_base_stands_alone(
    trained: Trained, tmp_path: Path, start: str
) -> None:
    plain, folder = trained("peft=lora"), copied(trained("peft=lora"), tmp_path / "run") / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": start}))
    name = start.partition("_niter")[0]
    with pytest.raises(AdapterError, match=rf"changes the base itself \({name}\)"):
        check_apart(find(folder))
    with pytest.raises(AdapterError, match=f"only plain LoRAs are combined, this has {name}"):
        merge([plain, folder], tmp_path / "merged")
