"""Rewards: what an answer is worth, by functions named in the config or by a reward adapter.

A reward function is TRL's: `f(prompts, completions, **columns) -> list[float | None]`, one number
for each completion, None where it gives no reward. `columns` are the rows' other columns, each a
list. In chats a completion is a list of turns; `completion_text` returns its text.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable
from difflib import SequenceMatcher
from itertools import chain
from pathlib import Path
from typing import Any

import regex as patterns
import torch
from omegaconf import DictConfig
from torch import Tensor

from lora_exp.adapter.several import add_saved, is_adapted, score, using
from lora_exp.config.door import build, plain, untrusted
from lora_exp.config.start import adapter_config, check_start_base
from lora_exp.data.encoding import text_ids
from lora_exp.data.rows import Rows
from lora_exp.data.turns import Row
from lora_exp.errors import AdapterError, ConfigError, DataError, RewardError
from lora_exp.files.paths import is_path
from lora_exp.model.loading import Base, base_of
from lora_exp.model.placement import device
from lora_exp.model.precision import autocast
from lora_exp.parallel.world import world

Function = Callable[..., list[float | None]]
# arguments that a trainer passes to reward functions, beside the rows' columns
TRAINER_ARGUMENTS = {
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric",
}  # fmt: skip
SECONDS = 1.0  # that a pattern may take on one completion
BATCH = 64  # completions that a reward adapter scores at a time


def completion_text(completion: Any) -> str:
    """Return a completion's text; of a chat, that of the last turn."""
    text: str = completion if isinstance(completion, str) else completion[-1]["content"]
    return text


def exact_match(completions: list[Any], answer: list[str | None], **_: Any) -> list[float | None]:
    """Give 1 for the known answer, outer white space aside, else 0."""
    pairs = zip(map(completion_text, completions), answer, strict=True)
    return [None if a is None else float(c.strip() == a.strip()) for c, a in pairs]


def similarity(completions: list[Any], answer: list[str | None], **_: Any) -> list[float | None]:
    """Give the share of characters in common with the known answer, in order: 1 for the answer."""
    pairs = zip(map(completion_text, completions), answer, strict=True)
    return [None if a is None else SequenceMatcher(None, c, a).ratio() for c, a in pairs]


def regex(pattern: str) -> Function:
    """Give 1 where a pattern is found in the completion, else 0.

    Raises:
        RewardError: a completion takes the pattern longer than a second (when called).
    """
    compiled = patterns.compile(pattern, patterns.DOTALL)

    def regex(completions: list[Any], **_: Any) -> list[float | None]:
        texts = map(completion_text, completions)
        try:
            return [float(bool(compiled.search(text, timeout=SECONDS))) for text in texts]
        except TimeoutError as error:
            raise RewardError(f"{pattern!r} takes more than {SECONDS:g} s") from error

    return regex


def format(tags: list[str]) -> Function:
    """Give 1 for a completion that is these tagged sections in order and nothing else, else 0.

    `tags=[think, answer]` wants `<think>...</think><answer>...</answer>` (arXiv 2501.12948).
    """
    section = "<{0}>((?!</?{0}>).)*</{0}>"
    whole = regex(r"\A\s*" + r"\s*".join(section.format(t) for t in tags) + r"\s*\Z")

    def format(completions: list[Any], **_: Any) -> list[float | None]:
        return whole(completions)

    return format


def length(tokens: int) -> Function:
    """Give 1 for up to so many tokens, then less, down to 0 at twice as many."""

    def length(
        completions: list[Any], completion_ids: list[list[int]], **_: Any
    ) -> list[float | None]:
        return [min(1.0, max(0.0, 2 - len(ids) / tokens)) for ids in completion_ids]

    return length


class Reward:
    """A reward function and its name; its arguments and results are checked."""

    def __init__(self, function: Function, name: str) -> None:
        self.function, self.__name__ = function, name
        parameters = inspect.signature(function).parameters.values()
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.parameter_names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        self.required = {
            p.name
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }

    def check(self, rows: Iterable[Row]) -> None:
        """Check that the rows have the columns that the function needs.

        Raises:
            DataError: no row has a column that it needs.
        """
        columns = {key for row in rows for key in row} - {"prompt"}
        if missing := sorted(self.required - columns - TRAINER_ARGUMENTS):
            text = f"needs the column {', '.join(missing)}; the rows have"
            raise DataError(
                f"algorithm.rewards: {self.__name__} {text} {', '.join(sorted(columns))}"
            )

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[Any]:
        """Return a reward for each completion.

        Raises:
            RewardError: the function fails or returns no reward; function and row are named.
        """
        arguments = {"prompts": prompts, "completions": completions, **columns}
        if not self.takes_any:
            arguments = {k: v for k, v in arguments.items() if k in self.parameter_names}
        try:
            results = list(self.function(**arguments))
        except Exception as error:
            raise RewardError(self._failure(arguments, prompts, completions, error)) from error
        if len(results) != len(completions):
            text = f"returned {len(results)} rewards for {len(completions)} completions"
            raise RewardError(f"reward {self.__name__} {text}")
        for i, reward in enumerate(results):
            if reward is not None and not (_is_number(reward) and math.isfinite(reward)):
                row = _excerpt(prompts[i], completions[i])
                raise RewardError(f"reward {self.__name__} returned {reward!r} for row {i}: {row}")
        return results

    def _failure(
        self,
        arguments: dict[str, Any],
        prompts: list[Any],
        completions: list[Any],
        error: Exception,
    ) -> str:
        """Return a message with the row that fails, found by trying each row alone."""
        where, count = "", len(completions)
        for i in range(count):
            alone = {
                key: [value[i]] if isinstance(value, list) and len(value) == count else value
                for key, value in arguments.items()
            }
            try:
                self.function(**alone)
            except Exception as row_error:
                error = row_error
                where = f" on row {i} of the batch: {_excerpt(prompts[i], completions[i])}"
                break
        return f"reward {self.__name__} fails{where}: {type(error).__name__}: {error}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (hasattr(value, "item") and value.ndim == 0)


