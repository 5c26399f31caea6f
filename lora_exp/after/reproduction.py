"""Trains a run again from its record, and compares what it leaves byte for byte.

It knows no way to train of its own: the runner gets the config that the run has saved.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_exp import libraries
from lora_exp.after.likeness import Likeness, likeness
from lora_exp.after.saved import jobs, read_json
from lora_exp.config.composition import compose
from lora_exp.config.door import plain
from lora_exp.config.overrides import quoted
from lora_exp.config.processes import THREADS, process_count
from lora_exp.config.resume import LIMITS
from lora_exp.config.settled import fingerprints
from lora_exp.early_stopping.bracket import Bracket, Verdict
from lora_exp.errors import SavedError
from lora_exp.files.paths import SCRATCH, near_names
from lora_exp.record.conditions import condition_changes, conditions
from lora_exp.record.contents import changed_files
from lora_exp.record.sweep import COMMAND

log = logging.getLogger("lora_exp")
ENDED = ("finished", "pruned")
LOGGED = ("train.logging_", "train.eval_")  # keys that may change at a resume
Limits = Mapping[str, Any]  # of the training: max_steps or num_train_epochs


@dataclass(frozen=True)
class Recipe:
    """All that it takes to train a run again."""

    run: Path
    record: Mapping[str, Any]
    cfg: DictConfig  # the run's, as a new run
    limits: Sequence[Limits]  # a finished run that was trained further: the limits, one by one
    reasons: Sequence[str]  # why bits may differ here


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read what a run was trained with, and what is different here and now.

    Args:
        path: a run's directory.
        overrides: what only a command line may say, such as `trusted_targets=[...]`.

    Raises:
        SavedError: there is no run, it has not ended, or its config is not the one that it had.
        ConfigError: its files are gone, or an override would change the result.
    """
    run = _run_at(Path(path).expanduser())
    record = read_json(run / "run.json")
    if record.get("status") not in ENDED:
        text = f"is {record.get('status')}: only a finished or pruned run can be compared"
        raise SavedError(f"{run} {text}; resume={run} goes on")
    resumed = compose(f"resume={quoted(run)}", "tracking=none", *overrides)
    cfg = _as_new(resumed, {})
    if record.get("fingerprint") not in fingerprints(cfg):
        text = "is not the config that the run was trained with: its fingerprint is another one"
        raise SavedError(f"{run / 'config.yaml'} {text}")
    return Recipe(run, record, cfg, _limits(record), [*_reasons(run, record, cfg)])


def reproduce(recipe: Recipe, out: Path | None = None) -> tuple[Likeness, Path | None]:
    """Train a run again, alone and with its number of threads, and compare.

    Args:
        recipe: the run's.
        out: the folder to train in; None: a temporary one, which is left only if something differs.

    Returns:
        How alike they are, and the folder, if it is left.

    Raises:
        LoraExpError: it cannot be trained; what the run itself raises.
    """
    with new_folder(out) as folder, _as_recorded(recipe):
        _train(recipe, folder)
        result = likeness(recipe.run, folder)
        return result, kept_folder(folder, out, result.same)


def _train(recipe: Recipe, folder: Path) -> None:
    libraries.load()
    from lora_exp.experiment import run
    from lora_exp.training.place import Alone

    record = recipe.record
    day = date.fromisoformat(record["date"]) if record.get("date") else None
    for number, limits in enumerate(recipe.limits):
        is_last = number == len(recipe.limits) - 1
        rungs = record.get("rungs") or () if is_last else ()
        bracket = Replayed(rungs, record.get("stopped")) if rungs else None
        cfg = _as_new(recipe.cfg, limits, folder if number else None)
        run(cfg, folder, place=Alone(0, bracket, recalls=False), day=day)


class Replayed(Bracket):
    """The verdicts that a run's record has, without the jobs that it was compared with."""

    def __init__(self, rungs: Sequence[Mapping[str, Any]], stopped: Mapping[str, Any] | None):
        """Take `rungs` and `stopped` of a record."""
        self._rungs = {rung["rung"]: rung for rung in rungs}
        self._end = (stopped or {}).get("step")

    def report(self, job: int, rung: int, value: float | None) -> None:
        """Take nothing: the verdicts are known."""

    def verdict(self, job: int, rung: int) -> Verdict:
        """Return how the run compared then."""
        recorded = self._rungs.get(rung, {})
        survives = recorded.get("step") is None or recorded["step"] != self._end
        return Verdict(survives, recorded.get("rank", 0), recorded.get("of", 0))


