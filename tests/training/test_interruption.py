"""SIGTERM and Ctrl-C: a run saves at its next step, prints how to resume, and loses nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from lora_exp import compose, run
from lora_exp.errors import Interrupted
from lora_exp.training.interruption import MESSAGE, Stop, stop
from lora_exp.training.place import Alone
from tests.conftest import QUICK
from tests.test_experiment import copied, digest, mark_killed
from tests.warm import Process

RUN = ["tracking=none", *QUICK, "train.max_steps=40", "train.save_strategy=no"]
RUN += ["train.logging_steps=1", "train.per_device_train_batch_size=2", "peft.lora_dropout=0.1"]
RUN += ["train.eval_strategy=no", "samples.rows=0"]
RUN += ["hydra.run.dir=run"]


def start(folder: Path, *command: str) -> Process:
    """Start a run in a session of its own, as a terminal does."""
    return Process("-m", "lora_exp", *command, cwd=folder, new_session=True)


def interrupt_twice(process: Process, kill: Callable[[int, int], None]) -> None:
    """Press Ctrl-C twice, and see the process end at once."""
    kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    kill(process.pid, signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr


def count_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.is_file() else 0


def wait_for(process: Process, condition: object) -> None:
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def status_of(directory: Path) -> str:
    return str(json.loads((directory / "run.json").read_text())["status"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The adapters' hashes of runs without interruption, by gradient accumulation."""
    hashes = {}
    for accumulation in ("1", "4"):
        folder = tmp_path_factory.mktemp("uninterrupted")
        overrides = [*RUN[:-1], f"train.gradient_accumulation_steps={accumulation}"]
        hashes[accumulation] = digest(run(compose(*overrides), folder).saved)
    return hashes


@pytest.mark.parametrize(
    ("number", "accumulation"),
    [(signal.SIGTERM, "1"), (signal.SIGTERM, "4"), (signal.SIGINT, "1")],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    number: int,
    accumulation: str,
    uninterrupted: dict[str, dict[str, str]],
    tmp_path: Path,
) -> None:
    process = start(tmp_path, *RUN, f"train.gradient_accumulation_steps={accumulation}")
    wait_for(process, lambda: count_lines(tmp_path / "run/metrics.jsonl") >= 5)
    os.kill(process.pid, number)
    stderr = process.communicate()[1]
    assert process.returncode == 75, stderr
    assert MESSAGE in stderr
    assert f"resume={tmp_path}/run goes on" in stderr
    assert "Traceback" not in stderr
    assert status_of(tmp_path / "run") == "interrupted"
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    assert 3 <= int(checkpoint.name.removeprefix("checkpoint-")) < 40
    resumed = run(compose(f"resume={tmp_path}/run"))
    assert digest(resumed.saved) == uninterrupted[accumulation]


