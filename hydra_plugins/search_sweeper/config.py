"""Registers the sweeper as an option of Hydra's group `hydra/sweeper`."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore


@dataclass
class SearchConfig:
    """The defaults of `hydra.sweeper`; docs/search.md explains them."""

    _target_: str = "hydra_plugins.search_sweeper.sweeper.SearchSweeper"
    trials: int | None = None  # 32; of a grid: all cells
    sampler: str = "tpe"
    seed: int = 42
    batch: int = 8  # trials proposed and launched together
    direction: str | None = None  # the config's goal
    objectives: Any = None  # several: name to goal
    max_parameters: Any = None  # that a cell may train
    max_bytes: Any = None  # of memory, as estimated: a number, or a text like 8GiB
    start: list[Any] = field(default_factory=list)  # first guesses: key to value
    learn_from: list[str] = field(default_factory=list)  # directories of finished sweeps
    dry_run: bool = False
    params: dict[str, Any] | None = None  # a preset's overrides, as in Hydra's own sweeper


ConfigStore.instance().store(
    group="hydra/sweeper", name="search", node=SearchConfig, provider="lora-exp"
)
