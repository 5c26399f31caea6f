"""A run's rows, tokens and questions; jobs of a pack that learn from the same make them once."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from omegaconf import DictConfig

from lora_exp.config.door import build, plain
from lora_exp.config.learning import check_rows
from lora_exp.data.examples import prepared
from lora_exp.data.rows import Rows
from lora_exp.data.tokens import Tokens, virtual_tokens
from lora_exp.model.loading import Base
from lora_exp.training.answers import HeldOut, questions
from lora_exp.training.place import Place

T = TypeVar("T")


class Inputs:
    """What a run learns from and is measured with."""

    def __init__(self, cfg: DictConfig, place: Place, day: str) -> None:
        """Read nothing yet.

        Args:
            cfg: the run's.
            place: where it trains.
            day: that chat templates write as today's.
        """
        self._cfg, self._place, self._day = cfg, place, day

    def rows(self) -> tuple[Rows, Rows]:
        """Return the rows as they were read, and in the shape that the algorithm learns from.

        Raises:
            DataError: they cannot be used.
        """
        shape = self._cfg.algorithm.shape

        def read() -> tuple[Rows, Rows]:
            rows: Rows = build(self._cfg, "data")
            return rows, rows.shaped(shape)

        rows, shaped = self._shared(read, "rows", shape)
        check_rows(self._cfg, len(shaped.train))
        return rows, shaped

    def tokens(self, shaped: Rows, base: Base, model: Any) -> tuple[Tokens, Tokens | None]:
        """Return training and held-out rows as the algorithm's trainer takes them.

        Args:
            shaped: in the algorithm's shape.
            base: with its chat template.
            model: with its adapter.

        Raises:
            ConfigError: `max_length` is longer than the model's context.
            DataError: some rows cannot be used.
        """
        train, held_out = self._shared(
            lambda: prepared(shaped, base.tokenizer, model, self._cfg),
            "tokens", self._day, plain(self._cfg.algorithm), virtual_tokens(model),
        )  # fmt: skip
        return _own(train), held_out and _own(held_out)

    def held_out(self, rows: Rows, base: Base) -> HeldOut:
        """Return the held-out rows, with the questions in them once they are asked for.

        Args:
            rows: as they were read, without those that the chat template refuses.
            base: with its chat template.
        """
        count = self._cfg.samples.rows

        def ask() -> list[Any]:
            return questions(rows.eval, base.tokenizer, base.model, count)

        key = ("questions", self._day, self._cfg.algorithm.shape, len(rows.eval), count)
        return HeldOut(rows.eval, lambda: self._shared(ask, *key))

    def _shared(self, make: Callable[[], T], *key: Any) -> T:
        """Return what jobs of a place share whose data and keys are equal.

        A target that the user trusts may return other rows each time: they are never shared.
        """
        if self._cfg.trusted_targets:
            return make()
        parts = json.dumps([plain(self._cfg.data), *key], sort_keys=True, default=str)
        return self._place.shared(parts, make)


def _own(tokens: Tokens) -> Tokens:
    """Return tokens with a data set object of their own: a trainer may set its format."""
    return replace(tokens, dataset=copy.copy(tokens.dataset))
