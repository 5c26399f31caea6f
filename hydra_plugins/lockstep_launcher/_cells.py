"""The jobs of a launch, settled; most of them after an earlier job that differs in few values."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.utils import filter_overrides
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from hydra_plugins.lockstep_launcher._loading import Shape
from lora_exp.config.door import hidden, sections
from lora_exp.config.ranges import Fault
from lora_exp.config.references import references, referred
from lora_exp.config.settled import Resolved, completed
from lora_exp.config.sweeping import sweep_faults, too_long
from lora_exp.config.validation import check, keys_in_common, resolved_job
from lora_exp.errors import ConfigError, LoraExpError
from lora_exp.lockstep.plan import Job

log = logging.getLogger(__name__)
NUMBER = "${hydra.job.num}"  # the default of hydra.sweep.subdir
NOW = re.compile(r"\$\{now:[^${}]*\}")  # in that of hydra.sweep.dir; the same for all jobs
DECIDES = "tracking"  # its option is named after its keys, without an interpolation


@dataclass(frozen=True)
class Settled:
    """What jobs of a shape have in common once one of them is settled."""

    hydra: DictConfig  # that of the first
    common: list[str] | None  # keys that all jobs of the sweep share
    changes_process: bool  # see `Job`
    deciding: tuple[str, ...]  # keys whose values decide others
    resolved: dict[str, bytes] = field(default_factory=dict)  # by the values of deciding keys
    faults: dict[str, list[Fault]] = field(default_factory=dict)  # by what decides them

    @classmethod
    def of(cls, config: DictConfig, deciding: Sequence[str] = ()) -> Settled:
        """Return it for a composed config."""
        hydra = config.hydra
        changes_process = bool(hydra.job.chdir or hydra.job.env_set)
        return cls(hydra, keys_in_common(hydra), changes_process, tuple(deciding))

    def decided_by(self, values: Mapping[str, Any]) -> str:
        """Return the values of deciding keys as text, in which 1, 1.0 and true differ."""
        return repr([values[key] for key in self.deciding])

    def checked(
        self, resolved: Resolved, overrides: Sequence[str], master: DictConfig
    ) -> dict[str, Any]:
        """Return a job's settled values.

        Raises:
            ConfigError: the config has faults.
        """
        values = completed(resolved, overrides, self.common)
        check(values)
        key = repr((values["goal"], values["early_stopping"]))
        if key not in self.faults:
            self.faults[key] = list(sweep_faults(self.hydra, master, sections(values)))
        if self.faults[key]:
            raise ConfigError(self.faults[key])
        return values


class Cells:
    """Makes the jobs of a launch: composed as every launcher does, settled as the job itself does.

    To resolve a config takes most of the time. So a job whose options and keys are known gets the
    values of an earlier one, with its own in place of those that it sets. The earlier one must
    have the same values of all keys to which an interpolation refers.
    """

    def __init__(self, launcher: Any, ours: bool, common: Sequence[str]) -> None:
        """Create it.

        Args:
            launcher: Hydra's.
            ours: whether the jobs are runs of lora-exp.
            common: keys that all jobs set alike.
        """
        self._ours, self._common = ours, common
        self._loader, self._master = launcher.hydra_context.config_loader, launcher.config
        self._hydra: DictConfig = launcher.config.hydra
        self._folder = str(self._hydra.sweep.dir)
        self._settled: dict[Shape, Settled | None] = {}  # None: each job is resolved by itself

    def job(self, overrides: Sequence[str], number: int) -> Job:
        """Return a job, with its error if its config has faults.

        Raises:
            HydraException: overrides that cannot be applied.
            ConfigError: a folder's name is too long.
        """
        overrides = list(overrides)
        log.info("#%d : %s", number, " ".join(filter_overrides(overrides)))
        compose = partial(self._composed, overrides, number)
        shape = self._loader.shape(self._master, overrides) if self._ours else None
        settled = self._settled.get(shape) if shape is not None else None
        if settled is None:
            return self._first(shape, overrides, compose, number)
        own = self._loader.values(overrides)
        key = settled.decided_by(own)
        if key not in settled.resolved:
            return self._first(shape, overrides, compose, number)
        resolved: Resolved = pickle.loads(settled.resolved[key])
        for name, value in own.items():
            parent, _, last = name.rpartition(".")
            _section(resolved.values, parent)[last] = value
        make = partial(
            Job, number, compose, directory=Path(self._folder) / str(number),
            overrides=tuple(overrides), sweep_dir=self._folder,
        )  # fmt: skip
        return self._checked(settled, resolved, overrides, make)

    def _first(
        self,
        shape: Shape | None,
        overrides: list[str],
        compose: Callable[[], DictConfig],
        number: int,
    ) -> Job:
        """Compose and resolve a job, and keep its values for others."""
        config = compose()
        folder = str(config.hydra.sweep.dir)
        directory = Path(folder) / str(config.hydra.sweep.subdir)
        if faults := list(too_long(directory)):
            raise ConfigError(faults)
        make = partial(
            Job, number, compose, settled=None, directory=directory, overrides=tuple(overrides),
            sweep_dir=folder,
        )  # fmt: skip
        if not self._ours:
            return make()
        try:
            resolved = resolved_job(config, config.hydra)
        except LoraExpError as error:  # the job itself raises it again, in its own directory
            return make(error=error)
        if shape is not None and shape not in self._settled:
            self._settled[shape] = self._keepable(shape, config, resolved)
        settled = self._settled.get(shape) if shape is not None else None
        if settled is not None:
            key = settled.decided_by(self._loader.values(overrides))
            settled.resolved[key] = pickle.dumps(resolved)
        one, task = settled or Settled.of(config), list(config.hydra.overrides.task)
        return self._checked(one, resolved, task, make)

    def _keepable(self, shape: Shape, config: DictConfig, resolved: Resolved) -> Settled | None:
        """Return what is kept of the first job of a shape; None: others depend on more than that.

        Such are runs that are resumed, whose values come from a file, folders with other names
        than the jobs' numbers, and a section of Hydra's that refers to keys of the config.
        """
        hydra: Any = OmegaConf.to_container(config.hydra)
        job, sweep = hydra["job"], hydra["sweep"]
        folder = NOW.sub("", str(sweep["dir"]))
        decides = [job["chdir"], job["env_set"], job["config"], hydra["mode"], folder]
        with hidden(config, "hydra") as own:
            referred_to = references(OmegaConf.to_container(own))
        if (
            referred_to is None
            or references([*decides, hydra["sweeper"], hydra["launcher"]]) != frozenset()
            or resolved.is_resumed
            or {"resume", "trusted_targets"} & {*shape.names}
            or sweep["subdir"] != NUMBER
            or config.hydra.sweep.dir != self._folder
            or not all(_holds_plain(resolved.values, name) for name in shape.names)
        ):
            return None
        return Settled.of(config, referred(dict.fromkeys(shape.names), [*referred_to, DECIDES]))

    def _checked(
        self,
        settled: Settled,
        resolved: Resolved,
        overrides: list[str],  # with their interpolations resolved
        make: Callable[..., Job],
    ) -> Job:
        values, error = None, None
        try:
            values = settled.checked(resolved, overrides, self._hydra)
        except LoraExpError as caught:
            error = caught
        return make(settled=values, error=error, changes_process=settled.changes_process)

    def _composed(self, overrides: list[str], number: int) -> DictConfig:
        """Return a job's config, with its number and its directory."""
        config: DictConfig = self._loader.job(self._master, overrides)
        hydra = config.hydra
        with open_dict(config):
            hydra.job.id = hydra.job.num = number
            if self._ours:  # Hydra's list of keys that do not distinguish jobs
                excluded = hydra.job.config.override_dirname.exclude_keys
                excluded += [key for key in self._common if key not in excluded]
        directory = Path(str(hydra.sweep.dir)) / str(hydra.sweep.subdir)
        with read_write(hydra.runtime), open_dict(hydra.runtime):
            hydra.runtime.output_dir = str(directory.absolute())
        return config


def _section(values: dict[str, Any], name: str) -> Any:
    for part in name.split(".") if name else ():
        values = values[part]
    return values


def _holds_plain(values: dict[str, Any], name: str) -> bool:
    """Return whether nested values hold a key, whose value is no section and no list."""
    node: Any = values
    for part in name.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return not isinstance(node, dict | list)
