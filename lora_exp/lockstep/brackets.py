"""Which jobs of a sweep are compared with each other, and what their records hold of it.

Needs no torch: the launcher reads records, and a worker judges.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lora_exp.config.door import build, plain
from lora_exp.config.resume import acting_limit
from lora_exp.early_stopping.bracket import Bracket
from lora_exp.early_stopping.rules import Comparing
from lora_exp.early_stopping.rungs import reported_value, rung_steps
from lora_exp.lockstep.plan import Job
from lora_exp.record.standing import FAILED, how_ended, rung_reports, training_limits


def brackets(jobs: Iterable[Job], failed: Mapping[int, bool]) -> dict[int, Bracket]:
    """Return each job's bracket: the jobs with the same rule, objective and goal.

    Args:
        jobs: of a launch; those that are refused or have no such rule are in no bracket.
        failed: of the jobs that have ended, whether they failed.
    """
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        if job.settled is not None and isinstance(build(job.settled, "early_stopping"), Comparing):
            cfg = job.settled
            key = json.dumps([plain(cfg.early_stopping), cfg.objective, cfg.goal])
            groups.setdefault(key, []).append(job)
    by_job: dict[int, Bracket] = {}
    for group in groups.values():
        by_job |= dict.fromkeys((job.number for job in group), _bracket(group, failed))
    return by_job


def stopped_before(jobs: Iterable[Job]) -> set[int]:
    """Return the jobs that an earlier launch has stopped, and that their rule stops again."""
    jobs = [job for job in jobs if job.settled is not None and job.error is None]
    status = {job.number: how_ended(job.directory)[0] for job in jobs}
    failed = {
        job.number: status[job.number] in FAILED
        for job in jobs
        if status[job.number] == "finished"
        or (status[job.number] in FAILED and not job.settled.retry_failed)  # type: ignore[union-attr]
    }
    return {
        number
        for number, bracket in brackets(jobs, failed).items()
        if status[number] == "pruned" and number in bracket.stopped()
    }


def forecasts(by_job: Mapping[int, Bracket]) -> list[tuple[list[int], str]]:
    """Return the job numbers of each bracket, and what its rule will do, for the plan."""
    groups: dict[int, list[int]] = {}
    for number, bracket in by_job.items():
        groups.setdefault(id(bracket), []).append(number)
    return [
        (numbers, by_job[numbers[0]].rule.forecast(len(numbers))) for numbers in groups.values()
    ]


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
    train: Any = job.settled.train  # type: ignore[union-attr]
    limit = acting_limit(train)
    if training_limits(job.directory).get(limit) != train[limit]:
        return
    for report in rung_reports(job.directory):
        rung, steps = report["rung"], rung_steps(rule.shares(), report["steps"])
        if rung < len(steps) and steps[rung] == report["step"]:
            yield rung, reported_value(report)
