"""A search: propose a batch, launch it, write its results, until all trials have ended."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from lora_exp.comparison.report import report_sweep
from lora_exp.config.keep import goal_of
from lora_exp.config.overrides import split_override
from lora_exp.config.resume import NOT_SAVED, REPORTS
from lora_exp.errors import ConfigError, LoraExpError
from lora_exp.files.lock import hold
from lora_exp.files.redaction import redact
from lora_exp.record.sweep import MULTIRUN, SUMMARY, SweepTable
from lora_exp.search.evidence import read_evidence
from lora_exp.search.journal import JOURNAL, Journal
from lora_exp.search.page import print_batch, print_plan, print_result
from lora_exp.search.presence import Presence
from lora_exp.search.settings import TRIALS, read_settings
from lora_exp.search.space import Space, read_space
from lora_exp.search.study import distinct, propose
from lora_exp.search.trial import State, Trial

LOCK = ".search.lock"
Judge = tuple[str | None, str | None]  # an objective's name and its goal
NO_JUDGE: Judge = (None, None)
LOSS: Judge = ("train/loss", "minimize")  # of runs without held-out rows, whatever the config says


def sweep(sweeper: Any, arguments: Sequence[str]) -> list[JobReturn]:
    """Run a search; see `SearchSweeper`."""
    search = _Search(sweeper, arguments)
    if sweeper.section["dry_run"]:
        search.show()
        return []
    return search.run()


class _Search:
    """What all batches of a search share."""

    def __init__(self, sweeper: Any, arguments: Sequence[str]) -> None:
        self.sweeper, self.master = sweeper, sweeper.config
        self.folder = Path(str(self.master.hydra.sweep.dir))
        self.space = _space(sweeper, arguments)
        self.presence = Presence(self.space, self._compose)
        first = self._compose(self._first_cell().overrides)
        self.judge, self.launched = _judge(first), False
        self.settings = read_settings(sweeper.section, self.space, self.judge[1])
        self.train: Any = first.get("train") or {}
        self._check_judges(
            (
                " ".join(f"{k}={option}" for k, option in options.items()),
                _judge(self.presence.config(options)),
            )
            for options in self.presence.one_varied()
        )
        self.total = self._total()

    def show(self) -> None:
        """Print what the search would do."""
        first = propose(self.settings, self.presence, (), self._evidence())[: self.total]
        print_plan(self.space, self.settings, self.total, first, self.train)

    def run(self) -> list[JobReturn]:
        """Train all trials that have no result yet.

        Raises:
            ConfigError: the directory holds something else, or whole batches are refused.
            LoraExpError: no trial has a finite objective.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder):
            journal = Journal(self.folder / JOURNAL)
            _check_free(self.folder, journal)
            evidence = journal.evidence if journal.asked else self._evidence()
            journal.begin(self._asked(), evidence)
            OmegaConf.save(self.master, self.folder / MULTIRUN)
            _keep_rows(self.folder)
            results: list[JobReturn] = []
            while numbers := self._next(journal):
                if results:  # the last batch's is written with the search's table
                    report_sweep(self.folder, self.master.get("report"))
                print_batch(numbers, self.total, journal.trials, self.settings.direction)
                results += self._launch(journal, numbers)
            self._conclude(journal)
        return results

    def _next(self, journal: Journal) -> range:
        """Return the numbers of the next batch: one that has not ended, or a new one."""
        waiting = [number for number in journal.waiting if number < self.total]
        if not waiting and len(journal.trials) < self.total:
            batch = propose(self.settings, self.presence, journal.trials, journal.evidence)
            journal.propose(batch)  # all of it, so that raising `trials` gives the same trials
            waiting = journal.waiting
        if not waiting:
            return range(0)
        size = self.settings.batch
        first = waiting[0] // size * size
        return range(first, min(first + size, self.total))

    def _launch(self, journal: Journal, numbers: range) -> list[JobReturn]:
        """Launch a batch, of which trials may have ended before, and write the results."""
        trials = [journal.trials[number] for number in numbers]
        overrides = [[*self.space.common, *trial.overrides] for trial in trials]
        results = list(self.sweeper.launcher.launch(overrides, initial_job_idx=numbers[0]))
        errors = [result._return_value for result in results]
        if all(isinstance(error, ConfigError) for error in errors) and not _any_complete(journal):
            raise errors[0]
        records = [_record(result) for result in results]
        judges = [(record.get("objective"), record.get("goal")) for record in records]
        if not self.launched and self.judge[1] == LOSS[1] and {*judges} - {NO_JUDGE} == {LOSS}:
            self.judge = LOSS  # there are no held-out rows
        self.launched = True
        self._check_judges(zip((f"trial {number}" for number in numbers), judges, strict=True))
        ended = [_ended(*parts) for parts in zip(trials, results, records, strict=True)]
        for number, trial in zip(numbers, ended, strict=True):
            if journal.trials[number].state == "asked":
                journal.end(number, trial)
        return results

    def _conclude(self, journal: Journal) -> None:
        trials = journal.trials[: self.total]
        if not _any_complete(journal):
            text = f"none of {len(trials)} trials has ended with a finite objective"
            raise LoraExpError(f"{text}; {self.folder}/summary.csv has their errors")
        alone = [*_flags(self.master.hydra), *self.space.common]
        print_result(trials, self.settings.direction, self.judge[0] or "objective", alone)

    def _compose(self, overrides: list[str]) -> DictConfig:
        loader = self.sweeper.hydra_context.config_loader
        config: DictConfig = loader.load_sweep_config(self.master, [*self.space.common, *overrides])
        return config

    def _first_cell(self) -> Trial:
        return Trial(self.presence.present({d.key: d.at(0) for d in self.space.dimensions}))

    def _total(self) -> int:
        """Return the number of trials: those asked for, or the cells if these are fewer."""
        is_grid = self.settings.sampler == "grid"
        limit = self.settings.trials or (None if is_grid else TRIALS)
        cells = distinct(self.presence, limit)
        if cells is not None:
            return len(cells)
        assert limit is not None
        return limit

    def _evidence(self) -> list[Trial]:
        return read_evidence(self.settings, self.presence, self.judge[0])

    def _asked(self) -> dict[str, Any]:
        """Return what the proposals and their results depend on."""
        settings = self.settings
        pairs = map(split_override, redact(self.space.common))
        common = {
            key: value
            for key, value in pairs
            if not NOT_SAVED.match(key)
            # what a search learns from depends on where its trials stop
            and (key.startswith("early_stopping") or not REPORTS.match(key))
        }
        section = ("sampler", "seed", "batch", "direction", "start", "learn_from")
        asked = {f"hydra.sweeper.{key}": getattr(settings, key) for key in section}
        return asked | {d.key: d.asked for d in self.space.dimensions} | common

    def _check_judges(self, judges: Iterable[tuple[str, Judge]]) -> None:
        """Refuse trials that cannot be compared.

        Args:
            judges: names of options or trials, and how those are judged.

        Raises:
            ConfigError: one is judged by another objective than the search, or another goal.
        """
        objective, goal = self.judge
        text = f"the search by {objective} ({goal}); one search compares one objective: give"
        faults = [
            (name, f"is judged by {judge[0]} ({judge[1]}), {text} objective=... goal=...")
            for name, judge in judges
            if judge not in (self.judge, NO_JUDGE)
        ]
        if faults:
            raise ConfigError(faults)


