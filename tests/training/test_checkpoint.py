"""Checkpoints are whole or absent, and a run resumes from its newest whole one."""

from __future__ import annotations

import errno
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
from transformers import Trainer, TrainerCallback, TrainingArguments

from lora_exp import compose, run
from lora_exp.config.door import CONF
from lora_exp.errors import CheckpointError, ConfigError, DivergedError
from lora_exp.training import checkpoint
from lora_exp.training.checkpoint import checkpointed
from lora_exp.training.manifest import MANIFEST, flaw, newest, seal
from tests.conftest import QUICK
from tests.test_experiment import copied, digest, mark_killed

SAVING = ["train.save_strategy=steps", "train.save_steps=1", "train.save_total_limit=3"]
SAVING += ["train.logging_steps=1", "peft.lora_dropout=0.1"]


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the checkpoints 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    run(compose("tracking=none", *QUICK, *SAVING), folder)
    return folder


def owner_of(directory: Path) -> str:
    return str(json.loads((directory / "run.json").read_text())["tracking_id"])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "deleted": Path.unlink,
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "flipped": flip_a_byte,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_any_damaged_file_is_named_once_and_the_previous_checkpoint_is_used(
    saved_run: Path, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = sorted(p.name for p in (saved_run / "checkpoints/checkpoint-3").iterdir())
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {*names}
    assert {"adapter_model.safetensors", MANIFEST} <= {*names}
    for name in names:
        folder = tmp_path / name
        shutil.copytree(saved_run / "checkpoints", folder)
        DAMAGE[damage](folder / "checkpoint-3" / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            checkpoint, step = newest(folder, owner_of(saved_run))
        assert (checkpoint, step) == (folder / "checkpoint-2", 2), name
        (message,) = caplog.messages
        assert name in message or name == MANIFEST
        assert (folder / "unused-checkpoint-3").is_dir()
        assert newest(folder, owner_of(saved_run))[1] == 2


@pytest.mark.parametrize(
    "quant",
    [["quant=none"], ["quant=nf4", "quant.compute_dtype=auto"], ["quant=int8"]],
    ids=" ".join,
)
def test_a_run_resumed_before_a_damaged_checkpoint_equals_an_uninterrupted_one(
    quick_run: Callable[..., Any], quant: list[str], tmp_path: Path
) -> None:
    settings = [*SAVING, "train.max_steps=4", *quant]
    uninterrupted = quick_run(*settings, name="undisturbed")
    cut = copied(uninterrupted, tmp_path / "cut")
    shutil.rmtree(cut.directory / "checkpoints/checkpoint-4")
    flip_a_byte(cut.directory / "checkpoints/checkpoint-3/optimizer.pt")
    mark_killed(cut.directory)
    resumed = run(compose(f"resume={cut.directory}"))
    assert digest(resumed.saved) == digest(uninterrupted.saved)
    adapters = cut.directory.rglob("adapter_model.safetensors")
    dtypes = {weight.dtype for path in adapters for weight in load_file(path).values()}
    assert dtypes == {torch.float32}
    checkpoints = {path.name for path in (cut.directory / "checkpoints").iterdir()}
    assert checkpoints == {"checkpoint-2", "checkpoint-3", "checkpoint-4", "unused-checkpoint-3"}


def test_checkpoints_of_other_runs_are_never_used(
    saved_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved_run / "checkpoints", folder)
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-9")
    seal(folder / "checkpoint-9", "another", 9)
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-8")
    (folder / "checkpoint-8" / MANIFEST).unlink()  # as other trainers save it
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-7")  # renamed
    assert newest(folder, owner_of(saved_run))[1] == 3
    assert [message.partition("checkpoint-")[2][:1] for message in caplog.messages] == [
        "9",
        "8",
        "7",
    ]
    assert "belongs to another run" in caplog.text


def test_a_checkpoint_with_an_added_file_is_not_whole(saved_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(saved_run / "checkpoints/checkpoint-3", folder)
    assert flaw(folder, owner_of(saved_run)) is None
    (folder / "optimizer.bin").write_bytes(b"x")
    assert flaw(folder, owner_of(saved_run)) == (
        "has files that it was not saved with: optimizer.bin"
    )


def test_weights_that_are_not_finite_are_not_saved_as_a_checkpoint(
    quick_run: Callable[..., Any], tmp_path: Path
) -> None:
    diverging = ["train.logging_steps=100", "train.warmup_steps=0", "train.max_grad_norm=0"]
    with pytest.raises(DivergedError):
        quick_run(*SAVING, *diverging, "train.learning_rate=1e30", "train.max_steps=8")
    weights_files = sorted(
        (tmp_path / "run/checkpoints").glob("checkpoint-*/adapter_model.safetensors")
    )
    for path in weights_files:
        assert all(torch.isfinite(weight).all() for weight in load_file(path).values())
    assert 0 < len(weights_files) < 4  # training stopped at the first save of such weights
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "diverged"


class Payload:
    """An object that writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.mark, "executed")


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]
)
def test_a_pickle_in_a_checkpoint_is_never_executed(
    saved_run: Path, name: str, tmp_path: Path
) -> None:
    directory, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(saved_run, directory)
    mark_killed(directory)
    checkpoint = directory / "checkpoints/checkpoint-3"
    (checkpoint / name).write_bytes(pickle.dumps(Payload(mark), protocol=2))
    seal(checkpoint, owner_of(saved_run), 3)  # an attacker can write the manifest too
    cfg = compose(f"resume={directory}", "train.max_steps=4")
    if name == "training_args.bin":  # nothing reads it
        run(cfg)
    else:
        with pytest.raises(CheckpointError, match="holds code where numbers belong"):
            run(cfg)
    assert not mark.exists()


# the first ends within an epoch, where the training loop would otherwise continue
@pytest.mark.parametrize(
    ("limit", "last"), [("train.max_steps=3", 3), ("train.num_train_epochs=2", 4)]
)
def test_a_run_that_reached_its_last_step_is_not_trained_further(
    limit: str, last: int, quick_run: Callable[..., Any]
) -> None:
    settings = [*SAVING, "train.lr_scheduler_type=constant", "data.max_rows=8"]
    settings += ["train.max_steps=-1", limit]  # the last override counts
    result = quick_run(*settings)
    steps = json.loads((result.directory / "run.json").read_text())["steps"]
    before = digest(result.saved)
    names = ("metrics.jsonl", "row_losses.json")
    texts = [(result.directory / name).read_text() for name in names]
    shutil.rmtree(result.saved)
    (result.directory / "row_losses.json").unlink()
    mark_killed(result.directory)
    resumed = run(compose(f"resume={result.directory}"))
    assert digest(resumed.saved) == before
    assert [(result.directory / name).read_text() for name in names] == texts
    record = json.loads((result.directory / "run.json").read_text())
    assert record["steps"] == steps == last


def test_a_share_of_an_epoch_is_as_many_steps_as_the_trainer_takes(
    quick_run: Callable[..., Any],
) -> None:
    settings = [*SAVING, "data.max_rows=25", "train.per_device_train_batch_size=1"]
    result = quick_run(*settings, "train.max_steps=-1", "train.num_train_epochs=0.28")
    steps = json.loads((result.directory / "run.json").read_text())["steps"]
    assert steps == 8  # 0.28 * 25 is a little above 7 in floats
    before = digest(result.saved)
    shutil.rmtree(result.directory / "checkpoints/checkpoint-8")
    mark_killed(result.directory)
    resumed = run(compose(f"resume={result.directory}"))
    assert json.loads((result.directory / "run.json").read_text())["steps"] == steps
    assert digest(resumed.saved) == before


def test_a_damaged_best_checkpoint_is_refused(quick_run: Callable[..., Any]) -> None:
    best = ["+train.load_best_model_at_end=true", "+train.metric_for_best_model=eval_loss"]
    best += ["+train.greater_is_better=true", "train.eval_strategy=steps", "train.eval_steps=1"]
    result = quick_run(*SAVING, *best)
    flip_a_byte(result.directory / "checkpoints/checkpoint-1/adapter_model.safetensors")
    mark_killed(result.directory)
    with pytest.raises(CheckpointError, match="checkpoint-1, the best, is damaged: adapter_model"):
        run(compose(f"resume={result.directory}", "train.max_steps=4"))


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
PREFIX_PROJECTION = [
    "peft=prefix_tuning",
    "+peft.prefix_projection=true",
    "+peft.encoder_hidden_size=24",
]
LSTM = ["peft=p_tuning", "peft.encoder_reparameterization_type=LSTM"]


def resume_from_step_2(cut: Any) -> None:
    """Resume a run of four steps as if it had been killed after its second checkpoint."""
    for step in (3, 4):
        shutil.rmtree(cut.directory / f"checkpoints/checkpoint-{step}")
    shutil.rmtree(cut.saved)
    mark_killed(cut.directory)
    run(compose(f"resume={cut.directory}"))


@pytest.mark.parametrize(
    "method", [[f"peft={name}"] for name in METHODS] + [PREFIX_PROJECTION, LSTM], ids=" ".join
)
def test_a_resumed_run_of_every_method_is_bit_identical_in_its_last_and_best_weights(
    quick_run: Callable[..., Any], method: list[str], tmp_path: Path
) -> None:
    uninterrupted = quick_run(*EVERY_STEP, *BEST, *method, "train.max_steps=4", name="whole")
    cut = copied(uninterrupted, tmp_path / "cut")
    resume_from_step_2(cut)
    assert digest(cut.saved) == digest(uninterrupted.saved)
    best = json.loads((cut.directory / "run.json").read_text())["best"]
    assert best["step"] < 4  # the last weights are others
    weights = "{}/adapter_model.safetensors".format
    saved, kept = cut.saved / weights("."), cut.directory / weights(best["checkpoint"])
    last, expected = (
        (result.directory / weights("checkpoints/checkpoint-4")).read_bytes()
        for result in (cut, uninterrupted)
    )
    assert last == expected
    assert kept.read_bytes() != last
    if "init_lora_weights" not in compose(*method).peft:  # else saved as plain LoRA
        assert saved.read_bytes() == kept.read_bytes()


def test_adalora_refuses_to_load_the_best_checkpoint() -> None:
    with pytest.raises(ConfigError, match="keep: best, but adalora moves"):
        compose("peft=adalora", *BEST, *EVERY_STEP)


SYNCED_REFERENCE = [
    "+algorithm.args.sync_ref_model=true", "+algorithm.args.ref_model_sync_steps=1",
    "+algorithm.args.ref_model_mixup_alpha=0.5", "train.learning_rate=1e-3",
    "train.warmup_steps=0", "train.per_device_train_batch_size=4",
]  # fmt: skip


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_a_synced_reference_is_part_of_a_checkpoint(algorithm: str, tmp_path: Path) -> None:
    settings = [
        "tracking=none", f"algorithm={algorithm}", "data=demo_pairs", "data.rows=16",
        "data.eval_rows=4", "peft=none", "train.max_steps=4", *EVERY_STEP, *SYNCED_REFERENCE,
    ]  # fmt: skip
    uninterrupted = run(compose(*settings), tmp_path / "whole")
    cut = copied(uninterrupted, tmp_path / "cut")
    resume_from_step_2(cut)
    assert digest(cut.saved) == digest(uninterrupted.saved)


def test_a_reference_that_cannot_be_synced_is_refused() -> None:
    pairs = ["algorithm=dpo", "data=demo_pairs", *SYNCED_REFERENCE]
    for method in METHODS:
        with pytest.raises(ConfigError, match="is the base without its adapter, and cannot move"):
            compose(*pairs, f"peft={method}")
    with pytest.raises(ConfigError, match="what is computed before training cannot move"):
        compose(*pairs, "peft=none", "+algorithm.args.precompute_ref_log_probs=true")


class Failing(TrainerCallback):  # type: ignore[misc]
    """Raises in the middle of step 4."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise RuntimeError("in the step after")


def test_a_checkpoint_is_finished_beside_the_next_step_whatever_ends_it(
    fresh_base: Any, tmp_path: Path
) -> None:
    ids = fresh_base.tokenizer("Repeat: a b c")["input_ids"]
    model = fresh_base.model.requires_grad_(True)
    args = TrainingArguments(
        str(tmp_path), max_steps=6, gradient_accumulation_steps=2, per_device_train_batch_size=1,
        save_strategy="steps", save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids}] * 16
    trainer = checkpointed(Trainer)(model, args, train_dataset=rows, callbacks=[Failing()])
    trainer.owner = "a run"
    with pytest.raises(RuntimeError, match="in the step after"):
        trainer.train()
    folders = sorted(tmp_path.iterdir())  # nothing is left in a temporary folder
    assert [folder.name for folder in folders] == [f"checkpoint-{n}" for n in (1, 2, 3)]
    assert [flaw(folder, "a run") for folder in folders] == [None] * 3
    trainer._save_checkpoint(model, None)
    assert trainer._saving is not None
    trainer.ensure_checkpoint()
    assert trainer._saving is None


def test_a_checkpoint_that_the_disk_refuses_beside_a_step_ends_the_training(
    fresh_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    ids = fresh_base.tokenizer("Repeat: a b c")["input_ids"]
    model = fresh_base.model.requires_grad_(True)
    args = TrainingArguments(
        str(tmp_path), max_steps=4, save_strategy="steps", save_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids}] * 16
    trainer = checkpointed(Trainer)(model, args, train_dataset=rows)
    monkeypatch.setattr(checkpoint, "seal", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left"):
        trainer.train()
    assert trainer.state.global_step == 2  # at the end of the step beside it
    assert not list(tmp_path.iterdir())
