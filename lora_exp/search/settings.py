"""What a command line asks of a search: how many trials, who proposes them, and from what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from hydra.core.override_parser.types import Transformer

from lora_exp.errors import ConfigError, ExtraError, did_you_mean
from lora_exp.search.limits import Limits, read_limits
from lora_exp.search.objectives import DIRECTIONS, KEY, objective_faults
from lora_exp.search.space import Space

SAMPLERS = ("tpe", "gp", "random", "qmc", "nsga2", "grid")
OPTUNAS = ("tpe", "gp", "random", "nsga2")  # the others need no package
TRIALS = 32  # unless the sampler is grid
Direction = Literal["minimize", "maximize"]
Fault = tuple[str, str]


@dataclass(frozen=True)
class Settings:
    """The section `hydra.sweeper` of a search, checked."""

    trials: int | None  # at most; None: TRIALS, or the whole grid
    sampler: str
    seed: int
    batch: int
    direction: Direction
    start: tuple[Mapping[str, str], ...]  # first guesses: texts of overrides
    learn_from: tuple[str, ...]
    objectives: Mapping[str, Direction] = field(default_factory=dict)  # none: the config's alone
    limits: Limits = field(default_factory=Limits)

    @property
    def directions(self) -> list[Direction]:
        """The direction of each objective."""
        return list(self.objectives.values()) or [self.direction]


def read_settings(
    section: Mapping[str, Any], space: Space, objective: str | None, goal: str | None
) -> Settings:
    """Return the settings of a search.

    Args:
        section: `hydra.sweeper` of the config.
        space: that of the search.
        objective: `objective` of the config; None: it has none.
        goal: `goal` of the config; None: it has none.

    Raises:
        ConfigError: settings that make no sense (all are listed).
        ExtraError: the sampler's package is not installed.
    """
    direction: Any = section["direction"] or goal or DIRECTIONS[0]
    settings = Settings(
        section["trials"],
        section["sampler"],
        section["seed"],
        section["batch"],
        direction,
        tuple(_guess(values, space) for values in section["start"]),
        tuple(map(str, section["learn_from"])),
        _objectives(section["objectives"]),
        read_limits(section),
    )
    faults = [*_faults(settings, goal), *_space_faults(settings, space)]
    faults = [(f"hydra.sweeper.{key}", text) for key, text in faults]
    if settings.objectives:
        faults += objective_faults(settings.objectives, objective, goal)
    if faults:
        raise ConfigError(faults)
    if settings.sampler in OPTUNAS and find_spec("optuna") is None:
        advice = "hydra.sweeper.sampler=qmc and grid need nothing"
        text = f'sampler={settings.sampler}: optuna is missing: pip install "lora-exp[search]"'
        raise ExtraError(f"{text}; {advice}")
    return settings


def _objectives(values: Any) -> dict[str, Any]:
    """Return the goals of several objectives by their names."""
    if not isinstance(values or {}, Mapping):
        text = 'are goals by name: "hydra.sweeper.objectives={eval/loss: minimize, ...}"'
        raise ConfigError([(KEY, text)])
    return {str(name): str(goal) for name, goal in (values or {}).items()}


def _guess(values: Any, space: Space) -> dict[str, str]:
    """Return a first guess as texts, by the keys of the space with their signs."""
    if not isinstance(values, Mapping):
        text = 'is a list of guesses: "hydra.sweeper.start=[{peft.r: 8}]"'
        raise ConfigError([("hydra.sweeper.start", text)])
    signed = {d.key.lstrip("+"): d.key for d in space.dimensions}
    texts = {str(key).lstrip("+"): Transformer.str(value) for key, value in values.items()}
    return {signed.get(key, key): text for key, text in texts.items()}


def _faults(settings: Settings, goal: str | None) -> Iterator[Fault]:
    if settings.trials is not None and settings.trials < 1:
        yield "trials", f"{settings.trials} is no number of trials; give 1 or more"
    if settings.batch < 1:
        yield "batch", f"{settings.batch} trials cannot train together; give 1 or more"
    if settings.sampler not in SAMPLERS:
        near = did_you_mean(settings.sampler, SAMPLERS)
        yield "sampler", f"{settings.sampler!r} is none of {', '.join(SAMPLERS)}{near}"
    if settings.sampler == "nsga2" and settings.batch == 1:
        yield "batch", "sampler=nsga2 breeds each batch from the one before; give 2 or more"
    if settings.direction not in DIRECTIONS:
        near = did_you_mean(settings.direction, DIRECTIONS)
        yield "direction", f"{settings.direction!r} is none of {', '.join(DIRECTIONS)}{near}"
    elif goal is not None and settings.direction != goal:
        yield "direction", f"is against goal={goal}: the sweeper would look for the worst"
    if settings.learn_from and settings.sampler not in ("tpe", "gp"):
        yield "learn_from", f"sampler={settings.sampler} learns from no other sweep; give tpe or gp"
    if settings.start and settings.sampler == "grid":
        yield "start", "sampler=grid trains every cell; leave the first guesses out"


def _space_faults(settings: Settings, space: Space) -> Iterator[Fault]:
    """Yield a fault for each guess outside the space, and for a grid that has no cells."""
    keys = [d.key for d in space.dimensions]
    for key in keys:
        if key in ("objective", "goal"):
            yield "params", f"{key} cannot be searched: one search compares one objective"
    for key, text in ((k, t) for guess in settings.start for k, t in guess.items()):
        if key not in keys:
            yield "start", f"{key} is not searched{did_you_mean(key, keys)}"
        elif not space[key].holds(text):
            yield "start", f"{key}={text} is outside the space: {space[key]}"
    if settings.sampler == "grid":
        for dimension in space.dimensions:
            if dimension.cells() is None:
                text = f"grid cannot try all of {dimension.key}: {dimension}"
                yield "sampler", f"{text}; give a range() or some values"
