"""The best evaluation, and the step whose weights are saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_exp import compose
from lora_exp.after.evaluation import evaluate
from lora_exp.errors import ConfigError
from lora_exp.training.best import Watched, best_evaluation, saved_step
from tests.test_experiment import digest

HISTORY = [
    {"step": 0, "eval_loss": 0.1},
    {"step": 2, "loss": 3.0},
    {"step": 2, "eval_loss": 2.0},
    {"step": 4, "eval_loss": 1.0},
    {"step": 6, "eval_loss": 1.0},
    {"step": 8, "eval_loss": math.nan},
]
# the loss rises from the second evaluation on
OVERFIT = ["train.logging_steps=100", "train.warmup_steps=0", "train.lr_scheduler_type=constant"]
OVERFIT += ["train.learning_rate=8e-2", "train.max_steps=4", "train.eval_strategy=steps"]
OVERFIT += ["train.eval_steps=1", "samples.rows=2"]


@pytest.mark.parametrize(
    ("overrides", "watched"),
    [
        ([], Watched("loss", maximize=False)),
        (["objective=eval/mean_token_accuracy", "goal=maximize"],
         Watched("mean_token_accuracy", maximize=True)),
        (["objective=eval/exact_match", "goal=maximize"], Watched("loss", maximize=False)),
        (["algorithm=reward"], Watched("accuracy", maximize=True)),
        (["algorithm=dpo"], Watched("loss", maximize=False)),
        (["+train.metric_for_best_model=eval_entropy"], Watched("entropy", maximize=True)),
    ],
)  # fmt: skip
def test_the_objective_is_watched_where_training_evaluates_it(
    overrides: list[str], watched: Watched
) -> None:
    assert Watched.of(compose("tracking=none", *overrides)) == watched


def test_the_first_of_equal_evaluations_is_the_best() -> None:
    low, high = Watched("loss", maximize=False), Watched("loss", maximize=True)
    assert low.best(HISTORY) == (4, 1.0)
    assert low.best(HISTORY, [6, 2]) == (6, 1.0)
    assert high.best(HISTORY) == (2, 2.0)
    assert low.best(HISTORY[:2]) is None


def test_the_saved_step_is_the_last_unless_the_best_was_loaded(tmp_path: Path) -> None:
    state = SimpleNamespace(
        global_step=6, best_global_step=4, best_model_checkpoint="x", log_history=HISTORY
    )
    args = SimpleNamespace(load_best_model_at_end=False, output_dir=str(tmp_path / "checkpoints"))
    trainer = SimpleNamespace(state=state, args=args, watched=Watched("loss", maximize=False))
    assert saved_step(trainer) == 6
    args.load_best_model_at_end = True
    assert saved_step(trainer) == 4
    best = best_evaluation(trainer)
    assert best is not None
    assert (best["step"], best["value"], best["checkpoint"]) == (4, 1.0, None)
    (tmp_path / "checkpoints/checkpoint-4").mkdir(parents=True)
    best = best_evaluation(trainer)
    assert best is not None
    assert best["checkpoint"] == "checkpoints/checkpoint-4"


def test_the_results_of_a_run_are_those_of_the_step_it_saved(
    quick_run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "eval.jsonl"
    # other letters than those that are learnt: the loss falls by what is alike, then rises
    for file, letters in ((tmp_path / "train.jsonl", "abcdefgh"), (path, "zyxwvuts")):
        counts = [(f"count to {n}: ", " ".join(letters[:n])) for n in range(1, 9)]
        rows = [{"prompt": prompt, "completion": answer} for prompt, answer in counts]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["data=jsonl", f"data.path={tmp_path / 'train.jsonl'}", f"data.eval_path={path}"]
    overrides += ["data.max_rows=8", *OVERFIT, "train.learning_rate=5e-2"]
    kept = quick_run(*overrides, "keep=best", name="best")
    record = json.loads((kept.directory / "run.json").read_text())
    assert record["saved_step"] == record["best"]["step"] < record["steps"] == 4
    assert kept.objective == record["best"]["value"] == record["metrics"]["eval/loss"]
    measured = evaluate(kept.directory, path, max_new_tokens=4)["results"]["adapter"]["loss"]
    assert measured == pytest.approx(kept.objective, rel=1e-4)
    assert f"| eval/loss | {kept.objective:.4f} |" in (kept.saved / "README.md").read_text()
    best = ["+train.load_best_model_at_end=true", "+train.metric_for_best_model=eval_loss"]
    best += ["train.save_strategy=steps", "train.save_steps=1"]
    by_transformers = quick_run(*overrides, *best, name="old")
    weights = "adapter_model.safetensors"
    assert digest(by_transformers.saved)[weights] == digest(kept.saved)[weights]
    capsys.readouterr()
    saving = ["train.save_strategy=steps", "train.save_steps=1", "train.save_total_limit=1"]
    last = quick_run(*overrides, *saving, name="last")
    record = json.loads((last.directory / "run.json").read_text())
    assert record["saved_step"] == 4
    assert last.objective > kept.objective
    step = record["best"]["step"]
    checkpoints = {path.name for path in (last.directory / "checkpoints").iterdir()}
    assert checkpoints == {f"checkpoint-{step}", "checkpoint-4"}
    printed = " ".join(capsys.readouterr().out.split())
    assert f"eval/loss lowest at step {step}: " in printed
    assert "saved is step 4 (the best lies in checkpoints/checkpoint-" in printed
    assert f"step {step}/4 epoch" in printed  # evaluations are printed as they happen


def test_keep_best_needs_held_out_rows(quick_run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a b c"}\n' * 4)
    with pytest.raises(ConfigError, match="keep: best needs held-out rows"):
        quick_run("keep=best", "data=jsonl", f"data.path={path}", "data.eval_share=0")
