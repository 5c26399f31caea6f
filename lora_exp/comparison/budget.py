"""What makes runs unequal beside their configs: budgets, data, versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_exp.comparison.keys import canonical, compared
from lora_exp.runs.run import CONFIG, SavedRun, number

TOLERANCE = 1.05  # tokens vary a little with the order of rows
SHOWN = 3


def warnings(runs: Sequence[SavedRun]) -> list[str]:
    """Return what is unequal among finished runs, budgets in one line, and what is left out."""
    damaged = [f"{run.directory} ({why})" for run in runs if (why := fault(run))]
    finished = [r for r in runs if not fault(r) and r.record["status"] == "finished"]
    unequal = "; ".join(text for check in BUDGETS if (text := check(finished)))
    budgets = f"unequal budgets: {unequal}" if unequal else ""
    lines = [_objectives(finished), _goals(finished), budgets, *(f(finished) for f in OTHERS)]
    text = f"damaged, left out: {_listed(damaged)}" if damaged else ""
    return [line for line in [*lines, text] if line]


def fault(run: SavedRun) -> str | None:
    """Return why a run cannot be compared: its record or its config cannot be read."""
    return run.problem or (None if run.config() else f"{CONFIG} is missing or cannot be read")


def _objectives(runs: Sequence[SavedRun]) -> str:
    names = list(dict.fromkeys(str(run.judged_by) for run in runs))
    return f"different objectives, a table each: {_listed(names)}" if len(names) > 1 else ""


def _goals(runs: Sequence[SavedRun]) -> str:
    goals: dict[str | None, list[str | None]] = {}
    for run in runs:
        goals.setdefault(run.judged_by, []).append(run.goal)
    texts = (_counted(f"goals of {name} differ", found) for name, found in goals.items())
    lines = [f"{text}; the table takes what most runs have" for text in texts if text]
    return "; ".join(lines)


def _steps(runs: Sequence[SavedRun]) -> str:
    return _counted("steps differ", [run.record.get("steps") for run in runs])


def _tokens(runs: Sequence[SavedRun]) -> str:
    trained = [_last(run, "train/num_tokens") for run in runs]
    known = [count for count in trained if count]
    if not known or max(known) <= TOLERANCE * min(known):
        return ""
    return f"tokens trained on differ: {min(known):,.0f} to {max(known):,.0f} a run"


def _data(runs: Sequence[SavedRun]) -> str:
    kinds = {canonical(run.record["data"]) for run in runs if run.record.get("data")}
    text = "data differ: {} contents by hash, so values may be of different held-out rows"
    return text.format(len(kinds)) if len(kinds) > 1 else ""


def _bases(runs: Sequence[SavedRun]) -> str:
    bases = [run.record["base"] for run in runs if run.record.get("base")]
    text = _counted("bases differ", [str(base)[:19] for base in bases])
    return f"{text}, whose losses are not comparable under different tokenizers" if text else ""


def _versions(runs: Sequence[SavedRun]) -> str:
    versions = [run.record.get("versions") for run in runs]
    known = [v for v in versions if isinstance(v, Mapping)]
    names = dict.fromkeys(name for v in known for name in v)
    by_name = {n: list(dict.fromkeys(str(v[n]) for v in known if n in v)) for n in names}
    texts = [f"{name} {', '.join(found)}" for name, found in by_name.items() if len(found) > 1]
    return f"versions differ: {' and '.join(texts)}" if texts else ""


def _repeated(runs: Sequence[SavedRun]) -> str:
    """Return runs of one config and seed that have other values."""
    values: dict[str, dict[float, SavedRun]] = {}
    for run in runs:
        if run.objective is not None:
            key = canonical([run.seed, run.judged_by, compared(run)])
            values.setdefault(key, {})[run.objective] = run
    pairs = [
        " and ".join(str(run.directory) for run in list(by_value.values())[:2])
        for by_value in values.values()
        if len(by_value) > 1
    ]
    return f"equal config and seed, other values: {_listed(pairs)}" if pairs else ""


def _unproven(runs: Sequence[SavedRun]) -> str:
    packs = [(run, run.record.get("lockstep")) for run in runs]
    names = [
        r.name for r, pack in packs if isinstance(pack, Mapping) and pack.get("proven") is False
    ]
    return f"not proven equal to their runs alone: {_listed(names)}" if names else ""


Check = Callable[[Sequence[SavedRun]], str]
BUDGETS: tuple[Check, ...] = (_steps, _tokens, _data, _bases, _versions)
OTHERS: tuple[Check, ...] = (_repeated, _unproven)


def _last(run: SavedRun, metric: str) -> float | None:
    """Return the last value of a metric that was logged."""
    values = (number(line.get(metric)) for line in reversed(run.history()))
    return next((value for value in values if value is not None), None)


def _counted(text: str, values: Sequence[Any]) -> str:
    """Return how many runs have which value, if there are several."""
    counts = Counter(map(str, values))
    listed = [f"{value} ({n} run{'s' * (n > 1)})" for value, n in counts.most_common()]
    return f"{text}: {_listed(listed)}" if len(counts) > 1 else ""


def _listed(texts: Sequence[str]) -> str:
    """Return the first texts, and how many more there are."""
    more = len(texts) - SHOWN
    return ", ".join(texts[:SHOWN]) + (f" and {more} more" if more > 0 else "")
