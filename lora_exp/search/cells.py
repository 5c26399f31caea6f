"""The cells of a search: what each needs, which of them meet the limits, and how many there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_exp.errors import ConfigError
from lora_exp.search.limits import BYTES, Size
from lora_exp.search.objectives import SizeOf
from lora_exp.search.presence import Presence
from lora_exp.search.settings import TRIALS, Settings
from lora_exp.search.study import distinct, points, propose
from lora_exp.search.trial import Trial

COUNTED = 100  # cells of a space of which those outside the limits are counted


class Cells:
    """Proposes cells that meet the limits of a search."""

    def __init__(self, settings: Settings, presence: Presence, size: SizeOf | None) -> None:
        """Store what the cells depend on.

        Args:
            settings: those of the search.
            presence: which keys exist.
            size: returns what a cell needs; None: the task has no model.

        Raises:
            ConfigError: the search asks for sizes, and the task has no model.
        """
        self.settings, self.presence, self._size = settings, presence, size
        asked = [*settings.limits.asked, *(["objectives"] if BYTES in settings.objectives else [])]
        if size is None and asked:
            raise ConfigError((f"hydra.sweeper.{key}", "the task has no model") for key in asked)

    def size(self, values: Mapping[str, str]) -> Size | None:
        """Return what a cell needs; None: its job will be refused, or there is no model."""
        return self._size(values) if self._size is not None else None

    def propose(self, earlier: Sequence[Trial], evidence: Sequence[Trial]) -> list[Trial]:
        """Return the next batch; see `study.propose`."""
        return propose(self.settings, self.presence, earlier, evidence, self._admits)

    def total(self) -> int:
        """Return the number of trials: those asked for, or the cells if these are fewer.

        Raises:
            ConfigError: no cell meets the limits.
        """
        settings = self.settings
        limit = settings.trials or (None if settings.sampler == "grid" else TRIALS)
        cells = distinct(self.presence, limit, self._admits)
        if cells:
            return len(cells)
        tried = distinct(self.presence, None) or [*points(settings, self.presence)]
        if not any(map(self._admits, tried)):
            self._refuse(tried)
        assert limit is not None
        return limit

    def left_out(self) -> tuple[int, int] | None:
        """Return how many cells break the limits, and of how many; None: they are not counted.

        A grid's are, since each of its cells has been asked for its size; else only `COUNTED`.
        """
        limit = None if self.settings.sampler == "grid" else COUNTED + 1
        cells = distinct(self.presence, limit) if self.settings.limits.asked else None
        if cells is None or len(cells) == limit:
            return None
        return sum(not self._admits(cell) for cell in cells), len(cells)

    def _admits(self, values: Mapping[str, str]) -> bool:
        limits = self.settings.limits
        return not limits.asked or limits.admit(self.size(values))

    def _refuse(self, cells: Sequence[Mapping[str, str]]) -> None:
        sizes = [size for size in map(self.size, cells) if size is not None]
        least = Size(min(s.parameters for s in sizes), min(s.bytes for s in sizes))
        text = f"none of {len(cells)} cells meets {self.settings.limits}; the least: {least}"
        raise ConfigError((f"hydra.sweeper.{key}", text) for key in self.settings.limits.asked)
