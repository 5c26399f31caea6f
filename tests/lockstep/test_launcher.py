"""Hydra's own contract tests for launchers, and tests of what our launcher adds."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import (
    BatchedSweeperTestSuite,
    IntegrationTestSuite,
    LauncherTestSuite,
)
from hydra.types import HydraContext, RunMode

from hydra_plugins.lockstep_launcher.launcher import LockstepLauncher
from tests.conftest import QUICK
from tests.test_main import cli

# Hydra's tests leave version_base unset, and Hydra warns about that
pytestmark = pytest.mark.filterwarnings("ignore:Future Hydra versions")
STEPS = ["tracking=none", *QUICK, "samples.rows=0", "train.logging_steps=1"]
STEPS += ["train.save_strategy=no"]


FRESH = copy.deepcopy(Singleton.get_state())  # before any test has composed a config


@pytest.fixture(autouse=True)
def _fresh_hydra() -> Iterator[None]:
    """Hydra's suite expects an unset version_base; other tests here set it."""
    before = Singleton.get_state()
    Singleton.set_state(copy.deepcopy(FRESH))
    yield
    Singleton.set_state(before)


@pytest.mark.parametrize(("launcher_name", "overrides"), [("lockstep", [])])
class TestTheContract(LauncherTestSuite):
    """Any task, not only ours, launched as the basic launcher would."""


@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [("lockstep", ["hydra/sweeper=basic", "hydra.sweeper.max_batch_size=2"])],
)
class TestTheContractInBatches(BatchedSweeperTestSuite):
    """A sweeper that launches several times."""


@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [({}, ["-m", "hydra/launcher=lockstep", "hydra/hydra_logging=disabled"])],
)
class TestTheContractInAProcess(IntegrationTestSuite):
    """Scripts of others in processes of their own."""


def test_hydra_finds_the_launcher() -> None:
    assert LockstepLauncher.__name__ in [c.__name__ for c in Plugins.instance().discover(Launcher)]


def read_summary(folder: Path) -> tuple[Path, dict[str, dict[str, Any]]]:
    (sweep,) = (folder / "multirun").glob("*/*")
    jobs = json.loads((sweep / "summary.json").read_text())
    return sweep, {job["job"]: job for job in jobs}


def adapter_hashes(sweep: Path) -> dict[str, str]:
    paths = sorted(sweep.glob("*/adapter/adapter_model.safetensors"))
    return {p.parts[-3]: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def test_the_default_launcher_writes_the_same_files_as_the_basic_one(tmp_path: Path) -> None:
    sweep = ["-m", "peft.r=2,4", "peft=lora,dora", "peft.lora_dropout=0.1", *STEPS]
    sweep += ["samples.rows=4"]
    for name, launcher in (("lockstep", []), ("basic", ["hydra/launcher=basic"])):
        (tmp_path / name).mkdir()
        done = cli(*sweep, *launcher, cwd=tmp_path / name)
        assert done.returncode == 0, done.stderr
    (lockstep, jobs), (basic, basic_jobs) = (
        read_summary(tmp_path / n) for n in ("lockstep", "basic")
    )
    assert adapter_hashes(lockstep) == adapter_hashes(basic)
    assert len(set(adapter_hashes(lockstep).values())) == 4
    metrics = ("eval/loss", "eval/exact_match", "before/loss", "train/loss")
    for n, job in jobs.items():
        assert [job["metrics"][k] for k in metrics] == [
            basic_jobs[n]["metrics"][k] for k in metrics
        ]
        assert job["fingerprint"] == basic_jobs[n]["fingerprint"]
        names = {
            str(p.relative_to(root / n))
            for root in (lockstep, basic)
            for p in (root / n).rglob("*")
            if p.is_file()
        }
        assert all((root / n / name).is_file() for name in names for root in (lockstep, basic))
        logged = (lockstep / n / "run.log").read_text()
        assert "step 3/3" in logged  # and no lines of other jobs
        assert logged.count("  rate ") == 3
        places = {
            root: json.loads((root / n / "run.json").read_text())["place"]
            for root in (lockstep, basic)
        }
        assert places[basic] == "alone"
    places = [json.loads((lockstep / n / "run.json").read_text())["place"] for n in sorted(jobs)]
    assert places == ["lockstep, exact", "alone", "lockstep, exact", "alone"]


def test_the_plan_is_printed_before_anything_is_loaded(tmp_path: Path) -> None:
    done = cli("-m", "peft.r=2,4,0", "peft=lora,pissa", *STEPS, cwd=tmp_path)
    output = " ".join(done.stdout.split())
    assert "0, 2 in lockstep (exact) on pkg://lora_exp/assets/tiny" in output
    assert "1, 3 alone: pissa starts from weights of its own" in output
    assert "4-5 refused, not run" in output
    assert output.count("jobs 4-5: peft.r: 0 is not a rank") == 1
    assert done.returncode == 1


def test_the_launcher_itself_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['run.py', '-m', 'peft.r=2,4', *sys.argv[1:]]\n"
        "from lora_exp.__main__ import main\nmain()\n"
        "assert not {'torch', 'transformers', 'wandb', 'peft', 'ray'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, *STEPS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(adapter_hashes(read_summary(tmp_path)[0])) == 2


def test_jobs_may_have_dataloader_workers(tmp_path: Path) -> None:
    done = cli("-m", "peft.r=2,4", *STEPS, "train.dataloader_num_workers=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_same_sweep_again_trains_only_what_is_missing(tmp_path: Path) -> None:
    command = ["-m", "peft.r=2,4,8", "hydra.sweep.dir=multirun/a/b", *STEPS]
    assert cli(*command, cwd=tmp_path).returncode == 0
    sweep = tmp_path / "multirun/a/b"
    hashes, kept_record = adapter_hashes(sweep), (sweep / "0" / "run.json").read_text()
    record = json.loads((sweep / "1" / "run.json").read_text())
    (sweep / "1" / "run.json").write_text(json.dumps(record | {"status": "running"}))
    (sweep / "1" / "adapter" / "adapter_model.safetensors").unlink()
    done = cli(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0, 2  finished before, not run again" in done.stdout
    assert adapter_hashes(sweep) == hashes
    assert (sweep / "0" / "run.json").read_text() == kept_record
    assert {job["status"] for job in read_summary(tmp_path)[1].values()} == {"finished"}
    done = cli(*command, "seed=7", cwd=tmp_path)
    assert done.returncode == 1
    assert "holds another run" in done.stderr
    assert adapter_hashes(sweep) == hashes


def process_id(_: Any) -> int:
    return os.getpid()


def test_several_launches_may_keep_their_worker(tmp_path: Path) -> None:
    with initialize(version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        arguments = [f"hydra.sweep.dir={tmp_path}", "+a=1", "hydra/launcher=lockstep"]
        config = hydra.config_loader.load_configuration(None, arguments, RunMode.MULTIRUN)
        launcher = LockstepLauncher()
        context = HydraContext(hydra.config_loader, Callbacks())
        launcher.setup(hydra_context=context, task_function=process_id, config=config)

        def launched(number: int) -> Any:
            (result,) = launcher.launch([["+b=1"]], number)
            return result.return_value

        with launcher.keeping_workers():
            first = launched(0)
            assert launched(1) == first != os.getpid()
        assert launched(2) not in (first, os.getpid())
    assert not Path(f"/proc/{first}").exists()