def _run_at(folder: Path) -> Path:
    if not folder.exists():
        raise SavedError(f"{folder} does not exist{near_names(folder)}")
    if folder.name in ("adapter", "model") and (folder.parent / "run.json").is_file():
        return folder.parent
    if all((folder / name).is_file() for name in ("run.json", "config.yaml")):
        return folder
    if several := jobs(folder):
        text = f"without {COMMAND}, by which it was launched"
        text += f"; give one of its {len(several)} jobs: {several[0]}"
        raise SavedError(f"{folder} is a sweep {text}")
    raise SavedError(f"{folder} is no run: it has no run.json and config.yaml")


def _as_new(cfg: DictConfig, limits: Limits, resume: Path | None = None) -> DictConfig:
    """Return a saved config as that of a new run, or of one that goes on with higher limits."""
    values = plain(cfg)
    values["train"] |= limits
    values["resume"] = str(resume) if resume else None
    new: DictConfig = OmegaConf.create(values)
    OmegaConf.set_struct(new, True)
    OmegaConf.set_readonly(new, True)
    return new


def _limits(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the limits that a run was trained to, one after the other; {}: the config's."""
    stages: list[dict[str, Any]] = [{}]
    for resume in reversed(record.get("resumed") or ()):
        raised = {
            key.rpartition(".")[2]: pair[0]
            for key, pair in resume["changes"].items()
            if key in LIMITS
        }
        if raised and resume["status"] == "finished":
            stages.insert(0, stages[0] | raised)
    return stages


def _reasons(run: Path, record: Mapping[str, Any], cfg: DictConfig) -> Iterator[str]:
    """Yield why a training here and now may give other bits."""
    for name in changed_files(run, cfg):
        yield f"{name} has changed since"
    # the number of threads is that of the run, whatever this process has
    now = conditions(bool(record.get("batch_invariant"))) | {"threads": record.get("threads")}
    yield from condition_changes(record, now)
    if "bmm" in str(record.get("place")):
        yield "it was trained with lockstep.mode=bmm, which is about 1e-6 off runs alone"
    if (record.get("lockstep") or {}).get("proven") is False:
        yield "it is not proven equal to a run alone: passes of its pack differed"
    for resume in record.get("resumed") or ():
        if resume["status"] != "finished" and set(LIMITS) & resume["changes"].keys():
            yield "its training was made longer before it had ended; it is trained in one go here"
        if keys := [key for key in resume["changes"] if key.startswith(LOGGED)]:
            yield f"{', '.join(keys)} changed at a resume: before it, other steps were logged"


@contextmanager
def new_folder(out: Path | None, beside: Path | None = None) -> Iterator[Path]:
    """Yield the folder to train in; a temporary one is deleted if the training fails.

    Args:
        out: the folder; None: a temporary one.
        beside: where that one is made; None: where the system has such folders.
    """
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise SavedError(f"{out} exists and is not empty; give the name of a new folder")
        yield out
        return
    folder = beside.parent if beside else None
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder))
    try:
        yield scratch / "run"
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def kept_folder(folder: Path, out: Path | None, same: bool) -> Path | None:
    """Return the folder that was trained in; a temporary one is deleted if all is the same."""
    if out is None and same:
        shutil.rmtree(folder.parent)
        return None
    return folder


@contextmanager
def _as_recorded(recipe: Recipe) -> Iterator[None]:
    """Compute with the number of threads that the run had, since sums depend on it.

    The processes of a run in several read theirs, and that no cache is evidence, from variables.
    """
    import torch

    before, count = torch.get_num_threads(), recipe.record.get("threads")
    torch.set_num_threads(count or before)
    variables = dict(os.environ)
    if process_count(recipe.cfg) > 1:
        os.environ |= {"LORA_EXP_CACHE": ""} | ({THREADS: str(count)} if count else {})
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.environ.clear()
        os.environ |= variables
