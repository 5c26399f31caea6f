"""Jobs of finished sweeps as evidence: their values of a search's keys, and their objectives."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Transformer
from omegaconf import OmegaConf

from lora_exp.errors import ConfigError
from lora_exp.files.paths import near_names
from lora_exp.record.sweep import read_rows
from lora_exp.search.objectives import SizeOf, other_values
from lora_exp.search.presence import Presence
from lora_exp.search.settings import Settings
from lora_exp.search.space import Space
from lora_exp.search.trial import Trial

log = logging.getLogger(__name__)
KEY = "hydra.sweeper.learn_from"


def read_evidence(
    settings: Settings, presence: Presence, sizes: SizeOf, objective: str | None
) -> list[Trial]:
    """Return the finished jobs of the sweeps in `learn_from` that lie in the space.

    Args:
        settings: those of the search.
        presence: which keys exist.
        sizes: returns what the job of a cell needs.
        objective: name of the metric that the search's jobs return.

    Raises:
        ConfigError: a sweep has no such job.
    """
    evidence = []
    for name in settings.learn_from:
        folder = Path(name).expanduser()
        rows = read_rows(folder)
        if not rows:
            raise ConfigError([(KEY, f"{name} holds no jobs of a sweep{near_names(folder)}")])
        wanted = ("finished", objective, settings.direction)
        judged = [r for r in rows if (r["status"], r["judged_by"], r["goal"]) == wanted]
        trials = list(_trials(judged, settings, presence, sizes))
        if not trials:
            keys = ", ".join(d.key for d in presence.space.dimensions)
            names = ", ".join(settings.objectives) or objective
            text = f"no finished job of {name} was judged by {names} ({settings.direction})"
            raise ConfigError([(KEY, f"{text} and lies in the space of {keys}")])
        log.info("learns from %d of %d jobs of %s", len(trials), len(rows), name)
        evidence += trials
    return evidence


def _trials(
    rows: Iterable[Mapping[str, Any]], settings: Settings, presence: Presence, sizes: SizeOf
) -> Iterator[Trial]:
    """Yield the trials of rows with all objectives, in the order of the jobs' names."""
    for row in sorted(rows, key=lambda row: (len(row["job"]), row["job"])):
        directory = Path(row["directory"])
        values = _values(directory, row["overrides"], presence)
        if values is not None:
            record = json.loads((directory / "run.json").read_text("utf-8"))
            others = other_values(settings.objectives, record, partial(sizes, values))
            trial = Trial(values).ended("complete", row["objective"], 0, others)
            if trial.state == "complete":
                yield trial


def _values(job: Path, overrides: Mapping[str, str], presence: Presence) -> dict[str, str] | None:
    """Return a job's values of the keys that exist for it; None: one is outside the space."""
    space, config = presence.space, OmegaConf.load(job / "config.yaml")
    groups = {key: _text(key, overrides, config.choices, space) for key in space.groups}
    if None in groups.values():
        return None
    options = {key: text for key, text in groups.items() if text is not None}
    keys = [d.key for d in space.dimensions if presence.exists(d.key, options)]
    values = {key: options.get(key) or _text(key, overrides, config, space) for key in keys}
    held = {key: text for key, text in values.items() if text is not None}
    return held if held.keys() == values.keys() else None


def _text(key: str, overrides: Mapping[str, str], config: Any, space: Space) -> str | None:
    """Return a value as the job's override has it, else its config; None: outside the space."""
    name = key.lstrip("+")
    texts = [overrides[name]] if name in overrides else []
    value: Any = OmegaConf.select(config, name)
    if value is not None:
        plain: Any = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        texts.append(Transformer.str(plain))
    return next((text for text in texts if space[key].holds(text)), None)
