"""A chat with one model or with several on one base: turns, settings, answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from lora_exp.after.loading import Loaded
from lora_exp.data.encoding import text_prompt
from lora_exp.data.template import render_chat
from lora_exp.data.turns import Row
from lora_exp.errors import ConfigError, LoraExpError, SavedError, did_you_mean
from lora_exp.files.whole import write_whole
from lora_exp.model.special_tokens import end_tokens
from lora_exp.training.answers import GREEDY, room

Write = Callable[[str], None]
OFF = "off"  # the name of the base alone among the adapters


@dataclass
class Settings:
    """How answers are sampled."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None  # of each answer; None: answers differ each time

    def change(self, key: str, value: str) -> None:
        """Set one setting from text.

        Raises:
            ConfigError: there is no such setting, or the value is not valid.
        """
        names = [field.name for field in fields(self)]
        if key not in names:
            near = did_you_mean(key, names)
            raise ConfigError([(key, f"no such setting{near}; there are {', '.join(names)}")])
        number_type = float if key in ("temperature", "top_p") else int
        try:
            number = number_type(value)
        except ValueError:
            raise ConfigError([(key, f"{value!r} is no number")]) from None
        in_range = {
            "temperature": number >= 0,
            "top_p": 0 < number <= 1,
            "max_new_tokens": number >= 1,
            "seed": number >= 0,
        }
        if not in_range[key]:
            raise ConfigError([(key, f"{value} is out of range")])
        setattr(self, key, number)


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Writes whole words as they are generated."""

    def __init__(self, tokenizer: Any, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write the text that will not change any more."""
        if text:
            self.write(text)


@dataclass
class Conversation:
    """Turns between a person and the active model."""

    models: dict[str, Loaded]
    active: str
    system: str | None = None
    settings: Settings = field(default_factory=Settings)
    turns: list[Row] = field(default_factory=list)
    dropped: int = 0  # first turns that do not fit the context

    def switch(self, name: str) -> None:
        """Let another model answer from now on.

        Raises:
            SavedError: there is no model of that name.
        """
        if name not in self.models:
            known = ", ".join(self.models)
            near = did_you_mean(name, self.models)
            raise SavedError(f"no adapter {name!r}{near}; there are {known}")
        self.active = name

    def say(self, text: str, write: Write) -> str:
        """Add a user's turn and return the answer, which is also written while it is generated.

        If it is interrupted, the text so far is the answer.

        Raises:
            SavedError: the text does not fit the model's context.
        """
        self.turns.append({"role": "user", "content": text})
        try:
            ids, self.dropped = self._ids(self.models[self.active])
        except BaseException:
            self.turns.pop()
            raise
        parts: list[str] = []

        def keep(part: str) -> None:
            parts.append(part)
            write(part)

        try:
            self._answer(self.models[self.active], ids, keep)
        finally:
            self.turns.append({"role": "assistant", "content": "".join(parts)})
        return "".join(parts)

    def retry(self, write: Write) -> str:
        """Answer the last user's turn again.

        Raises:
            SavedError: there is no turn yet.
        """
        last_turns = self.turns[-2:]
        text = self.undo()
        try:
            return self.say(text, write)
        except LoraExpError:
            self.turns += last_turns
            raise

    def undo(self) -> str:
        """Remove the last user's turn and its answer, and return the user's text.

        Raises:
            SavedError: there is no turn yet.
        """
        if not self.turns:
            raise SavedError("nothing was said yet")
        text = str(self.turns[-2]["content"])
        del self.turns[-2:]
        return text

    def clear(self) -> None:
        """Remove all turns; the system prompt stays."""
        self.turns, self.dropped = [], 0

    def compare(self, text: str) -> dict[str, str]:
        """Return each model's answer, by name; the conversation is not changed."""
        answers: dict[str, str] = {}
        turns = self.turns
        try:
            for name, loaded in self.models.items():
                self.turns = [*turns, {"role": "user", "content": text}]
                parts: list[str] = []
                self._answer(loaded, self._ids(loaded)[0], parts.append)
                answers[name] = "".join(parts)
        finally:
            self.turns = turns
        return answers

    def save(self, path: Path) -> None:
        """Write the conversation as one JSON line, a row in a format that training takes."""
        write_whole(path, json.dumps({"messages": self._messages()}, ensure_ascii=False) + "\n")

    def _messages(self) -> list[Row]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns]

    def _ids(self, loaded: Loaded) -> tuple[list[int], int]:
        """Return the prompt's tokens, and how many of the first turns are left out of them."""
        space = self._prompt_space(loaded)
        if loaded.tokenizer.chat_template is None:  # it completes texts, without turns
            return self._checked(text_prompt(self.turns[-1]["content"], loaded.tokenizer), space), 0
        first = len(self._messages()) - len(self.turns)
        for start in range(0, len(self.turns), 2):
            messages = self._messages()
            recent = messages[:first] + messages[first + start :]
            text = render_chat(recent, loaded.tokenizer, answer=True)
            ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) <= space:
                break
        return self._checked(ids, space), start

    def _checked(self, ids: list[int], space: int) -> list[int]:
        if len(ids) > space:
            raise SavedError(f"{len(ids)} tokens do not fit: the context has room for {space}")
        return ids

    def _prompt_space(self, loaded: Loaded) -> int:
        """Return how many tokens a prompt may have; an answer gets at most half the context."""
        context = room(loaded.model, 0)
        return context - min(self.settings.max_new_tokens, context // 2)

    def _answer(self, loaded: Loaded, ids: list[int], write: Write) -> None:
        settings = self.settings
        sampling = GREEDY | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if settings.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "top_k": 0,
                "num_beams": 1,  # an answer of several beams is not written word by word
            }
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        input_ids = torch.tensor([ids], device=loaded.model.device)
        with loaded.answering():
            loaded.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=min(settings.max_new_tokens, room(loaded.model, len(ids))),
                eos_token_id=end_tokens(loaded.model, loaded.tokenizer),
                pad_token_id=loaded.tokenizer.pad_token_id,
                streamer=_Streamer(loaded.tokenizer, write),
                **sampling,
            )