def test_a_signal_before_training_stops_at_once_and_a_resume_starts_anew(
    uninterrupted: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    process = start(tmp_path, *RUN)
    wait_for(process, (tmp_path / "run/run.json").is_file)
    os.kill(process.pid, signal.SIGTERM)
    stderr = process.communicate()[1]
    assert process.returncode == 75, stderr
    assert status_of(tmp_path / "run") == "interrupted"
    assert digest(run(compose(f"resume={tmp_path}/run")).saved) == uninterrupted["1"]


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a b c d"}\n' * 12000)
    long = ["data=jsonl", "data.path=rows.jsonl", "data.eval_share=0", "algorithm=pretrain"]
    long += ["train.per_device_train_batch_size=128", "data.max_rows=null"]
    process = start(tmp_path, *RUN, *long, "train.gradient_accumulation_steps=40")
    wait_for(process, lambda: count_lines(tmp_path / "run/metrics.jsonl") >= 1)
    time.sleep(0.5)  # the second of its long steps has begun
    interrupt_twice(process, os.kill)
    assert status_of(tmp_path / "run") == "interrupted"


class SignalAt(TrainerCallback):  # type: ignore[misc]
    """A callback that sends SIGTERM during a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class Watching(Alone):
    """A place that keeps the trainer, and lets a signal arrive during a step."""

    def __init__(self, step: int = 0) -> None:
        super().__init__()
        self.step = step

    def join(self, trainer: Any) -> None:
        self.trainer = trainer
        trainer.add_callback(SignalAt(self.step))


EPOCHS = ["tracking=none", *QUICK, "samples.rows=0", "data.max_rows=8", "train.max_steps=-1"]
EPOCHS += ["train.num_train_epochs=3", "train.learning_rate=3e-3"]  # of two steps; the loss falls
# a falling loss counts as bad, so that the second evaluation lowers the rate
PLATEAU = ["train.lr_scheduler_type=reduce_lr_on_plateau"]
PLATEAU += ["+train.lr_scheduler_kwargs={mode: max, patience: 0, factor: 0.1}"]


@pytest.mark.parametrize(
    ("settings", "step"), [(["keep=best"], 6), (["keep=best"], 2), (PLATEAU, 4)], ids=str
)
def test_a_signal_in_the_last_step_of_an_epoch_waits_for_its_evaluation(
    settings: list[str], step: int, tmp_path: Path
) -> None:
    uninterrupted = run(compose(*EPOCHS, *settings), tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(compose(*EPOCHS, *settings), tmp_path / "cut", place=Watching(step))
    cut = run(compose(f"resume={tmp_path / 'cut'}"))
    assert digest(cut.saved) == digest(uninterrupted.saved)
    records = [json.loads((tmp_path / n / "run.json").read_text()) for n in ("whole", "cut")]
    assert records[0]["saved_step"] == records[1]["saved_step"] == 6
    assert records[0]["best"] == records[1]["best"]


def test_a_checkpoint_of_the_last_step_of_an_epoch_holds_its_evaluation(tmp_path: Path) -> None:
    saving = ["train.save_strategy=steps", "train.save_steps=2", "train.save_total_limit=9"]
    uninterrupted = run(compose(*EPOCHS, *PLATEAU, *saving), tmp_path / "whole")
    cut = copied(uninterrupted, tmp_path / "cut")
    shutil.rmtree(cut.directory / "checkpoints/checkpoint-6")
    mark_killed(cut.directory)
    cut = run(compose(f"resume={cut.directory}"))
    assert digest(cut.saved) == digest(uninterrupted.saved)


def test_the_best_weights_are_not_saved_as_those_of_the_last_step(tmp_path: Path) -> None:
    best = ["keep=best", "train.save_strategy=best", "train.eval_strategy=steps"]
    best += ["train.eval_steps=1", "+train.metric_for_best_model=eval_loss"]
    best += ["+train.greater_is_better=true"]  # the loss falls: the first step is the "best"
    place = Watching()
    result = run(compose("tracking=none", *QUICK, *best), tmp_path / "run", place=place)
    place.trainer.ensure_checkpoint()  # as after a signal that arrives now
    checkpoints = [path.name for path in (result.directory / "checkpoints").iterdir()]
    assert checkpoints == ["checkpoint-1"]


def test_outside_training_a_signal_raises_at_once_and_the_old_handlers_are_restored() -> None:
    own_stop = Stop()
    before = signal.getsignal(signal.SIGTERM)
    with own_stop.listening(), pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_during_training_a_signal_waits_for_the_end_of_the_step(
    capfd: pytest.CaptureFixture[str],
) -> None:
    own_stop = Stop()
    with own_stop.listening():
        with own_stop.until_a_step_ends():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)  # a second SIGTERM changes nothing
            time.sleep(0.01)
            assert own_stop.asked
        with pytest.raises(Interrupted):
            own_stop.check()
    assert capfd.readouterr().err.count(MESSAGE) == 1
    assert not stop.asked


def _sleep(running: Event, seconds: float) -> None:
    running.set()
    time.sleep(seconds)


def test_a_forked_process_dies_of_sigterm_and_ignores_ctrl_c() -> None:
    fork = multiprocessing.get_context("fork")
    own_stop = Stop()
    with own_stop.listening(), own_stop.until_a_step_ends():
        for number, code, sleep_s in ((signal.SIGINT, 0, 1), (signal.SIGTERM, -15, 60)):
            running = fork.Event()
            child = fork.Process(target=_sleep, args=(running, sleep_s))
            child.start()
            assert running.wait(60)  # Python forgets signals that arrive while it forks
            os.kill(child.pid or -1, number)
            child.join()
            assert child.exitcode == code
