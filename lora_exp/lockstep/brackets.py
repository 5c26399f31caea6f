"""Which jobs of a sweep are compared with each other, and what their records hold of it.

Needs no torch: the launcher reads records, and a worker judges.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lora_exp.config.door import build
from lora_exp.config.resume import acting_limit
from lora_exp.early_stopping.bracket import Bracket
from lora_exp.early_stopping.rules import Comparing
from lora_exp.early_stopping.rungs import reported_value, rung_steps
from lora_exp.lockstep.plan import Job
from lora_exp.record.contents import changed_files
from lora_exp.record.standing import FAILED, how_ended, rung_reports, training_limits


def brackets(jobs: Iterable[Job], failed: Mapping[int, bool]) -> dict[int, Bracket]:
    """Return each job's bracket: the jobs with the same rule, objective, goal and algorithm.

    Args:
        jobs: of a launch; those that are refused or have no such rule are in no bracket.
        failed: of the jobs that have ended, whether they failed.
    """
    groups: dict[str, list[Job]] = {}
    compares: dict[str, bool] = {}  # by a rule's settings
    for job in jobs:
        cfg = job.values
        if cfg is None or cfg.early_stopping is None:
            continue
        rule = json.dumps(cfg.early_stopping)
        if rule not in compares:
            compares[rule] = isinstance(build(job.settled, "early_stopping"), Comparing)  # type: ignore[arg-type]
        if compares[rule]:
            # losses of two algorithms differ in scale
            judged = [cfg.objective, cfg.goal, cfg.choices.get("algorithm")]
            groups.setdefault(json.dumps([rule, *judged]), []).append(job)
    by_job: dict[int, Bracket] = {}
    for group in groups.values():
        by_job |= dict.fromkeys((job.number for job in group), _bracket(group, failed))
    return by_job


def earlier_jobs(folder: Path, first: int) -> list[Job]:
    """Return the jobs of a sweep's earlier launches, if it launches its jobs in several batches.

    Args:
        folder: the sweep's.
        first: the lowest number of this launch's jobs.
    """
    jobs = []
    for number, directory in ((n, folder / str(n)) for n in range(first)):
        if (directory / "run.json").is_file():
            config = OmegaConf.load(directory / "config.yaml")
            if "early_stopping" in config:  # else an earlier version wrote it
                jobs.append(Job(number, config, config, directory))  # type: ignore[arg-type]
    return jobs


def stopped_before(jobs: Iterable[Job], earlier: Sequence[Job] = ()) -> set[int]:
    """Return the jobs that an earlier launch has stopped, and that their rule stops again.

    Args:
        jobs: of this launch.
        earlier: of earlier launches of the sweep.
    """
    jobs = [job for job in jobs if job.values is not None and job.error is None]
    status = {job.number: how_ended(job.directory)[0] for job in (*earlier, *jobs)}
    failed = {job.number: status[job.number] in FAILED for job in earlier}
    for job in jobs:
        retries = bool(job.values.retry_failed)
        if status[job.number] == "finished" or (status[job.number] in FAILED and not retries):
            failed[job.number] = status[job.number] in FAILED
    by_job = brackets([*earlier, *jobs], failed)
    return {
        job.number
        for job in jobs
        if status[job.number] == "pruned"
        and not changed_files(job.directory, job.settled)  # type: ignore[arg-type]
        and (
            job.number in by_job[job.number].stopped()
            if job.number in by_job
            else _has_same_rule(job)
        )
    }


def _has_same_rule(job: Job) -> bool:
    """Return whether a pruned run would be stopped again: rule and length are those it had."""
    cfg: Any = job.settled
    saved: Any = OmegaConf.load(job.directory / "config.yaml")
    limit = acting_limit(cfg.train)
    return bool(
        saved.get("early_stopping") == cfg.early_stopping
        and training_limits(job.directory).get(limit) == cfg.train[limit]
    )


def forecasts(by_job: Mapping[int, Bracket], first: int = 0) -> list[tuple[list[int], str]]:
    """Return the job numbers of each bracket, and what its rule will do, for the plan.

    Args:
        by_job: the brackets.
        first: the lowest number of this launch's jobs.
    """
    lines = []
    for bracket in {id(b): b for b in by_job.values()}.values():
        jobs = sorted(job for job in bracket.jobs if job >= first)
        if earlier := len(bracket.jobs) - len(jobs):
            shares = ", ".join(f"{share:.0%}" for share in bracket.rule.shares())
            text = f"compared with {earlier} earlier jobs after {shares} of the steps"
            lines.append((jobs, f"early stopping: {text}"))
        elif jobs:
            lines.append((jobs, bracket.rule.forecast(len(jobs))))
    return [line for line in lines if line[0]]


def bracket_values(by_job: Mapping[int, Bracket]) -> list[dict[str, Any]]:
    """Return the reports of brackets as JSON can hold them; see `brackets_of`."""
    return [
        {
            "jobs": sorted(bracket.jobs),
            "values": {n: list(values.items()) for n, values in bracket.values.items()},
            "finished": sorted(bracket.finished),
            "failed": sorted(bracket.failed),
        }
        for bracket in {id(b): b for b in by_job.values()}.values()
    ]


def brackets_of(jobs: Iterable[Job], values: Iterable[Mapping[str, Any]]) -> dict[int, Bracket]:
    """Return the brackets of some jobs, from what `bracket_values` has returned of them."""
    jobs, by_job = list(jobs), dict[int, Bracket]()
    for each in values:
        # a job whose config is refused here says so when it begins
        settled = [job for job in jobs if job.values is not None]
        if not (theirs := [job for job in settled if job.number in each["jobs"]]):
            continue
        cfg: Any = theirs[0].settled
        bracket = Bracket(
            build(cfg, "early_stopping"), cfg.goal == "maximize", frozenset(each["jobs"])
        )
        bracket.values = {int(n): dict(reports) for n, reports in each["values"].items()}
        bracket.finished, bracket.failed = set(each["finished"]), set(each["failed"])
        by_job |= dict.fromkeys((job.number for job in theirs), bracket)
    return by_job


def _bracket(jobs: list[Job], failed: Mapping[int, bool]) -> Bracket:
    cfg: Any = jobs[0].settled
    rule = build(cfg, "early_stopping")
    bracket = Bracket(rule, cfg.goal == "maximize", frozenset(job.number for job in jobs))
    for job in jobs:
        for rung, value in _reports(job, rule):
            bracket.report(job.number, rung, value)
        if job.number in failed:
            bracket.end(job.number, failed[job.number])
    return bracket


def _reports(job: Job, rule: Comparing) -> Iterator[tuple[int, float | None]]:
    """Yield rung and value of a job's reports, without those of another rule or another length."""
    train = job.values.train
    limit = acting_limit(train)
    if training_limits(job.directory).get(limit) != train[limit]:
        return
    for report in rung_reports(job.directory):
        rung, steps = report["rung"], rung_steps(rule.shares(), report["steps"])
        if rung < len(steps) and steps[rung] == report["step"]:
            yield rung, reported_value(report)
