"""Work on a cluster: what travels is a command and a file on a shared disk, never an object."""

from __future__ import annotations

import itertools
import json
import logging
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.utils import JobReturn
from omegaconf import DictConfig
from rich.text import Text

from lora_exp.config.door import CONF
from lora_exp.errors import ConfigError, Interrupted, LoraExpError, Paused
from lora_exp.files.redaction import redact
from lora_exp.files.whole import write_whole
from lora_exp.lockstep.brackets import bracket_values
from lora_exp.lockstep.engine import Engine, State
from lora_exp.lockstep.events import EventReader
from lora_exp.lockstep.job import failed, returned
from lora_exp.lockstep.plan import Job, ranges
from lora_exp.lockstep.work import Work
from lora_exp.lockstep.workers import DiedError, Launch
from lora_exp.record.console import console
from lora_exp.record.standing import how_ended, rung_reports
from lora_exp.training.interruption import stop
from lora_exp.training.manifest import checkpoints_by_step

log = logging.getLogger(__name__)
PROGRAM = "hydra_plugins.lockstep_launcher"
LOOK_S, ASK_S = 1.0, 10.0  # between looks at the files, and questions to the engine at most
FILES_PER_S = 500  # looked at, at most: a shared disk serves others, too
VISIBLE_S = 90.0  # a network file system may show an old record for this long
GONE = State(False, "is gone")


class Share:
    """Work that one submission does, sent again if that ends before its jobs do."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.left = {job.number: job for job in work.jobs}  # not ended, nor paused
        self.id, self.state = "", State(True, "")  # of the submission
        self.events = EventReader(Path())
        self.in_vain, self.reached = 0, self.progress()  # times in a row, and the progress so far
        self.waits_since = 0.0  # for a record to be visible
        self.begun, self.saved = set[int](), set[int]()  # of those left; these were asked to stop
        self.is_over = False

    @property
    def text(self) -> str:
        """What is said of its state: an engine calls the exit code 75 a failure."""
        has_saved = not self.state.in_queue and self.begun and not self.begun - self.saved
        return f"{self.state.text}: its jobs have saved" if has_saved else self.state.text

    def progress(self) -> tuple[int, int]:
        """Return a measure of what is saved: the jobs that have ended, then checkpoints' steps."""
        folders = (job.directory / "checkpoints" for job in self.left.values())
        return -len(self.left), sum(max(checkpoints_by_step(f), default=0) for f in folders)