def _space(sweeper: Any, arguments: Sequence[str]) -> Space:
    """Return the space of the command line and of a preset's `hydra.sweeper.params`."""
    loader = sweeper.hydra_context.config_loader
    params = sweeper.section["params"] or {}
    texts = [*(f"{key}={value}" for key, value in params.items()), *arguments]
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(texts)
    swept = [o for o in overrides if o.is_sweep_override()]
    if secret := [o for o in swept if redact([o.input_line]) != [o.input_line]]:
        text = "is a secret, and a search saves its values; export it instead"
        raise ConfigError((o.get_key_element(), text) for o in secret)
    return read_space(
        overrides, {o.key_or_group: bool(loader.get_group_options(o.key_or_group)) for o in swept}
    )


def _judge(config: DictConfig) -> Judge:
    """Return the objective's name and the goal of a config; None: the task has none."""
    objective, goal = OmegaConf.select(config, "objective"), OmegaConf.select(config, "goal")
    if objective is not None and OmegaConf.is_interpolation(config, "goal"):
        goal = goal_of(str(objective)) or goal  # as `settle` does
    return objective, goal


def _any_complete(journal: Journal) -> bool:
    return any(trial.state == "complete" for trial in journal.trials)


def _record(result: JobReturn) -> dict[str, Any]:
    """Return the run.json of a job; empty: it has none."""
    assert result.hydra_cfg is not None
    path = Path(str(result.hydra_cfg.hydra.runtime.output_dir)) / "run.json"
    record: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return record


def _ended(trial: Trial, result: JobReturn, record: dict[str, Any]) -> Trial:
    """Return a trial with the result of its job.

    Raises:
        LoraExpError: the job returned no number.
    """
    if result.status != JobStatus.COMPLETED:
        return trial.ended("failed", None)
    value = result.return_value
    if not isinstance(value, int | float):
        raise LoraExpError(f"a search needs jobs that return their objective, not {value!r}")
    state: State = "pruned" if record.get("status") == "pruned" else "complete"
    return trial.ended(state, value, record.get("steps") or 0)


def _flags(hydra: DictConfig) -> list[str]:
    """Return what a single run needs beside the overrides: the command line's own options."""
    paths = [s.path for s in hydra.runtime.config_sources if s.provider == "command-line"]
    flags = [word for path in paths for word in ("--config-dir", path)]
    if hydra.job.config_name != "config":
        flags += ["--config-name", hydra.job.config_name]
    is_presets = "hydra.mode=MULTIRUN" not in hydra.overrides.hydra  # not the flag -m
    return [*flags, "hydra.mode=RUN"] if is_presets else flags


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a search's directory between its launches, too.

    Raises:
        ConfigError: another process searches there.
    """
    try:
        lock = hold(folder / LOCK)
    except Timeout as error:
        text = f"another process searches in {folder}; wait for it, or take another directory"
        raise ConfigError([("hydra.sweep.dir", text)]) from error
    try:
        yield
    finally:
        lock.release()


def _check_free(folder: Path, journal: Journal) -> None:
    """Refuse the directory of a sweep that is no search."""
    if not journal.asked and (folder / SUMMARY).is_file():
        text = f"{folder} holds a sweep that was no search; take another directory"
        raise ConfigError([("hydra.sweep.dir", text)])


def _keep_rows(folder: Path) -> None:
    """Begin the table of a resumed search with the jobs of its earlier launches."""
    table, path = SweepTable.current, folder / SUMMARY
    if table is not None and path.is_file():
        rows = json.loads(path.read_text("utf-8"))
        table.rows = [row | {"directory": str((folder / row["job"]).absolute())} for row in rows]
