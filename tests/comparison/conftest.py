"""Runs as they lie on disk, written without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

CONFIG: dict[str, Any] = {
    "name": "a", "seed": 1,
    "train": {"learning_rate": 1e-3, "max_steps": 10},
    "model": {"path": "tiny", "revision": None},
    "quant": None,
    "peft": {"_target_": "peft.LoraConfig", "r": 8, "target_modules": "all_linear"},
    "targets": "all_linear",
    "trusted_targets": [],
    "choices": {"peft": "lora", "quant": "none", "targets": "all_linear", "algorithm": "sft"},
}  # fmt: skip
Write = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> Write:
    """Write a run's directory below tmp_path: record, config, overrides, metrics, samples."""

    def write(
        name: str,
        value: float | None = 0.5,
        *,
        overrides: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        answers: Sequence[str] = (),
        history: Sequence[Mapping[str, Any]] = (),
        **record: Any,
    ) -> Path:
        """Write a run; `answers` are those after training to prompts that expect `yes`."""
        directory = tmp_path / name
        (directory / ".hydra").mkdir(parents=True)
        config = json.loads(json.dumps(CONFIG))
        for key, setting in (overrides or {}).items():
            *parents, last = key.split(".")
            section = config
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = setting
        values = {
            "name": name.replace("/", "-"), "status": "finished", "error": None, "steps": 10,
            "objective": "eval/loss", "goal": "minimize", "place": "alone", "stopped": None,
            "counts": {"trainable_parameters": 1000, "train_tokens": 500},
            "versions": {"torch": "2.13.0"}, "data": {"rows.jsonl": "abc"}, "base": "sha256:1",
            "adapters": {}, "choices": config["choices"],
            "metrics": {
                "eval/loss": value, "peak_bytes": 2.0**30, "train/tokens_per_s": 100.0,
                "seconds": 5.0, **(metrics or {}),
            },
        } | record  # fmt: skip
        lines = [f"{key}={setting}" for key, setting in (overrides or {}).items()]
        (directory / ".hydra/overrides.yaml").write_text(yaml.safe_dump(lines))
        (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        (directory / "run.json").write_text(json.dumps(values))
        (directory / "metrics.jsonl").write_text("".join(json.dumps(h) + "\n" for h in history))
        samples = [
            {"prompt": f"{i}?", "expected": "yes", "task": None, "before": "no", "after": answer}
            for i, answer in enumerate(answers)
        ]
        (directory / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
        return directory

    return write