class Cluster:
    """A launch's submissions to an engine, used like `Workers`."""

    shares_memory: ClassVar[bool] = False  # each has what it has asked for

    def __init__(self, engine: Engine, folder: Path, count: int | None) -> None:
        """Create it; nothing is submitted.

        Args:
            engine: that carries out shares.
            folder: the sweep's, on a disk that all nodes share.
            count: shares among which work is dealt; None: one for each pack or job alone.
        """
        self.engine, self.folder, self.count = engine, folder / engine.name, count
        self._active: list[Share] = []
        self._is_free, self._numbers = False, itertools.count()  # of folders

    def run(self, work: Iterable[Work], launch: Launch) -> None:
        """Submit work and pass on events, until all of it is done.

        Raises:
            ConfigError: the engine refuses, or a value is a secret.
            DiedError: submissions ended again and again before their jobs did.
        """
        shares = [Share(part) for part in work]
        self._check_secrets(shares)
        self._end_earlier()
        stop.forward = lambda: None  # `_ask` sees that a signal has asked to stop
        lost: list[Share] = []
        try:
            self._active, asked, every = shares, time.monotonic(), LOOK_S
            self._submit(shares)
            while self._active:
                time.sleep(max(LOOK_S, len(self._active) / FILES_PER_S))
                if time.monotonic() - asked >= every:
                    has_news = self._ask(launch, lost)
                    asked, every = time.monotonic(), LOOK_S if has_news else min(2 * every, ASK_S)
                for share in self._active:
                    self._hear(share, launch)
                self._active = [s for s in self._active if s.left and not s.is_over]
        finally:
            stop.forward = None
        if lost:
            raise DiedError([(self._end_of(share), share.left) for share in lost])

    def replace(self) -> None:
        """Start nothing: each share is a new submission."""

    def stop(self, at_once: bool = False) -> None:
        """End what has not ended, and wait for that, a minute at most; leave the cluster."""
        active, until = [share.id for share in self._active if share.id], time.monotonic() + 60
        self._active = []
        with suppress(LoraExpError):
            self.engine.stop(active, at_once=True)
            while active and time.monotonic() < until:
                states = self.engine.states()
                if not any(states.get(each, GONE).in_queue for each in active):
                    break
                time.sleep(LOOK_S)
        self.engine.close()

    def _submit(self, shares: Sequence[Share]) -> None:
        """Write the shares' files, and submit them."""
        command = [sys.executable, "-u", "-m", PROGRAM]
        launch = _launch_values(next(iter(shares[0].left.values())))
        for first in range(0, len(shares), self.engine.limit):
            part = shares[first : first + self.engine.limit]
            folder = next(f for n in self._numbers if not (f := self.folder / str(n)).exists())
            folder.mkdir(parents=True)
            for number, share in enumerate(part):
                text = json.dumps(launch | _share_values(share), indent=1)
                write_whole(folder / f"{number}.json", text + "\n")
                share.events = EventReader(folder / f"{number}.jsonl")
            ids = self.engine.submit(command, folder, len(part))
            for each, share in zip(ids, part, strict=True):
                share.id, share.state, share.begun = each, State(True, ""), set()
                _print(f"{self._name(share)}: {_jobs(share)}")

    def _ask(self, launch: Launch, lost: list[Share]) -> bool:
        """Send what ended too early again; return whether a state has changed."""
        has_news = False
        try:
            states = self.engine.states()
        except LoraExpError as error:
            log.warning("%s; asked again", error)
            return False
        if stop.asked:  # again and again: one may only begin now
            self.engine.stop(share.id for share in self._active)
        for share in self._active:
            state, jobs = states.get(share.id, GONE), _jobs(share)
            if not state.in_queue:
                self._hear(share, launch)
            if state != share.state:
                share.state, has_news = state, True
                _print(f"{self._name(share)} ({jobs}): {share.text}")
            if share.left and not (state.in_queue or share.waits_since):
                self._ended(share, launch, lost)
        return has_news

    def _ended(self, share: Share, launch: Launch, lost: list[Share]) -> None:
        """Send what is left of a share again, unless that was in vain too often."""
        if stop.asked:
            share.is_over = True
            for number, job in share.left.items():
                if how_ended(job.directory)[0] == "interrupted":
                    launch.ended(number, failed(job.config, Interrupted()))
            return
        progress = share.progress()
        share.in_vain = 0 if progress > share.reached else share.in_vain + 1
        share.reached = progress
        if share.in_vain > self.engine.retries:
            share.is_over = True
            lost.append(share)
            return
        _print(f"{self._name(share)} has ended before {_jobs(share)}: sent again")
        try:
            self._submit([share])
        except ConfigError as error:  # then this was in vain, too
            log.warning("%s", error)

    def _hear(self, share: Share, launch: Launch) -> None:
        for kind, *values in share.events:
            if kind == "began" and values[0] in share.left:  # Slurm may begin it again by itself
                share.begun.add(values[0])
                share.saved.discard(values[0])
            if kind == "ended" and not self._take_end(share, launch, *values):
                return
            if kind == "unproven" or (kind == "began" and values[0] in share.left):
                getattr(launch, kind)(*values)

    def _take_end(
        self, share: Share, launch: Launch, number: int, how: str, error: str, value: Any,
        recorded: str, rungs: int = 0,
    ) -> bool:  # fmt: skip
        """Take the end of a job; return False if its record is not visible here yet."""
        job = share.left.get(number)
        if job is None:
            return True
        if how == "interrupted":  # it will be sent again
            share.saved.add(number)
            return True
        present = how_ended(job.directory)[0], len(rung_reports(job.directory))
        if present != (recorded, rungs):
            share.waits_since = share.waits_since or time.monotonic()
            if time.monotonic() - share.waits_since < VISIBLE_S:
                return False
        share.waits_since = 0.0
        del share.left[number]
        share.begun.discard(number)
        _print(f"job {number}: {recorded or how}{f': {error}' if how == 'failed' else ''}")
        launch.ended(number, _result(job.config, how, error, value))
        return True

    def _end_earlier(self) -> None:
        """End what an earlier launch has submitted, if its launcher was killed; it saves."""
        if self._is_free:
            return
        self._is_free = True
        while left := self.engine.earlier(self.folder):
            _print(f"{self.engine.unit}s {', '.join(left)} of an earlier launch save and end first")
            self.engine.stop(left)
            time.sleep(ASK_S)

    def _end_of(self, share: Share) -> str:
        logs = share.events.path.parent
        return f"{self._name(share)} (logs in {logs}) ended before its jobs: {share.text}"

    def _name(self, share: Share) -> str:
        return f"{self.engine.unit} {share.id}"

    def _check_secrets(self, shares: Iterable[Share]) -> None:
        """Refuse overrides that must not be written to a file."""
        jobs = [job for share in shares for job in share.left.values()]
        overrides = [override for job in jobs for override in job.overrides]
        overrides += [*jobs[0].config.hydra.overrides.hydra]
        for override, shown in zip(overrides, redact(overrides), strict=True):
            if override != shown:
                text = "is a secret, and a share is a file; export it instead"
                raise ConfigError([(override.partition("=")[0], text)])


def _launch_values(job: Job) -> dict[str, Any]:
    """Return what the files of all shares of a launch hold, from any of its jobs.

    With it the command that carries out a share composes the jobs again.
    """
    hydra: Any = job.config.hydra
    sources = [(source.provider, source.path) for source in hydra.runtime.config_sources]
    return {
        "conf": next((path for provider, path in sources if provider == "main"), str(CONF)),
        "config_dirs": [path for provider, path in sources if provider == "command-line"],
        "config_name": hydra.job.config_name,
        "overrides": list(hydra.overrides.hydra),
        "exclude_keys": list(hydra.job.config.override_dirname.exclude_keys),
    }


def _share_values(share: Share) -> dict[str, Any]:
    """Return what the file of one share holds of its own."""
    names = dict(zip((job.number for job in share.work.jobs), share.work.names, strict=False))
    return {
        "jobs": {n: list(job.overrides) for n, job in share.left.items()},
        "sweep_dirs": {n: job.sweep_dir for n, job in share.left.items()},
        "names": {n: names[n] for n in share.left if n in names},
        "apart": share.work.mode is None,
        "brackets": bracket_values(share.work.brackets),
    }


def _result(config: DictConfig, how: str, error: str, value: Any) -> JobReturn:
    if how == "paused":
        return failed(config, Paused(error))
    return failed(config, LoraExpError(error)) if how == "failed" else returned(config, value)


def _jobs(share: Share) -> str:
    numbers = sorted(share.left)
    return f"job{'s' * (len(numbers) > 1)} {ranges(numbers)}"


def _print(line: str) -> None:
    console.print(Text(line))
