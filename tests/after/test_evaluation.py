"""Metrics on held-out rows equal the run's, transformers' loss, and the base's alone."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from lora_exp import compose, load_adapter, run
from lora_exp.after.evaluation import _overlap, evaluate
from lora_exp.after.merging import merge
from lora_exp.after.saved import find
from lora_exp.data.encoding import IGNORED, encode
from lora_exp.data.tasks import pairs
from lora_exp.errors import DataError, ExtraError, SavedError
from lora_exp.training.answers import Answer
from tests.after.copies import copy_run
from tests.after.test_chat import run_cli
from tests.after.test_completion import HELD_OUT, held_out, write_rows
from tests.conftest import FLOAT32, ROOT

Trained = Callable[..., Path]
TINY = ROOT / "lora_exp/assets/tiny"
LONGER = ("train.max_steps=40", "samples.rows=16", "samples.max_new_tokens=24")


@pytest.mark.parametrize("quant", [("quant=none",), ("quant=nf4", FLOAT32)], ids=" ".join)
def test_both_columns_equal_the_metrics_of_the_run(
    trained: Trained, tmp_path: Path, quant: tuple[str, ...]
) -> None:
    folder = trained("peft=lora", *quant, *LONGER)
    metrics = json.loads((folder / "run.json").read_text())["metrics"]
    results = evaluate(folder, held_out(tmp_path, 16), max_new_tokens=24)["results"]
    for column, prefix in (("base", "before/"), ("adapter", "eval/")):
        exact = {name: metrics[f"{prefix}{name}"] for name in results[column] if "exact" in name}
        assert {name: results[column][name] for name in exact} == exact
        loss = metrics[f"{prefix}loss"]
        assert results[column]["loss"] == pytest.approx(loss, rel=1e-5)
    assert results["adapter"]["exact_match"] > results["base"]["exact_match"]
    assert results["adapter"]["rouge_l"] > results["base"]["rouge_l"]
    assert results["adapter"]["bleu"] > results["base"]["bleu"]


def test_the_tokens_of_the_loss_are_those_of_the_run(trained: Trained) -> None:
    folder = trained("peft=lora", "algorithm.args.completion_only_loss=false", "samples.rows=0")
    loss = json.loads((folder / "run.json").read_text())["metrics"]["eval/loss"]
    results = evaluate(folder, max_new_tokens=1)["results"]
    assert results["adapter"]["loss"] == pytest.approx(loss, rel=1e-5)


def test_columns_of_its_run_are_read_as_there(trained: Trained, tmp_path: Path) -> None:
    folder = copy_run(trained("peft=lora"), tmp_path / "run")
    settings = OmegaConf.load(folder / "config.yaml")
    settings.data.columns = {"prompt": "ask", "completion": "reply"}
    OmegaConf.save(settings, folder / "config.yaml")
    rows = [{"prompt": f"Repeat: {word}", "completion": word} for word in ("red", "blue")]
    fields = write_rows(tmp_path / "fields.jsonl", *rows)
    renamed = [{"ask": row["prompt"], "reply": row["completion"]} for row in rows]
    columns = write_rows(tmp_path / "columns.jsonl", *renamed)
    reports = [evaluate(folder, path, max_new_tokens=2) for path in (fields, columns)]
    assert reports[0]["results"] == reports[1]["results"]
    assert reports[0]["rows"] == 2


def test_unwanted_answers_are_no_known_ones_however_labels_are_written(
    trained: Trained, tmp_path: Path
) -> None:
    folder = copy_run(trained("peft=lora"), tmp_path / "run")
    settings = OmegaConf.load(folder / "config.yaml")
    settings.data.format = "unpaired_preference"
    OmegaConf.save(settings, folder / "config.yaml")
    reports = []
    for name, labels in (("words", [True, False]), ("numbers", [1, 0])):
        rows = [
            {"prompt": f"Repeat: {word}", "completion": word, "label": label}
            for word, label in zip(("red", "blue"), labels, strict=True)
        ]
        reports.append(evaluate(folder, write_rows(tmp_path / name, *rows), max_new_tokens=2))
    assert reports[0]["results"] == reports[1]["results"]
    assert [report["with_answer"] for report in reports] == [1, 1]


@pytest.mark.parametrize("columns", [{"prompt": ["ask"]}, ["ask"], "ask"])
def test_columns_of_a_strange_config_are_no_traceback(
    columns: Any, trained: Trained, tmp_path: Path
) -> None:
    folder = copy_run(trained("peft=lora"), tmp_path / "run")
    settings = OmegaConf.load(folder / "config.yaml")
    settings.data.columns = columns
    OmegaConf.save(settings, folder / "config.yaml")
    saved = find(folder)
    assert saved.columns({"ask": 1, "prompt": 2}) == {}
    assert saved.columns(["ask"]) == {}


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning", "none"])
def test_the_loss_equals_that_of_transformers_row_by_row(
    trained: Trained, tmp_path: Path, method: str
) -> None:
    folder = trained(f"peft={method}")
    rows: list[dict[str, Any]] = [json.loads(line) for line in HELD_OUT[:5]]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    report = evaluate(folder, path, max_new_tokens=1, batch_size=3)
    model, tokenizer = load_adapter(folder)
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, labels in encode(rows, tokenizer, completion_only=True):
            counted = sum(label != IGNORED for label in labels[1:])
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
            total, count = total + float(loss) * counted, count + counted
    column = report["results"]["model" if method == "none" else "adapter"]
    assert report["tokens"] == count
    assert column["loss"] == pytest.approx(total / count, rel=1e-5)
    assert column["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize(
    "overrides",
    [
        ("peft=dora",),
        ("peft=ia3",),
        ("peft=oft",),
        ("peft=pissa",),
        ("peft=ln_tuning",),
        ("peft=prompt_tuning",),
        ("peft=prefix_tuning",),
        ("peft=lora", "peft.modules_to_save=[norm]"),
    ],
)
def test_the_base_column_equals_the_base_alone_for_every_method(
    trained: Trained, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    path = held_out(tmp_path, 6)
    results = evaluate(trained(*overrides), path, max_new_tokens=12)["results"]
    alone = evaluate(TINY, path, max_new_tokens=12)["results"]
    assert results["base"] == pytest.approx(alone["model"], rel=1e-6)
    assert results["adapter"]["loss"] != pytest.approx(alone["model"]["loss"], rel=1e-3)


def test_the_loss_does_not_depend_on_the_batch(trained: Trained, tmp_path: Path) -> None:
    path = held_out(tmp_path, 7)
    losses = [
        evaluate(trained("peft=lora"), path, max_new_tokens=1, batch_size=size)["results"]
        for size in (1, 4, 7)
    ]
    assert losses[0]["adapter"]["loss"] == pytest.approx(losses[1]["adapter"]["loss"], rel=1e-6)
    assert losses[0]["adapter"]["loss"] == pytest.approx(losses[2]["adapter"]["loss"], rel=1e-6)


def test_rows_without_a_known_answer_are_not_scored_but_counted(
    trained: Trained, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "Mirror: a b"}]
    answer = [{"role": "assistant", "content": "a b b a"}]
    known: list[dict[str, Any]] = [
        {"prompt": turns, "answer": "a b b a", "task": "mirror"},
        {"prompt": turns, "answer": 5},
        {"prompt": turns},
    ]
    folder = trained("peft=lora")
    report = evaluate(folder, write_rows(tmp_path / "known.jsonl", *known), max_new_tokens=8)
    assert (report["rows"], report["with_loss"], report["with_answer"]) == (3, 1, 1)
    chat = write_rows(tmp_path / "chat.jsonl", {"messages": turns + answer, "task": "mirror"})
    assert report["results"] == evaluate(folder, chat, max_new_tokens=8)["results"]
    pair = write_rows(
        tmp_path / "pair.jsonl",
        {"prompt": turns, "chosen": answer, "rejected": [answer[0] | {"content": "a b"}]},
    )
    loss = report["results"]["adapter"]["loss"]
    assert evaluate(folder, pair, max_new_tokens=1)["results"]["adapter"]["loss"] == loss
    texts = write_rows(tmp_path / "texts.jsonl", {"text": "Once upon a time"}, {"text": "There"})
    report = evaluate(folder, texts)
    assert (report["with_loss"], report["with_answer"]) == (2, 0)
    assert set(report["results"]["adapter"]) == {"loss", "perplexity"}
    with pytest.raises(DataError, match="no row has a known answer"):
        evaluate(folder, write_rows(tmp_path / "none.jsonl", known[2]))


def test_rows_longer_than_the_context_are_cut_and_counted(trained: Trained, tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": " b c d" * 400}
    report = evaluate(
        trained("peft=lora"), write_rows(tmp_path / "rows.jsonl", row), max_new_tokens=1
    )
    assert (report["truncated"], report["with_loss"]) == (1, 1)
    assert report["tokens"] <= 512


def test_overlap_metrics_equal_the_papers_formulas() -> None:
    def overlap(*pairs: tuple[str, str]) -> dict[str, float]:
        return _overlap([Answer("", expected, text, None) for expected, text in pairs])

    same = overlap(("one two three four five", "one two three four five"))
    assert same == {"rouge_l": 1.0, "bleu": pytest.approx(100.0)}
    # precision 2/2 and recall 2/3: F = 0.8; precision and recall 2/4: F = 0.5
    half = overlap(("the cat sat", "the cat"), ("a b c d", "a x b y"))
    assert half["rouge_l"] == pytest.approx((0.8 + 0.5) / 2)
    # 4, 3, 2 and 1 n-grams of 5, 4, 3 and 2 are right, and the lengths are equal
    bleu = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert overlap(("a b c d e", "a b c d f"))["bleu"] == pytest.approx(bleu)


def test_a_reward_model_is_measured_on_pairs(trained: Trained, tmp_path: Path) -> None:
    folder = trained("algorithm=reward", "data=demo_pairs", "data.rows=64", "data.eval_rows=8")
    path = write_rows(tmp_path / "pairs.jsonl", *pairs(0, 8, held_out=True))
    report = evaluate(folder, path, batch_size=3)
    metrics = json.loads((folder / "run.json").read_text())["metrics"]
    assert report["rows"] == 8
    assert set(report["results"]) == {"adapter"}
    assert report["results"]["adapter"] == pytest.approx(
        {"accuracy": metrics["eval/accuracy"], "margin": metrics["eval/margin"]}, rel=1e-4
    )
    with pytest.raises(DataError, match="needs rows of shape preference"):
        evaluate(folder, held_out(tmp_path, 2))


def test_an_encoder_decoder_model_is_measured_too(base: Any, t5: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {c}", "completion": c * n} for n, c in enumerate("abcdefgh", 1)]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    overrides = ["algorithm=seq2seq", "model=local", f"model.path={t5}", "data=jsonl"]
    overrides += [
        f"data.path={path}",
        f"data.eval_path={path}",
        "train.max_steps=6",
        "samples.rows=4",
    ]
    overrides += ["train.learning_rate=1e-2", "samples.max_new_tokens=4", "tracking=none"]
    metrics = run(compose(*overrides), tmp_path / "run").metrics
    report = evaluate(tmp_path / "run", path, max_new_tokens=4)
    assert report["results"]["adapter"]["loss"] == pytest.approx(metrics["eval/loss"], rel=1e-4)
    assert report["results"]["base"]["loss"] == pytest.approx(metrics["before/loss"], rel=1e-4)
    assert report["tokens"] == sum(
        len(base.tokenizer(row["completion"])["input_ids"]) + 1 for row in rows
    )


def test_without_the_extra_the_error_names_it_before_anything_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ExtraError, match=r'^sacrebleu missing: pip install "lora-exp\[eval\]"$'):
        evaluate("nowhere", "nowhere")


def test_missing_files_and_wrong_outputs_are_refused(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(SavedError, match="nowhere does not exist"):
        evaluate("nowhere", held_out(tmp_path, 1))
    with pytest.raises(SavedError, match="is a folder; give a file"):
        evaluate(trained("peft=lora"), held_out(tmp_path, 1), out=tmp_path)
    with pytest.raises(DataError, match="no file matches nowhere"):
        evaluate(trained("peft=lora"), "nowhere")
    rows = held_out(tmp_path, 1)
    before = rows.read_bytes()
    with pytest.raises(SavedError, match="exists; --force replaces it"):
        evaluate(trained("peft=lora"), rows, out=rows)
    with pytest.raises(SavedError, match="is also the input"):
        evaluate(trained("peft=lora"), rows, out=rows, force=True)
    assert rows.read_bytes() == before


def test_a_loss_that_is_nan_is_an_error(trained: Trained, tmp_path: Path) -> None:
    model = merge([trained("peft=lora")], tmp_path / "merged")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SavedError, match="the loss of the model is nan: lora-exp check"):
        evaluate(model, held_out(tmp_path, 1), max_new_tokens=1)


def test_the_evaluate_command(trained: Trained, tmp_path: Path) -> None:
    folder, path, out = trained("peft=lora"), held_out(tmp_path, 4), tmp_path / "found.json"
    command = ["evaluate", str(folder), "--data", str(path), "--max-new-tokens", "4"]
    page = run_cli(*command, "-o", str(out))
    assert page.returncode == 0, page.stderr
    title, _, table = page.stdout.partition("  base")
    assert title.startswith(f"{folder}/adapter on ")
    lines = table.splitlines()
    assert lines[0].split() == ["adapter", "difference"]
    assert [line.split()[0] for line in lines[1:3]] == ["loss", "perplexity"]
    assert lines[-1].startswith("4 rows: 4 with a loss (")
    report = json.loads(out.read_text())
    assert json.loads(run_cli(*command, "--json").stdout) == report
    assert f"{report['results']['adapter']['loss']:.4g}" in lines[1]
    assert run_cli("evaluate").returncode == 2