def _excerpt(prompt: Any, completion: Any) -> str:
    return f"prompt {str(prompt)[-120:]!r}, completion {str(completion)[:120]!r}"


class AdapterReward:
    """A reward adapter's scores, on the run's base, or on a second base if the first one trains."""

    def __init__(self, path: str, cfg: DictConfig, model: Any, tokenizer: Any, name: str) -> None:
        """Put the adapter on the base.

        Raises:
            ConfigError: there is no adapter, or it is of another base.
        """
        self.tokenizer, self.__name__ = tokenizer, name
        folder = Path(path).expanduser()
        trained_on = str(adapter_config(path)["base_model_name_or_path"])
        if Path(trained_on).name != Path(cfg.model.path).name:
            text = f"{path} was trained on {trained_on}, not on {cfg.model.path}"
            raise ConfigError([("algorithm.rewards", text)])
        self.model, self.adapter = model, name
        try:
            if not is_adapted(model):  # the base itself trains; the reward needs a frozen one
                self.model = _second_base(cfg)
            self.head = add_saved(self.model, folder, name)
        except AdapterError as error:
            raise ConfigError([("algorithm.rewards", str(error))]) from error

    def check(self, rows: Iterable[Row]) -> None:
        """Scores need no column."""

    @torch.no_grad()
    def __call__(
        self, prompts: list[Any], completions: list[Any], tools: list[Any] | None = None, **_: Any
    ) -> list[float]:
        """Return the scores of whole texts, tokenised as in the reward adapter's training."""
        whole = list(zip(prompts, completions, tools or [None] * len(prompts), strict=True))
        parts: list[Tensor] = []
        training = self.model.training
        self.model.eval()
        body = self.model.get_base_model().base_model
        with using(self.model, self.adapter), autocast(self.model):
            for i in range(0, len(prompts), BATCH):
                ids = [self._encode(*row) for row in whole[i : i + BATCH]]
                inputs = self.tokenizer.pad(
                    {"input_ids": ids}, padding_side="right", return_tensors="pt"
                ).to(self.model.device)
                hidden = body(**inputs, use_cache=False).last_hidden_state
                parts.append(score(hidden, inputs["attention_mask"], self.head))
        self.model.train(training)
        scores: list[float] = torch.cat(parts).tolist()
        return scores

    def _encode(self, prompt: Any, completion: Any, tools: Any) -> list[int]:
        if isinstance(prompt, str):
            return text_ids(prompt + completion, self.tokenizer)
        ids: list[int] = self.tokenizer.apply_chat_template(
            [*prompt, *completion], tools=tools, return_dict=True
        )["input_ids"]
        return ids


def _second_base(cfg: DictConfig) -> Any:
    """Load the base again, wrapped so that an adapter can be put on it."""
    import peft

    base: Base = base_of(cfg)
    if world.in_step:  # then a base is loaded to be shared out, which this one is not
        base.model.to(device())
    return peft.get_peft_model(base.model, peft.LoraConfig(r=1, target_modules="all-linear"))


def rewards(cfg: DictConfig, base: Base, model: Any, rows: Rows) -> list[Any]:
    """Return the rewards of `algorithm.rewards`: functions, factories with arguments, adapters.

    Raises:
        ConfigError: an entry is not trusted, or makes no reward.
        DataError: a function needs a column that the rows do not have.
    """
    built: list[Any] = []
    faults = [fault for fault in untrusted(plain(cfg)) if fault[0].startswith("algorithm.rewards")]
    if faults:
        raise ConfigError(faults)
    for i, entry in enumerate(cfg.algorithm.rewards):
        if isinstance(entry, DictConfig):
            try:
                function = build(cfg, f"algorithm.rewards.{i}")
            except Exception as error:
                text = f"{entry['_target_']} makes no reward: {type(error).__name__}: {error}"
                raise ConfigError([(f"algorithm.rewards.{i}", text)]) from error
            name = _unused_name(entry["_target_"].rpartition(".")[2], built)
            built.append(Reward(function, name))
        elif is_path(entry):
            check_start_base("algorithm.rewards", entry, base.revision)
            name = _unused_name("reward_adapter", built)
            built.append(AdapterReward(entry, cfg, model, base.tokenizer, name))
        else:
            module, _, name = entry.rpartition(".")
            function = getattr(importlib.import_module(module), name)
            built.append(Reward(function, _unused_name(name, built)))
    for reward in built:
        reward.check(chain(rows.train, rows.eval))
    return built


def _unused_name(name: str, others: list[Any]) -> str:
    """Return a name that no other reward has, for its metrics."""
    taken = {reward.__name__ for reward in others}
    return next(n for n in [name, *(f"{name}_{i}" for i in range(2, 100))] if n not in taken)
