"""Checkpoints are whole or absent, and a run goes on from its own newest whole one."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_exp import compose, run
from lora_exp.config.door import CONF
from lora_exp.errors import CheckpointError, ConfigError, DivergedError
from lora_exp.training.checkpoint import MANIFEST, flaw, newest, seal
from tests.conftest import QUICK
from tests.test_experiment import digest, killed

SAVING = ["train.save_strategy=steps", "train.save_steps=1", "train.save_total_limit=3"]
SAVING += ["train.logging_steps=1", "peft.lora_dropout=0.1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints 1, 2 and 3, nothing else about it unusual."""
    folder = tmp_path_factory.mktemp("made") / "run"
    run(compose("tracking=none", *QUICK, *SAVING), folder)
    return folder


def owner(directory: Path) -> str:
    return str(json.loads((directory / "run.json").read_text())["tracking_id"])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "deleted": Path.unlink,
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "flipped": flip,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_any_damage_to_any_file_is_named_once_and_the_one_before_is_taken(
    made: Path, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = sorted(p.name for p in (made / "checkpoints/checkpoint-3").iterdir())
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {*names}
    assert {"adapter_model.safetensors", MANIFEST} <= {*names}
    for name in names:
        folder = tmp_path / name
        shutil.copytree(made / "checkpoints", folder)
        DAMAGE[damage](folder / "checkpoint-3" / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found, step = newest(folder, owner(made))
        assert (found, step) == (folder / "checkpoint-2", 2), name
        (said,) = caplog.messages
        assert name in said or name == MANIFEST
        assert (folder / "unused-checkpoint-3").is_dir()
        assert newest(folder, owner(made))[1] == 2


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_from_the_checkpoint_before_a_damaged_one_the_run_ends_as_if_nothing_had_been(
    quick_run: Callable[..., Any], quant: str
) -> None:
    settings = [*SAVING, "train.max_steps=4", f"quant={quant}"]
    undisturbed = quick_run(*settings, name="undisturbed")
    cut = quick_run(*settings, name="cut")
    shutil.rmtree(cut.directory / "checkpoints/checkpoint-4")
    flip(cut.directory / "checkpoints/checkpoint-3/optimizer.pt")
    killed(cut.directory)
    resumed = run(compose(f"resume={cut.directory}"))
    assert digest(resumed.saved) == digest(undisturbed.saved)
    adapters = cut.directory.rglob("adapter_model.safetensors")
    kinds = {weight.dtype for path in adapters for weight in load_file(path).values()}
    assert kinds == {torch.float32}
    left = {path.name for path in (cut.directory / "checkpoints").iterdir()}
    assert left == {"checkpoint-2", "checkpoint-3", "checkpoint-4", "unused-checkpoint-3"}


def test_foreign_checkpoints_are_never_taken(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(made / "checkpoints", folder)
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-9")
    seal(folder / "checkpoint-9", "another", 9)
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-8")
    (folder / "checkpoint-8" / MANIFEST).unlink()  # as any other trainer leaves it
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-7")  # under another number
    assert newest(folder, owner(made))[1] == 3
    assert [m.partition("checkpoint-")[2][:1] for m in caplog.messages] == ["9", "8", "7"]
    assert "belongs to another run" in caplog.text


def test_a_file_that_came_later_makes_a_checkpoint_no_longer_whole(
    made: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(made / "checkpoints/checkpoint-3", folder)
    assert flaw(folder, owner(made)) is None
    (folder / "optimizer.bin").write_bytes(b"x")
    assert flaw(folder, owner(made)) == ("has files that it was not saved with: optimizer.bin")


def test_the_best_checkpoint_survives_rotation_and_a_move(
    quick_run: Callable[..., Any], tmp_path: Path
) -> None:
    best = ["+train.load_best_model_at_end=true", "+train.metric_for_best_model=eval_loss"]
    best += ["+train.greater_is_better=true", "train.eval_strategy=steps", "train.eval_steps=1"]
    settings = [*SAVING, *best, "train.save_total_limit=1", "train.max_steps=4"]
    first = quick_run(*settings, name="first")  # the loss falls: the first step is the "best"
    left = sorted(path.name for path in (first.directory / "checkpoints").iterdir())
    assert left == ["checkpoint-1"]
    settings[-2] = "train.save_total_limit=2"
    second = quick_run(*settings, name="second")
    weights = "adapter_model.safetensors"
    assert digest(second.saved)[weights] == digest(first.saved)[weights]
    moved = second.directory.rename(tmp_path / "moved")
    left = sorted(path.name for path in (moved / "checkpoints").iterdir())
    assert left == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    killed(moved)
    resumed = run(compose(f"resume={moved}", "train.max_steps=6"))
    assert (moved / "checkpoints/checkpoint-1").is_dir()
    assert digest(resumed.saved)[weights] == digest(first.saved)[weights]


def test_weights_that_are_no_numbers_are_not_saved_as_a_checkpoint(
    quick_run: Callable[..., Any], tmp_path: Path
) -> None:
    silent = ["train.logging_steps=100", "train.warmup_steps=0", "train.max_grad_norm=0"]
    with pytest.raises(DivergedError):
        quick_run(*SAVING, *silent, "train.learning_rate=1e30", "train.max_steps=8")
    kept = sorted((tmp_path / "run/checkpoints").glob("checkpoint-*/adapter_model.safetensors"))
    for path in kept:
        assert all(torch.isfinite(weight).all() for weight in load_file(path).values())
    assert 0 < len(kept) < 4  # it was found when the first such weights were to be saved
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "diverged"


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_between_two_rollouts_the_answers_are_saved(algorithm: str, tmp_path: Path) -> None:
    settings = [f"experiment=demo_{algorithm}", "data.rows=8", "data.eval_rows=4"]
    settings += ["train.per_device_train_batch_size=8", "algorithm.args.max_completion_length=8"]
    settings += ["+algorithm.args.num_iterations=2", "+algorithm.args.steps_per_generation=2"]
    settings += [*SAVING, "train.save_total_limit=9", "train.max_steps=6", "samples.rows=4"]
    undisturbed, cut = (
        run(compose("tracking=none", *settings), tmp_path / name) for name in ("undisturbed", "cut")
    )
    for step in (4, 5, 6):  # step 3 lies within a rollout of four
        shutil.rmtree(cut.directory / f"checkpoints/checkpoint-{step}")
    killed(cut.directory)
    resumed = run(compose(f"resume={cut.directory}"))
    assert digest(resumed.saved) == digest(undisturbed.saved)


class Payload:
    """Unpickled anywhere, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.mark, "executed")


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]
)
def test_a_pickle_in_a_checkpoint_is_never_executed(made: Path, name: str, tmp_path: Path) -> None:
    directory, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(made, directory)
    killed(directory)
    checkpoint = directory / "checkpoints/checkpoint-3"
    (checkpoint / name).write_bytes(pickle.dumps(Payload(mark), protocol=2))
    seal(checkpoint, owner(made), 3)  # by someone who knows how
    cfg = compose(f"resume={directory}", "train.max_steps=4")
    if name == "training_args.bin":  # nothing reads it
        run(cfg)
    else:
        with pytest.raises(CheckpointError, match="holds code where numbers belong"):
            run(cfg)
    assert not mark.exists()


# the first ends in the middle of an epoch, where the loop would go on
@pytest.mark.parametrize(
    ("limit", "last"), [("train.max_steps=3", 3), ("train.num_train_epochs=2", 4)]
)
def test_what_was_trained_to_its_end_is_not_trained_on(
    limit: str, last: int, quick_run: Callable[..., Any]
) -> None:
    settings = [*SAVING, "train.lr_scheduler_type=constant", "data.max_rows=32"]
    settings += ["train.max_steps=-1", limit]  # the last word counts
    done = quick_run(*settings)
    steps = json.loads((done.directory / "run.json").read_text())["steps"]
    before = digest(done.saved)
    shutil.rmtree(done.saved)
    killed(done.directory)
    again = run(compose(f"resume={done.directory}"))
    assert digest(again.saved) == before
    record = json.loads((done.directory / "run.json").read_text())
    assert record["steps"] == steps == last


def test_a_run_keeps_its_own_checkpoints_beside_those_of_others(
    quick_run: Callable[..., Any], made: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "run/checkpoints/checkpoint-9"
    shutil.copytree(made / "checkpoints/checkpoint-3", foreign)
    seal(foreign, "another", 9)
    done = quick_run(*SAVING, "train.save_total_limit=1")
    left = sorted(path.name for path in (done.directory / "checkpoints").iterdir())
    assert left == ["checkpoint-3", "checkpoint-9"]


def test_a_best_checkpoint_that_is_damaged_is_not_taken(quick_run: Callable[..., Any]) -> None:
    best = ["+train.load_best_model_at_end=true", "+train.metric_for_best_model=eval_loss"]
    best += ["+train.greater_is_better=true", "train.eval_strategy=steps", "train.eval_steps=1"]
    done = quick_run(*SAVING, *best)
    flip(done.directory / "checkpoints/checkpoint-1/adapter_model.safetensors")
    killed(done.directory)
    with pytest.raises(CheckpointError, match="checkpoint-1, the best, is damaged: adapter_model"):
        run(compose(f"resume={done.directory}", "train.max_steps=4"))


EVERY_STEP = [
    "train.save_strategy=steps", "train.save_steps=1", "train.save_total_limit=9",
    "train.logging_steps=1", "samples.rows=0",
]  # fmt: skip
BEST = [
    "train.eval_strategy=steps", "train.eval_steps=1", "+train.load_best_model_at_end=true",
    "+train.metric_for_best_model=eval_loss", "+train.greater_is_better=true",
]  # fmt: skip
METHODS = sorted(
    path.stem for path in (CONF / "peft").glob("*.yaml") if path.stem not in ("none", "adalora")
)
PROJECTED = ["peft=prefix_tuning", "+peft.prefix_projection=true", "+peft.encoder_hidden_size=24"]
LSTM = ["peft=p_tuning", "peft.encoder_reparameterization_type=LSTM"]


@pytest.mark.parametrize(
    "method", [[f"peft={name}"] for name in METHODS] + [PROJECTED, LSTM], ids=" ".join
)
def test_every_method_goes_on_bit_for_bit(
    quick_run: Callable[..., Any], method: list[str], tmp_path: Path
) -> None:
    whole = quick_run(*EVERY_STEP, *method, "train.max_steps=4", name="whole")
    cut = quick_run(*EVERY_STEP, *method, "train.max_steps=4", name="cut")
    for step in (3, 4):
        shutil.rmtree(cut.directory / f"checkpoints/checkpoint-{step}")
    shutil.rmtree(cut.saved)
    killed(cut.directory)
    run(compose(f"resume={cut.directory}"))
    assert digest(cut.saved) == digest(whole.saved)


@pytest.mark.parametrize("method", [["peft=p_tuning"], PROJECTED, ["peft=ia3"]], ids=" ".join)
def test_the_best_checkpoint_of_every_kind_is_what_is_saved(
    quick_run: Callable[..., Any], method: list[str]
) -> None:
    result = quick_run(*EVERY_STEP, *BEST, *method, "train.max_steps=3")
    first = result.directory / "checkpoints/checkpoint-1/adapter_model.safetensors"
    assert (result.saved / "adapter_model.safetensors").read_bytes() == first.read_bytes()


def test_adalora_does_not_promise_a_best_that_it_cannot_load() -> None:
    with pytest.raises(ConfigError, match=r"train.load_best_model_at_end: adalora moves"):
        compose("peft=adalora", *BEST, "train.save_strategy=steps", "train.eval_strategy=steps")


MOVING = [
    "+algorithm.args.sync_ref_model=true", "+algorithm.args.ref_model_sync_steps=1",
    "+algorithm.args.ref_model_mixup_alpha=0.5", "train.learning_rate=1e-3",
    "train.warmup_steps=0", "train.per_device_train_batch_size=4",
]  # fmt: skip


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_a_reference_that_moves_is_part_of_a_checkpoint(algorithm: str, tmp_path: Path) -> None:
    settings = [
        "tracking=none", f"algorithm={algorithm}", "data=demo_pairs", "data.rows=16",
        "data.eval_rows=4", "peft=none", "train.max_steps=4", *EVERY_STEP, *MOVING,
    ]  # fmt: skip
    whole = run(compose(*settings), tmp_path / "whole")
    cut = run(compose(*settings), tmp_path / "cut")
    for step in (3, 4):
        shutil.rmtree(cut.directory / f"checkpoints/checkpoint-{step}")
    shutil.rmtree(cut.saved)
    killed(cut.directory)
    run(compose(f"resume={cut.directory}"))
    assert digest(cut.saved) == digest(whole.saved)


def test_a_reference_that_cannot_move_is_refused() -> None:
    pairs = ["algorithm=dpo", "data=demo_pairs", *MOVING]
    with pytest.raises(ConfigError, match="is the base without its adapter, and cannot move"):
        compose(*pairs)
    with pytest.raises(ConfigError, match="what is computed before training cannot move"):
        compose(*pairs, "peft=none", "+algorithm.args.precompute_ref_log_probs=true")


def test_an_encoder_that_is_not_in_a_checkpoint_is_named(quick_run: Callable[..., Any]) -> None:
    cut = quick_run(*EVERY_STEP, "peft=p_tuning", "train.max_steps=2")
    folder = cut.directory / "checkpoints/checkpoint-2"
    (folder / "trained.safetensors").unlink()
    seal(folder, owner(cut.directory), 2)
    killed(cut.directory)
    with pytest.raises(CheckpointError, match=r"does not hold .*prompt_encoder.*; start a new run"):
        run(compose(f"resume={cut.directory}"))


def test_on_resume_logs_saves_and_evaluations_follow_what_is_asked_now(
    quick_run: Callable[..., Any],
) -> None:
    spare = ["samples.rows=0", "train.save_strategy=steps", "train.save_total_limit=9"]
    often = ["train.eval_strategy=steps", "train.eval_steps=3", "train.logging_steps=3"]
    first = quick_run(*spare, *often, "train.save_steps=3", "train.max_steps=3")
    now = ["train.logging_steps=2", "train.save_steps=1", "train.eval_steps=2"]
    run(compose(f"resume={first.directory}", "train.max_steps=6", *now))
    text = (first.directory / "metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if line["step"] > 3]
    assert {line["step"] for line in lines if "train/loss" in line} >= {4, 6}
    assert {line["step"] for line in lines if "eval/loss" in line} >= {4, 6}
    names = {path.name for path in (first.directory / "checkpoints").glob("checkpoint-*")}
    assert names == {f"checkpoint-{step}" for step in (3, 4, 5, 6)}
