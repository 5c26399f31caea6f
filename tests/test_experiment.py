"""Whole runs of a few steps: every method, every quantisation, and the files they write."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_exp import compose, load_adapter, run
from lora_exp.after.likeness import likeness
from lora_exp.config.door import CONF
from lora_exp.config.pairs import REFUSED
from lora_exp.errors import AdapterError, ConfigError
from lora_exp.files.paths import asset

METHODS = sorted(path.stem for path in (CONF / "peft").glob("*.yaml"))
PAIRS = [
    (method, quant)
    for method in METHODS
    for quant in ("none", "nf4", "int8")
    if quant not in REFUSED.get(method, {}) and (method != "none" or quant == "none")
]  # fmt: skip


def digest(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder, by file name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def copied(result: Any, folder: Path) -> Any:
    """Copy a finished run, to be changed and resumed while the first one stays as it is."""
    shutil.copytree(result.directory, folder)
    return replace(result, directory=folder, saved=folder / result.saved.name)


def mark_killed(directory: Path) -> None:
    """Set a run's status to that of a killed process."""
    path = directory / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "running"}))


def rows_override(path: Path, *rows: Any) -> str:
    """Write rows as JSON Lines, and return the override that reads them."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.path={path}"


@pytest.mark.parametrize(("method", "quant"), PAIRS)
def test_every_method_trains_on_every_quantisation(
    quick_run: Callable[..., Any], method: str, quant: str, caplog: pytest.LogCaptureFixture
) -> None:
    result = quick_run(f"peft={method}", f"quant={quant}")
    assert "get no gradient" not in caplog.text
    weights = load_file(next(result.saved.glob("*.safetensors")))
    assert weights
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert result.metrics["eval/loss"] != result.metrics["before/loss"]
    assert result.objective == result.metrics["eval/loss"]


def test_a_run_writes_the_documented_files(quick_run: Callable[..., Any]) -> None:
    result = quick_run("train.logging_steps=1")
    record = json.loads((result.directory / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["counts"]["trainable_parameters"] == 233_472
    assert record["base"].startswith("sha256:")
    assert set(record["data"]) == {
        "pkg://lora_exp/assets/demo_train.jsonl",
        "pkg://lora_exp/assets/demo_eval.jsonl",
    }
    assert {"train/seconds", "train/tokens_per_s", "peak_bytes", "seconds"} <= set(
        record["metrics"]
    )
    lines = [
        json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in losses] == [1, 2, 3]
    assert all(line["train/tokens_per_s"] > 0 for line in losses)
    samples = [
        json.loads(line) for line in (result.directory / "samples.jsonl").read_text().splitlines()
    ]
    assert len(samples) == 4
    assert all(sample["after"] is not None for sample in samples)
    losses = json.loads((result.directory / "row_losses.json").read_text())
    mean_loss = sum(losses["losses"]) / sum(losses["tokens"])
    assert mean_loss == pytest.approx(record["metrics"]["eval/loss"], rel=1e-5)
    assert {path.name for path in result.saved.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    tokenizer = "tokenizer.json"
    shipped = json.loads((asset("pkg://lora_exp/assets/tiny") / tokenizer).read_text())
    assert json.loads((result.saved / tokenizer).read_text()) == shipped
    config = json.loads((result.saved / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == "pkg://lora_exp/assets/tiny"
    assert "r: 16" in (result.saved / "README.md").read_text()


def test_the_same_config_twice_gives_the_same_bytes(quick_run: Callable[..., Any]) -> None:
    overrides = ["peft.lora_dropout=0.1", "train.save_strategy=no"]
    first, second = (quick_run(*overrides, name=name) for name in ("one", "two"))
    assert digest(first.saved) == digest(second.saved)
    with_seed_1 = quick_run(*overrides, "seed=1", name="three")
    assert digest(with_seed_1.saved) != digest(first.saved)


def test_evaluation_and_samples_do_not_change_the_training(quick_run: Callable[..., Any]) -> None:
    settings = ["peft.lora_dropout=0.1", "train.max_steps=8"]  # past the end of an epoch
    measured = quick_run(*settings, name="one")
    unmeasured = quick_run(*settings, "samples.rows=0", "train.eval_strategy=no", name="two")
    weights = "adapter_model.safetensors"
    assert digest(measured.saved)[weights] == digest(unmeasured.saved)[weights]


@pytest.mark.parametrize("method", ["lora", "pissa", "olora"])
def test_the_saved_adapter_on_the_original_base_has_the_evaluated_loss(
    quick_run: Callable[..., Any], method: str
) -> None:
    result = quick_run(f"peft={method}", "train.max_steps=5")
    path = asset("pkg://lora_exp/assets/tiny")
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, result.saved).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.saved)
    from lora_exp.data import tasks
    from lora_exp.data.encoding import encode

    rows = tasks.take(tasks.DEMO, 0, 16, held_out=True)
    losses = tokens = 0.0
    for ids, labels in encode(rows, tokenizer, True):
        count = sum(label != -100 for label in labels)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        losses += loss.item() * count
        tokens += count
    assert losses / tokens == pytest.approx(result.metrics["eval/loss"], abs=2e-3)


def test_the_code_in_a_model_card_works(quick_run: Callable[..., Any]) -> None:
    result = quick_run("peft.r=2")
    card = (result.saved / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(result.saved)), names)
    assert isinstance(names["model"], PeftModel)
    assert "eval/loss" in card
    assert str(Path.home()) not in card


@pytest.mark.parametrize("algorithm", ["reward", "seq2seq"])
def test_a_card_loads_an_adapter_with_its_model_class(
    tmp_path: Path, t5: Path, algorithm: str
) -> None:
    seq2seq = ["model=local", f"model.path={t5}", "targets=attention", "data.max_rows=16"]
    data = {"reward": ["data=demo_pairs", "data.rows=16"], "seq2seq": seq2seq}[algorithm]
    cfg = compose("tracking=none", f"algorithm={algorithm}", *data, "train.max_steps=2")
    saved = run(cfg, tmp_path / "run").saved
    code = (saved / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(saved)), names)
    loaded, _ = load_adapter(saved)
    expected, from_card = (model.state_dict() for model in (loaded, names["model"]))
    assert expected.keys() == from_card.keys()
    keys = [key for key in expected if ".original_module." not in key]  # replaced
    assert all(torch.equal(expected[key].float(), from_card[key].float()) for key in keys)


@pytest.mark.parametrize("method", ["lora", "ln_tuning", "vera"])
def test_a_bfloat16_base_trains_and_answers(quick_run: Callable[..., Any], method: str) -> None:
    assert quick_run(f"peft={method}", "model.dtype=bfloat16").metrics["eval/exact_match"] >= 0


def test_an_unknown_objective_is_refused_before_training(quick_run: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"objective: 'eval/los' is none of .* mean eval/loss"):
        quick_run("objective=eval/los")
    assert quick_run("objective=eval/exact_match", name="b").objective >= 0


def test_full_fine_tuning_saves_a_model_that_loads_alone(quick_run: Callable[..., Any]) -> None:
    result = quick_run("peft=none")
    assert result.saved.name == "model"
    trained = AutoModelForCausalLM.from_pretrained(result.saved)
    base = AutoModelForCausalLM.from_pretrained(asset("pkg://lora_exp/assets/tiny"))
    assert not torch.equal(trained.model.norm.weight, base.model.norm.weight)


def test_pretraining_counts_every_token_and_needs_no_base(quick_run: Callable[..., Any]) -> None:
    result = quick_run(
        "algorithm=pretrain", "model.random_weights=true", "peft=none", "train.learning_rate=1e-3"
    )
    counts = json.loads((result.directory / "run.json").read_text())["counts"]
    assert counts["train_tokens"] == counts["train_trained_tokens"]
    assert result.metrics["before/loss"] == pytest.approx(6.24, abs=0.3)  # ln 512


def test_packing_trains_on_the_same_tokens_in_fewer_rows(quick_run: Callable[..., Any]) -> None:
    result = quick_run(
        "algorithm.args.packing=true", "algorithm.args.max_length=128", "train.max_steps=-1",
        "train.num_train_epochs=1", "train.per_device_train_batch_size=1",
    )  # fmt: skip
    record = json.loads((result.directory / "run.json").read_text())
    assert record["counts"]["train_rows"] == 64
    assert record["steps"] < 32


def test_a_local_model_trains_on_the_users_rows(
    quick_run: Callable[..., Any], tmp_path: Path
) -> None:
    rows = [{"instruction": f"say {i}", "output": f"{i}"} for i in range(20)]
    result = quick_run(
        "data=jsonl", rows_override(tmp_path / "rows.jsonl", *rows), "model=local",
        f"model.path={asset('pkg://lora_exp/assets/tiny')}",
    )  # fmt: skip
    assert json.loads((result.directory / "run.json").read_text())["counts"]["train_rows"] == 18


def test_without_held_out_rows_the_training_loss_is_the_objective(
    quick_run: Callable[..., Any], tmp_path: Path
) -> None:
    path = rows_override(tmp_path / "rows.jsonl", *({"text": f"row {i}"} for i in range(8)))
    result = quick_run("data=jsonl", path, "data.eval_share=0", "algorithm=pretrain")
    assert result.objective == result.metrics["train/loss"]


def test_the_first_rows_mask_is_printed_before_training(
    quick_run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    quick_run("peft.r=4", "targets=qv")
    output = " ".join(capsys.readouterr().out.split())
    assert output.startswith("loading pkg://lora_exp/assets/tiny")
    assert "lora, rank 4, alpha 32" in output
    assert "q_proj x4, v_proj x4" in output
    assert "12,288 of 1,881,792 parameters (0.65%)" in output
    assert "64 with" in output
    assert "assistant↵«I am Lora" in output
    assert output.index("«I am Lora") < output.index("training loss")


def test_a_resumed_run_equals_the_uninterrupted_one(
    quick_run: Callable[..., Any], tmp_path: Path
) -> None:
    settings = ["train.max_steps=6", "train.save_strategy=steps", "train.save_steps=3"]
    settings += ["train.save_total_limit=2", "peft.lora_dropout=0.1", "train.logging_steps=4"]
    uninterrupted = quick_run(*settings, name="whole")
    cut = copied(uninterrupted, tmp_path / "cut")
    shutil.rmtree(cut.directory / "checkpoints/checkpoint-6")  # as if it had been killed before
    with pytest.raises(ConfigError, match="is finished"):
        run(compose(f"resume={cut.directory}"))
    mark_killed(cut.directory)
    resumed = run(compose(f"resume={cut.directory}"))
    assert resumed.directory == cut.directory
    result = likeness(uninterrupted.directory, cut.directory)
    assert result.weights == result.metrics == []
    lines = [
        json.loads(line) for line in (cut.directory / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "train/loss" in line] == [4, 6]
    tokens = [line["train/tokens"] for line in lines if "train/tokens" in line]
    assert tokens == [line["train/num_tokens"] for line in lines if "train/num_tokens" in line]
    before = [
        json.loads(line)["before"]
        for line in (cut.directory / "samples.jsonl").read_text().splitlines()
    ]
    assert before == [
        json.loads(line)["before"]
        for line in (uninterrupted.directory / "samples.jsonl").read_text().splitlines()
    ]


def test_adalora_redistributes_its_ranks(quick_run: Callable[..., Any]) -> None:
    result = quick_run("peft=adalora", "peft.init_r=6", "peft.target_r=2", "train.max_steps=12")
    pattern = json.loads((result.saved / "adapter_config.json").read_text())["rank_pattern"]
    ranks = [sum(mask) for mask in pattern.values()]
    assert len(ranks) == 28
    assert sum(ranks) == 28 * 2  # target_r is their mean
    assert len(set(ranks)) > 1  # and ranks differ between layers


def test_a_run_does_not_fail_for_a_norm_that_cannot_be_computed(
    quick_run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(folder: Path) -> None:
        raise AdapterError("weights do not fit")

    monkeypatch.setattr("lora_exp.experiment.norms", refuse)
    result = quick_run()
    assert json.loads((result.directory / "run.json").read_text())["status"] == "finished"
    assert not (result.directory / "updates.json").exists()
    assert "updates.json is left out: weights do not fit" in caplog.text
