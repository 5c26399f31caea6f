"""The next trials, a function of the earlier ones: Optuna proposes, and keeps nothing.

Each batch has a study of its own, built from the journal, and a sampler whose seed depends on the
search's and on the number of trials so far. So a search that was interrupted goes on as if it had
not been.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_exp.search.halton import halton
from lora_exp.search.presence import Presence
from lora_exp.search.settings import Settings
from lora_exp.search.space import Dimension, Space
from lora_exp.search.trial import Trial

if TYPE_CHECKING:
    from optuna import Trial as Asked
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

RANDOM_TRIALS = 10  # before TPE learns, rounded down to whole batches
ATTEMPTS = 20  # to propose a cell that is new
# of a trial's number, the attempt and its guess: values for all keys of the space
Ask = Callable[[int, int, Mapping[str, str]], dict[str, str]]


def propose(
    settings: Settings, presence: Presence, earlier: Sequence[Trial], evidence: Sequence[Trial] = ()
) -> list[Trial]:
    """Return the next batch; fewer trials where the space has no more cells, none at its end.

    Args:
        settings: those of the search.
        presence: which keys exist.
        earlier: all trials so far, ended.
        evidence: trials of other sweeps.
    """
    first = len(earlier)
    cells = distinct(presence, first + settings.batch)
    count = settings.batch if cells is None else min(settings.batch, len(cells) - first)
    if settings.sampler == "grid":
        assert cells is not None
        return [Trial(values) for values in cells[first : first + max(count, 0)]]
    ask: Ask = _even(settings, presence)
    if settings.sampler != "qmc":
        ask = _proposed(settings, presence, earlier, evidence)
    trials: list[Trial] = []
    for number in range(first, first + count):
        trials.append(_new(ask, number, settings, [*earlier, *trials], cells))
    return trials


def distinct(presence: Presence, limit: int | None) -> list[dict[str, str]] | None:
    """Return the first cells that differ, at most `limit`; None: they cannot be counted."""
    cells = presence.space.cells()
    if cells is None:
        return None
    found: dict[frozenset[tuple[str, str]], dict[str, str]] = {}
    for cell in map(presence.present, cells):
        found.setdefault(frozenset(cell.items()), cell)
        if len(found) == limit:
            break
    return list(found.values())


def _new(
    ask: Ask,
    number: int,
    settings: Settings,
    earlier: Sequence[Trial],
    cells: Sequence[dict[str, str]] | None,
) -> Trial:
    """Return a trial that is none of the earlier ones: the same again would end the same."""
    seen = {trial.cell for trial in earlier}
    guess = settings.start[number] if number < len(settings.start) else {}
    for attempt in range(ATTEMPTS):
        trial = Trial(ask(number, attempt, guess if attempt == 0 else {}))
        if trial.cell not in seen:
            return trial
    unseen = (other for cell in cells or () if (other := Trial(cell)).cell not in seen)
    return next(unseen, trial)


def _even(settings: Settings, presence: Presence) -> Ask:
    """Return what proposes points of Halton's sequence."""
    space = presence.space

    def ask(number: int, attempt: int, guess: Mapping[str, str]) -> dict[str, str]:
        shares = halton(number, len(space.dimensions), settings.seed + attempt)
        pairs = zip(space.dimensions, shares, strict=True)
        return presence.present({d.key: guess.get(d.key) or d.at(share) for d, share in pairs})

    return ask


def _proposed(
    settings: Settings, presence: Presence, earlier: Sequence[Trial], evidence: Sequence[Trial]
) -> Ask:
    """Return what asks Optuna; trials that were asked and have not ended count, too."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = _sampler(settings, len(earlier))
    study = optuna.create_study(direction=settings.direction, sampler=sampler)
    space = presence.space
    study.add_trials([_frozen(trial, space, {}) for trial in evidence])
    for number, trial in enumerate(earlier):
        study.add_trial(_frozen(trial, space, _generation(settings, number)))

    def ask(number: int, attempt: int, guess: Mapping[str, str]) -> dict[str, str]:
        if guess:
            study.enqueue_trial({key: _value(space[key], text) for key, text in guess.items()})
        asked = study.ask()
        options = {key: _suggested(asked, space[key]) for key in space.groups}
        keys = [d.key for d in space.dimensions if presence.exists(d.key, options)]
        return {key: options.get(key) or _suggested(asked, space[key]) for key in keys}

    return ask


def _sampler(settings: Settings, first: int) -> BaseSampler:
    from optuna import samplers

    text = f"{settings.seed} {first}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    if settings.sampler == "random":
        return samplers.RandomSampler(seed)
    if settings.sampler == "nsga2":
        return samplers.NSGAIISampler(population_size=settings.batch, seed=seed)
    whole_batches = max(RANDOM_TRIALS // settings.batch, 1) * settings.batch
    return samplers.TPESampler(seed=seed, n_startup_trials=whole_batches)


def _generation(settings: Settings, number: int) -> dict[str, Any]:
    """Return the attribute by which NSGA-II knows a trial's generation: a batch is one."""
    from optuna.samplers import NSGAIISampler

    return {NSGAIISampler._get_generation_key(): number // settings.batch}


def _suggested(asked: Asked, dimension: Dimension) -> str:
    key, low, high, log = dimension.key, dimension.low, dimension.high, dimension.log
    if dimension.options and dimension.ordered:
        return dimension.options[asked.suggest_int(key, 0, len(dimension.options) - 1)]
    if dimension.options:
        return str(asked.suggest_categorical(key, dimension.options))
    if dimension.whole:
        return dimension.text(asked.suggest_int(key, int(low), int(high), log=log))
    return dimension.text(asked.suggest_float(key, low, high, log=log))


def _distribution(dimension: Dimension) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if dimension.options and dimension.ordered:
        return IntDistribution(0, len(dimension.options) - 1)
    if dimension.options:
        return CategoricalDistribution(dimension.options)
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), dimension.log)
    return FloatDistribution(dimension.low, dimension.high, dimension.log)


def _value(dimension: Dimension, text: str) -> str | int | float:
    """Return a text as Optuna's value: a range's is its place, since categories have no order."""
    if dimension.options:
        return dimension.options.index(text) if dimension.ordered else text
    return int(float(text)) if dimension.whole else float(text)


def _frozen(trial: Trial, space: Space, attributes: dict[str, Any]) -> FrozenTrial:
    """Return an ended trial as Optuna's; a pruned one has its last value at its last step."""
    from optuna.trial import TrialState, create_trial

    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    state = states.get(trial.state, TrialState.FAIL)
    reported = {trial.step: trial.value} if trial.value is not None else {}
    return create_trial(
        state=state,
        value=trial.value if state == TrialState.COMPLETE else None,
        params={key: _value(space[key], text) for key, text in trial.values.items()},
        distributions={key: _distribution(space[key]) for key in trial.values},
        intermediate_values=reported if state == TrialState.PRUNED else {},
        system_attrs=attributes,
    )
