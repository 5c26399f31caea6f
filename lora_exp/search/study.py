"""The next trials, a function of the earlier ones: Optuna proposes, and keeps nothing.

Each batch has a study of its own, built from the journal, and a sampler whose seed depends on the
search's and on the number of trials so far. So a search that was interrupted goes on as if it had
not been.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from lora_exp.errors import ConfigError
from lora_exp.search.apart import Ask, apart
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

RANDOM_TRIALS = 10  # before TPE and GP learn, rounded down to whole batches
ATTEMPTS = 20  # to propose a cell that is new and meets the limits
GP_ATTEMPTS = 4  # each takes a second, and small spaces have few new cells
POINTS = 64  # of a space whose cells cannot be counted, that are tried after that
Admits = Callable[[Mapping[str, str]], bool]  # whether a cell meets the search's limits


def every(values: Mapping[str, str]) -> bool:
    """Admit a cell: there are no limits."""
    return True


def propose(
    settings: Settings,
    presence: Presence,
    earlier: Sequence[Trial],
    evidence: Sequence[Trial] = (),
    admits: Admits = every,
) -> list[Trial]:
    """Return the next batch; fewer trials where the space has no more cells, none at its end.

    Args:
        settings: those of the search.
        presence: which keys exist.
        earlier: all trials so far, ended.
        evidence: trials of other sweeps.
        admits: whether a cell meets the limits.

    Raises:
        ConfigError: no cell with a first guess meets the limits.
    """
    first = len(earlier)
    cells = distinct(presence, first + settings.batch, admits)
    count = settings.batch if cells is None else min(settings.batch, len(cells) - first)
    if settings.sampler == "grid":
        assert cells is not None
        return [Trial(values) for values in cells[first : first + max(count, 0)]]
    trials: list[Trial] = []
    attempts = GP_ATTEMPTS if settings.sampler == "gp" else ATTEMPTS
    with _asking(settings, presence, earlier, evidence) as ask:
        for number in range(first, first + count):
            guess = settings.start[number] if number < len(settings.start) else {}
            seen = {trial.cell for trial in [*earlier, *trials]}
            even = cells is None or attempts < ATTEMPTS  # else the first that are left
            rest = chain(points(settings, presence) if even else (), cells or ())
            trial = _new(ask, number, guess, seen, admits, attempts, rest)
            if trial is None:
                break
            trials.append(trial)
    return trials


def _asking(
    settings: Settings, presence: Presence, earlier: Sequence[Trial], evidence: Sequence[Trial]
) -> AbstractContextManager[Ask]:
    """Return a context with what proposes cells."""
    if settings.sampler == "qmc":
        return nullcontext(_even(settings, presence))
    make = partial(_proposed, settings, presence, earlier, evidence)
    return apart(make) if settings.sampler == "gp" else nullcontext(make())


def distinct(
    presence: Presence, limit: int | None, admits: Admits = every
) -> list[dict[str, str]] | None:
    """Return the first cells that differ and are admitted, at most `limit`.

    None: they cannot be counted.
    """
    cells = presence.space.cells()
    if cells is None:
        return None
    found: dict[frozenset[tuple[str, str]], dict[str, str]] = {}
    for cell in map(presence.present, cells):
        key = frozenset(cell.items())
        if key not in found and admits(cell):
            found[key] = cell
        if len(found) == limit:
            break
    return list(found.values())


def _new(
    ask: Ask,
    number: int,
    guess: Mapping[str, str],
    seen: Collection[frozenset[tuple[str, str]]],
    admits: Admits,
    attempts: int,
    rest: Iterable[dict[str, str]],
) -> Trial | None:
    """Return a trial that has not been seen (the same again would end the same) and is admitted.

    Raises:
        ConfigError: the guess is not admitted, whatever the values of other keys.
    """
    for attempt in range(attempts):
        trial = Trial(ask(number, attempt, guess))
        if trial.cell in seen:
            guess = {}
        elif admits(trial.values):
            return trial
    if guess:
        text = f"no cell with {' '.join(Trial(guess).overrides)} meets the limits"
        raise ConfigError([("hydra.sweeper.start", f"{text}; leave the guess out")])
    left = (Trial(cell) for cell in rest if Trial(cell).cell not in seen and admits(cell))
    return next(left, None)


def points(settings: Settings, presence: Presence) -> Iterator[dict[str, str]]:
    """Yield `POINTS` cells that fill a space evenly."""
    ask = _even(settings, presence)
    return (ask(number, 0, {}) for number in range(POINTS))


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
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = _sampler(settings, earlier)
    study = optuna.create_study(directions=settings.directions, sampler=sampler)
    space, places = presence.space, _places(settings, earlier)
    latest: list[Asked] = []
    study.add_trials([_frozen(trial, space, {}) for trial in evidence])
    for number, trial in enumerate(earlier):
        study.add_trial(_frozen(trial, space, _generation(settings, number), places.get(number)))

    def ask(number: int, attempt: int, guess: Mapping[str, str]) -> dict[str, str]:
        if attempt and settings.sampler == "gp":  # else it counts as one that trains
            study.tell(latest.pop(), state=TrialState.FAIL)
        if guess:
            study.enqueue_trial({key: _value(space[key], text) for key, text in guess.items()})
        asked = study.ask()
        latest.append(asked)
        options = {key: _suggested(asked, space[key]) for key in space.groups}
        keys = [d.key for d in space.dimensions if presence.exists(d.key, options)]
        return {key: options.get(key) or _suggested(asked, space[key]) for key in keys}

    return ask


def _sampler(settings: Settings, earlier: Sequence[Trial]) -> BaseSampler:
    from optuna import samplers

    text = f"{settings.seed} {len(earlier)}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    if settings.sampler == "random":
        return samplers.RandomSampler(seed)
    if settings.sampler == "nsga2":
        return samplers.NSGAIISampler(population_size=settings.batch, seed=seed)
    whole_batches = max(RANDOM_TRIALS // settings.batch, 1) * settings.batch
    if settings.sampler == "tpe":
        return samplers.TPESampler(seed=seed, n_startup_trials=whole_batches)
    # it counts finished trials only, and early stopping leaves few
    finished = sum(trial.state == "complete" for trial in earlier)
    known = min(max(finished, 1), whole_batches) if len(earlier) >= whole_batches else whole_batches
    return samplers.GPSampler(seed=seed, n_startup_trials=known)


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


def _places(settings: Settings, trials: Sequence[Trial]) -> dict[int, int]:
    """Return the places of pruned trials among themselves, from 1, if there are several objectives.

    The later one was stopped, and the better its first objective, the better its place: the order
    in which TPE sorts pruned trials of one objective.
    """
    if len(settings.directions) == 1:
        return {}
    sign = -1 if settings.direction == "maximize" else 1
    pruned = [(-t.step, sign * (t.value or 0.0), n)
              for n, t in enumerate(trials) if t.state == "pruned"]  # fmt: skip
    return {number: place for place, (*_, number) in enumerate(sorted(pruned), 1)}


def _frozen(
    trial: Trial, space: Space, attributes: dict[str, Any], place: int | None = None
) -> FrozenTrial:
    """Return an ended trial as Optuna's.

    Of one objective a pruned trial has its last value at its last step. Studies of several take no
    such reports: there it breaks a constraint, the more the worse its place.
    """
    from optuna.trial import TrialState, create_trial

    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    state = states.get(trial.state, TrialState.FAIL)
    reported = {trial.step: trial.value} if trial.value is not None and place is None else {}
    frozen = create_trial(
        state=state,
        values=trial.objectives if state == TrialState.COMPLETE else None,
        params={key: _value(space[key], text) for key, text in trial.values.items()},
        distributions={key: _distribution(space[key]) for key in trial.values},
        intermediate_values=reported if state == TrialState.PRUNED else {},
        system_attrs=attributes,
    )
    if place is not None:
        frozen.set_constraint("trained to its end", place)
    return frozen
