"""SIGTERM and Ctrl-C: a run saves at its next step, says how to go on, and loses nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from lora_exp.errors import Interrupted
from lora_exp.training.interruption import SAID, Stop, stop
from tests.conftest import QUICK
from tests.test_experiment import digest
from tests.test_main import cli

RUN = ["tracking=none", *QUICK, "train.max_steps=40", "train.save_strategy=no"]
RUN += ["train.logging_steps=1", "train.per_device_train_batch_size=2", "peft.lora_dropout=0.1"]
RUN += ["train.eval_strategy=no", "samples.rows=0"]
RUN += ["hydra.run.dir=run"]


def started(folder: Path, *command: str) -> subprocess.Popen[str]:
    """Start a run that hears Ctrl-C, which a shell's background jobs do not."""
    return subprocess.Popen(
        [sys.executable, "-m", "lora_exp", *command], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.is_file() else 0


def wait_for(process: subprocess.Popen[str], reached: object) -> None:
    while not reached():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def status(directory: Path) -> str:
    return str(json.loads((directory / "run.json").read_text())["status"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The adapters of runs that nothing interrupts, by accumulation."""
    made = {}
    for accumulation in ("1", "4"):
        folder = tmp_path_factory.mktemp("undisturbed")
        done = cli(*RUN, f"train.gradient_accumulation_steps={accumulation}", cwd=folder)
        assert done.returncode == 0, done.stderr
        made[accumulation] = digest(folder / "run/adapter")
    return made


@pytest.mark.parametrize(
    ("number", "accumulation"),
    [(signal.SIGTERM, "1"), (signal.SIGTERM, "4"), (signal.SIGINT, "1")],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    number: int,
    accumulation: str,
    undisturbed: dict[str, dict[str, str]],
    tmp_path: Path,
) -> None:
    process = started(tmp_path, *RUN, f"train.gradient_accumulation_steps={accumulation}")
    wait_for(process, lambda: lines(tmp_path / "run/metrics.jsonl") >= 5)
    os.kill(process.pid, number)
    said = process.communicate()[1]
    assert process.returncode == 75, said
    assert SAID in said
    assert f"resume={tmp_path}/run goes on" in said
    assert "Traceback" not in said
    assert status(tmp_path / "run") == "interrupted"
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    assert 3 <= int(checkpoint.name.removeprefix("checkpoint-")) < 40
    done = cli("resume=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "run/adapter") == undisturbed[accumulation]


def test_before_training_it_stops_at_once_and_begins_anew(
    undisturbed: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    process = started(tmp_path, *RUN)
    wait_for(process, (tmp_path / "run/run.json").is_file)
    os.kill(process.pid, signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 75, said
    assert status(tmp_path / "run") == "interrupted"
    done = cli("resume=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "run/adapter") == undisturbed["1"]


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a b c d"}\n' * 30000)
    long = ["data=jsonl", "data.path=rows.jsonl", "data.eval_share=0", "algorithm=pretrain"]
    long += ["train.per_device_train_batch_size=128", "data.max_rows=null"]
    process = started(tmp_path, *RUN, *long, "train.gradient_accumulation_steps=100")
    wait_for(process, lambda: lines(tmp_path / "run/metrics.jsonl") >= 1)
    time.sleep(0.5)  # in the second of its long steps
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert status(tmp_path / "run") == "interrupted"


def test_where_nothing_trains_a_signal_is_heard_at_once_and_the_old_handlers_come_back() -> None:
    own = Stop()
    before = signal.getsignal(signal.SIGTERM)
    with own.listening(), pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_while_something_trains_it_waits_for_the_step(capfd: pytest.CaptureFixture[str]) -> None:
    own = Stop()
    with own.listening():
        with own.until_a_step_ends():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)  # a scheduler's reminder changes nothing
            time.sleep(0.01)
            assert own.asked
        with pytest.raises(Interrupted):
            own.check()
    assert capfd.readouterr().err.count(SAID) == 1
    assert not stop.asked


def _sleep(runs: Event, seconds: float) -> None:
    runs.set()
    time.sleep(seconds)


def test_a_forked_process_dies_of_sigterm_and_leaves_ctrl_c_to_its_parent() -> None:
    fork = multiprocessing.get_context("fork")
    own = Stop()
    with own.listening(), own.until_a_step_ends():
        for number, code, sleep_s in ((signal.SIGINT, 0, 1), (signal.SIGTERM, -15, 60)):
            runs = fork.Event()
            child = fork.Process(target=_sleep, args=(runs, sleep_s))
            child.start()
            assert runs.wait(60)  # Python forgets signals that arrive while it forks
            os.kill(child.pid or -1, number)
            child.join()
            assert child.exitcode == code
