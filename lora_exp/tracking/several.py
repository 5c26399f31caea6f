"""All trackers of a run as one; a tracker that fails is left out, and never stops the training."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lora_exp.errors import ConfigError

log = logging.getLogger("lora_exp")


class Several:
    """The trackers of a run; none is `tracking=none`."""

    def __init__(self, makers: Mapping[str, Callable[[], Any]]) -> None:
        """Create them in turn.

        Args:
            makers: name of a tracker -> what creates it.

        Raises:
            ConfigError: one is not set up; those before it are finished.
        """
        self.trackers: dict[str, Any] = {}
        for name, make in makers.items():
            try:
                with self._guarded(name):
                    self.trackers[name] = make()
            except ConfigError:
                self.finish({}, None, "failed")
                raise

    @property
    def places(self) -> dict[str, str]:
        """Where to look, for people, by the tracker's label."""
        return {tracker.label: tracker.place for tracker in self.trackers.values()}

    def describe(self, facts: dict[str, Any]) -> None:
        """Send what is known before training."""
        self._each(lambda tracker: tracker.describe(facts))

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Send the metrics of a step."""
        self._each(lambda tracker: tracker.log(metrics, step))

    def samples(self, samples: list[dict[str, Any]], step: int) -> None:
        """Send the answers before and after training."""
        if samples:
            self._each(lambda tracker: tracker.samples(samples, step))

    def finish(self, summary: dict[str, Any], saved: Path | None, ended: str) -> None:
        """Send the final numbers, and close."""
        self._each(lambda tracker: tracker.finish(summary, saved, ended))

    def _each(self, send: Callable[[Any], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            with self._guarded(name):
                send(tracker)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Go on without a tracker that fails; what libraries draw at random is drawn apart.

        Raises:
            ConfigError: the tracker's own, of a setting that the user can mend.
        """
        python, arrays = random.getstate(), np.random.get_state()
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # of any library, a server's answer too
            self.trackers.pop(name, None)
            text = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning("%s gets nothing more of this run: %s", name, text)
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
