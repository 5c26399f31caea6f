"""What a base answers and loses is measured once for equal content, and is the same bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_exp import compose
from lora_exp.training.answers import Answer
from lora_exp.training.untrained import content, recalled

BRIEF = ["data.max_rows=16", "samples.rows=2", "train.max_steps=1", "data.max_eval_rows=4"]
SPEED = re.compile(r"second|per_s|bytes|time|started|ended|tracking_id|directory|date")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/untrained"


def lasting(value: Any) -> Any:
    """Return a record without what no two runs have in common."""
    if isinstance(value, dict):
        return {key: lasting(item) for key, item in value.items() if not SPEED.search(key)}
    return value


def lines(path: Path) -> list[Any]:
    return [lasting(json.loads(line)) for line in path.read_text().splitlines()]


def test_a_run_has_the_same_bytes_with_and_without_the_cache(
    quick_run: Callable[..., Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (quick_run(*BRIEF, name=name).directory for name in ("first", "second"))
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setenv("LORA_EXP_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    without = quick_run(*BRIEF, name="without").directory
    assert not (tmp_path / "home/lora-exp/untrained").exists()
    for name in ("adapter/adapter_model.safetensors", "samples.jsonl"):
        assert len({(run / name).read_bytes() for run in (first, second, without)}) == 1
    for other in (second, without):
        assert lines(first / "metrics.jsonl") == lines(other / "metrics.jsonl")
        records = [json.loads((run / "run.json").read_text()) for run in (first, other)]
        assert lasting(records[0]) == lasting(records[1])


def test_the_key_covers_what_decides_the_results_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer: Any = SimpleNamespace(chat_template="{{ strftime_now('%d') }}")
    tokenizer.apply_chat_template = partial(print, chat_template="1")
    base: Any = SimpleNamespace(revision="sha256:1", tokenizer=tokenizer)
    values = {"base": "sha256:1", "base_files": {}, "adapters": {}}
    record: Any = SimpleNamespace(values=values)

    def key(*overrides: str, text: str = "a") -> str | None:
        cfg = compose(*overrides)
        dora = {"use_dora": True} if cfg.choices.peft == "dora" else {}
        layers = nn.Sequential(nn.Linear(2, 2))
        model = get_peft_model(layers, LoraConfig(target_modules=["0"], **dora))
        return content(cfg, model, base, [{"text": text}], record)

    monkeypatch.setattr("lora_exp.config.ranges.find_spec", lambda name: name)
    plain = key()
    assert key("peft.r=2", "train.learning_rate=1e-3", "targets=qv", "seed=7") == plain
    dora, rate = key("peft=dora"), key("peft=dora", "train.learning_rate=1e-3")
    others = [
        key(text="b"), key("quant=nf4"), key("samples.rows=2"), dora, key("peft=dora", "seed=7"),
        key("train.per_device_eval_batch_size=4"), key("model.random_weights=true"),
        key("deterministic=false"), key("batch_invariant=true"),
    ]  # fmt: skip
    assert dora == rate
    whole = ["peft=none", "parallel.processes=2"]
    assert key(*whole, "parallel=ddp") != key(*whole, "parallel=fsdp")  # rounded in another way
    monkeypatch.setenv("OMP_DYNAMIC", "false")
    others.append(key())
    monkeypatch.delenv("OMP_DYNAMIC")
    tokenizer.apply_chat_template = partial(print, chat_template="2")
    assert len({plain, *others, key()}) == 12
    assert key("experiment=demo_grpo") is None  # answers are sampled
    base.revision = None
    assert key() is None


def test_results_are_measured_once_logged_as_then_and_not_read_from_a_damaged_file(
    cache: Path,
) -> None:
    results: Any = ({"eval_loss": 0.1 + 0.2}, None, [Answer("p", "e", "t\n", None)])
    measured, logged = [], []
    trainer = SimpleNamespace(log=logged.append)

    def measure() -> Any:
        measured.append(1)
        return results

    assert recalled(trainer, measure, lambda: "key") == results
    assert recalled(trainer, measure, lambda: "key") == results
    assert (len(measured), logged) == (1, [{"eval_loss": 0.1 + 0.2}])
    (cache / "key.json").write_text('{"metrics": {}}')
    assert recalled(trainer, measure, lambda: "key") == results
    assert recalled(trainer, measure, lambda: None) == results
    assert len(measured) == 3
