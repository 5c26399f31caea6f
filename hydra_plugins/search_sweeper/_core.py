"""A search: propose a batch, launch it, write its results, until all trials have ended."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.lockstep_launcher._core import GROUPS
from hydra_plugins.search_sweeper._directory import check_free, keep_rows, locked
from lora_exp.comparison.report import report_sweep
from lora_exp.config.door import hidden
from lora_exp.config.keep import goal_of
from lora_exp.config.overrides import split_override
from lora_exp.config.resume import NOT_SAVED, REPORTS
from lora_exp.config.stopping import measured_metrics
from lora_exp.config.validation import settle
from lora_exp.errors import ConfigError, LoraExpError
from lora_exp.files.redaction import redact
from lora_exp.record.sweep import MULTIRUN
from lora_exp.search.cells import Cells
from lora_exp.search.evidence import read_evidence
from lora_exp.search.journal import JOURNAL, Journal
from lora_exp.search.objectives import check_measured, of_all_tasks, other_values
from lora_exp.search.page import print_batch, print_plan, print_result, print_start
from lora_exp.search.presence import Presence
from lora_exp.search.settings import read_settings
from lora_exp.search.sizes import Sizes
from lora_exp.search.space import Space, read_space
from lora_exp.search.trial import State, Trial
from lora_exp.tracking.search import report_search

log = logging.getLogger(__name__)
Judge = tuple[str | None, str | None]  # an objective's name and its goal
NO_JUDGE: Judge = (None, None)
LOSS: Judge = ("train/loss", "minimize")  # of runs without held-out rows, whatever the config says


def sweep(sweeper: Any, arguments: Sequence[str]) -> list[JobReturn]:
    """Run a search; see `SearchSweeper`."""
    search = _Search(sweeper, arguments)
    try:
        if sweeper.section["dry_run"]:
            search.show()
            return []
        return search.run()
    finally:
        search.sizes.close()


class _Search:
    """What all batches of a search share."""

    def __init__(self, sweeper: Any, arguments: Sequence[str]) -> None:
        self.sweeper, self.master = sweeper, sweeper.config
        self.folder = Path(str(self.master.hydra.sweep.dir))
        self.space = _space(sweeper, arguments)
        self.presence = Presence(self.space, self._compose)
        first = self._compose(self._first_cell().overrides)
        self.judge, self.launched = _judge(first), False
        self.settings = read_settings(sweeper.section, self.space, *self.judge)
        self.sizes = Sizes(self._settled)
        has_model = set(first) >= GROUPS
        self.cells = Cells(self.settings, self.presence, self.sizes if has_model else None)
        self.train: Any = first.get("train") or {}
        self._check_judges(
            (
                " ".join(f"{k}={option}" for k, option in options.items()),
                _judge(self.presence.config(options)),
            )
            for options in self.presence.one_varied()
        )
        if has_model:
            for options in self.presence.one_varied():
                measured = measured_metrics(self.presence.config(options))
                check_measured(map(of_all_tasks, self.settings.objectives), measured)

    @cached_property
    def total(self) -> int:
        """The number of trials."""
        return self.cells.total()

    def show(self) -> None:
        """Print what the search would do."""
        first = self.cells.propose((), self._evidence())[: self.total]
        print_plan(self.cells, self.total, first, self.train)

    def run(self) -> list[JobReturn]:
        """Train all trials that have no result yet.

        Raises:
            ConfigError: the directory holds something else, or whole batches are refused.
            LoraExpError: no trial has a finite objective.
        """
        print_start(self.total, self.cells)  # before there is a directory
        self.folder.mkdir(parents=True, exist_ok=True)
        keeping_workers = getattr(self.sweeper.launcher, "keeping_workers", nullcontext)
        with locked(self.folder), keeping_workers():
            journal = Journal(self.folder / JOURNAL)
            check_free(self.folder, journal)
            evidence = journal.evidence if journal.asked else self._evidence()
            journal.begin(self._asked(), evidence)
            OmegaConf.save(self.master, self.folder / MULTIRUN)
            keep_rows(self.folder)
            results: list[JobReturn] = []
            while numbers := self._next(journal):
                if results:  # the last batch's is written with the search's table
                    report_sweep(self.folder, self.master.get("report"))
                print_batch(numbers, self.total, journal.trials, self.settings.directions)
                results += self._launch(journal, numbers)
            self._conclude(journal)
        return results

    def _next(self, journal: Journal) -> range:
        """Return the numbers of the next batch: one that has not ended, or a new one."""
        waiting = [number for number in journal.waiting if number < self.total]
        if not waiting and len(journal.trials) < self.total:
            if batch := self.cells.propose(journal.trials, journal.evidence):
                journal.propose(batch)  # all of it, so that raising `trials` gives the same trials
            else:
                log.warning("the search ends: no other cell that meets its limits was found")
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
        for record in records:
            if record.get("status") == "finished":
                check_measured([*self.settings.objectives][1:], record["metrics"])
        ended = [self._ended(*parts) for parts in zip(trials, results, records, strict=True)]
        for number, trial in zip(numbers, ended, strict=True):
            if journal.trials[number].state == "asked":
                journal.end(number, trial)
        maximize = self.settings.direction == "maximize"
        report_search(self.master, self.folder, journal.trials, numbers, maximize)
        return results

    def _ended(self, trial: Trial, result: JobReturn, record: dict[str, Any]) -> Trial:
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
        size = partial(self.cells.size, trial.values)
        others = other_values(self.settings.objectives, record, size)
        return trial.ended(state, value, record.get("steps") or 0, others)

    def _conclude(self, journal: Journal) -> None:
        trials = journal.trials[: self.total]
        if not _any_complete(journal):
            text = f"none of {len(trials)} trials has ended with a finite objective"
            raise LoraExpError(f"{text}; {self.folder}/summary.csv has their errors")
        alone = [*_flags(self.master.hydra), *self.space.common]
        print_result(trials, self.settings, self.judge[0] or "objective", alone)

    def _compose(self, overrides: list[str]) -> DictConfig:
        loader = self.sweeper.hydra_context.config_loader
        compose = getattr(loader, "job", loader.load_sweep_config)  # ours keeps what is validated
        config: DictConfig = compose(self.master, [*self.space.common, *overrides])
        return config

    def _settled(self, values: Mapping[str, str]) -> DictConfig:
        """Return the config of a cell as its job settles it."""
        config = self._compose(Trial(values).overrides)
        choices: Any = OmegaConf.to_container(config.hydra.runtime.choices)
        overrides = list(config.hydra.overrides.task)
        with hidden(config, "hydra") as own:
            return settle(own, choices, overrides)

    def _first_cell(self) -> Trial:
        return Trial(self.presence.present({d.key: d.at(0) for d in self.space.dimensions}))

    def _evidence(self) -> list[Trial]:
        return read_evidence(self.settings, self.presence, self.cells.size, self.judge[0])

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
        values = {key: getattr(settings, key) for key in section} | settings.limits.asked
        if settings.objectives:  # journals of one have no such key
            values["objectives"] = dict(settings.objectives)
        asked = {f"hydra.sweeper.{key}": value for key, value in values.items()}
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
        goal = goal_of(str(objective)) or goal  # as `settled_values` does
    return objective, goal


def _any_complete(journal: Journal) -> bool:
    return any(trial.state == "complete" for trial in journal.trials)


def _record(result: JobReturn) -> dict[str, Any]:
    """Return the run.json of a job; empty: it has none."""
    assert result.hydra_cfg is not None
    path = Path(str(result.hydra_cfg.hydra.runtime.output_dir)) / "run.json"
    record: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return record


def _flags(hydra: DictConfig) -> list[str]:
    """Return what a single run needs beside the overrides: the command line's own options."""
    paths = [s.path for s in hydra.runtime.config_sources if s.provider == "command-line"]
    flags = [word for path in paths for word in ("--config-dir", path)]
    if hydra.job.config_name != "config":
        flags += ["--config-name", hydra.job.config_name]
    is_presets = "hydra.mode=MULTIRUN" not in hydra.overrides.hydra  # not the flag -m
    return [*flags, "hydra.mode=RUN"] if is_presets else flags
