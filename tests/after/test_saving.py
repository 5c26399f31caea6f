"""An adapter saved outside its run is complete without the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_exp import load_adapter
from lora_exp.after.saved import find
from lora_exp.after.saving import save
from lora_exp.errors import AdapterError, SavedError
from tests.after.copies import copy_run
from tests.after.test_loading import IDS

Trained = Callable[..., Path]


def test_a_saved_adapter_has_tokenizer_card_and_record(trained: Trained, tmp_path: Path) -> None:
    run = trained("peft=lora", "quant=nf4")
    out = save(run, tmp_path / "taken")
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
        "run.json",
        "config.yaml",
    }
    assert "training_args.bin" not in names
    saved = find(out)
    assert saved.record == find(run).record
    assert saved.settings["quant"]["quant_type"] == "nf4"
    with pytest.raises(SavedError, match="exists; --force"):
        save(run, out)


def test_a_checkpoint_becomes_an_adapter_that_names_its_base(
    trained: Trained, tmp_path: Path
) -> None:
    run = trained("peft=lora", "train.save_strategy=steps", "train.save_steps=6")
    out = save(run / "checkpoints" / "checkpoint-12", tmp_path / "taken")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "pkg://lora_exp/assets/tiny"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert "optimizer.pt" not in {path.name for path in out.iterdir()}
    card = (out / "README.md").read_text()
    assert "taken from `checkpoint-12`" in card
    parts = ("pkg://lora_exp/assets/demo_train.jsonl", "PeftModel.from_pretrained", "save_steps: 6")
    assert all(word in card for word in parts)
    models = [load_adapter(folder)[0] for folder in (out, run)]
    with torch.no_grad():
        assert torch.equal(models[0](IDS).logits, models[1](IDS).logits)


def test_weights_of_the_old_format_are_saved_as_safetensors(
    trained: Trained, tmp_path: Path
) -> None:
    run = copy_run(trained("peft=lora"), tmp_path / "run")
    model, _ = load_adapter(run)
    from safetensors.torch import load_file

    file = run / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    out = save(run, tmp_path / "taken")
    assert not (out / "adapter_model.bin").exists()
    with torch.no_grad():
        assert torch.equal(load_adapter(out)[0](IDS).logits, model(IDS).logits)


def test_loha_becomes_lora(trained: Trained, tmp_path: Path) -> None:
    import peft

    base, _ = load_adapter("lora_exp/assets/tiny")
    torch.manual_seed(0)
    config = peft.LoHaConfig(r=2, alpha=4, target_modules=["q_proj"], init_weights=False)
    model = peft.get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = "pkg://lora_exp/assets/tiny"
    model.save_pretrained(tmp_path / "loha")
    with torch.no_grad():
        expected = model.eval()(IDS).logits
    out = save(
        tmp_path / "loha", tmp_path / "lora", as_lora=True, rank=4
    )  # LoHa's rank is r squared
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with torch.no_grad():
        assert torch.allclose(load_adapter(out)[0](IDS).logits, expected, atol=1e-4)
    with pytest.raises(AdapterError, match="is LoRA already"):
        save(out, tmp_path / "again", as_lora=True)
    with pytest.raises(AdapterError, match="PROMPT_TUNING cannot be written as LoRA"):
        save(trained("peft=prompt_tuning"), tmp_path / "again", as_lora=True)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("rank", [0, -2, 1.5])
def test_an_invalid_rank_is_refused(trained: Trained, tmp_path: Path, rank: float) -> None:
    with pytest.raises(AdapterError, match="give a whole number, or a share below 1"):
        save(trained("peft=lora"), tmp_path / "taken", as_lora=True, rank=rank)


def test_a_pissa_checkpoint_is_not_saved_as_lora(trained: Trained, tmp_path: Path) -> None:
    run = copy_run(
        trained("peft=pissa", "train.save_strategy=steps", "train.save_steps=6"), tmp_path / "run"
    )
    save(run, tmp_path / "taken")
    shutil.rmtree(run / "adapter")
    with pytest.raises(AdapterError, match=r"is pissa.* before its end.*resume="):
        save(run, tmp_path / "early")
    assert not (tmp_path / "early").exists()
