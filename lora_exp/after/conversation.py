"""A chat with one model or several on one base: turns, settings, and what each would answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from lora_exp.after.loading import Loaded
from lora_exp.data.template import render_chat
from lora_exp.data.turns import Row
from lora_exp.errors import ConfigError, LoraExpError, SavedError, did_you_mean
from lora_exp.files.whole import write_whole
from lora_exp.model.special_tokens import end_tokens
from lora_exp.training.answers import room

Write = Callable[[str], None]
OFF = "off"  # the bare base, among adapters


@dataclass
class Settings:
    """How answers are drawn."""

    temperature: float = 0.0  # 0: the likeliest token each time
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None  # of each answer; None: another one each time

    def change(self, key: str, value: str) -> None:
        """Set one of them from text.

        Raises:
            ConfigError: no such setting, or no such value.
        """
        known = [each.name for each in fields(self)]
        if key not in known:
            near = did_you_mean(key, known)
            raise ConfigError([(key, f"no such setting{near}; there are {', '.join(known)}")])
        kind = float if key in ("temperature", "top_p") else int
        try:
            number = kind(value)
        except ValueError:
            raise ConfigError([(key, f"{value!r} is no number")]) from None
        good = {
            "temperature": number >= 0,
            "top_p": 0 < number <= 1,
            "max_new_tokens": number >= 1,
            "seed": number >= 0,
        }
        if not good[key]:
            raise ConfigError([(key, f"{value} is out of range")])
        setattr(self, key, number)


class _Written(TextStreamer):  # type: ignore[misc]
    """Hands on whole words as they come."""

    def __init__(self, tokenizer: Any, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write what is certain by now."""
        if text:
            self.write(text)


@dataclass
class Conversation:
    """Turns between a person and the model that is switched on."""

    models: dict[str, Loaded]
    active: str
    system: str | None = None
    settings: Settings = field(default_factory=Settings)
    turns: list[Row] = field(default_factory=list)
    dropped: int = 0  # turns at the beginning that the context has no room for

    def switch(self, name: str) -> None:
        """Let another model answer from now on.

        Raises:
            SavedError: there is none of that name.
        """
        if name not in self.models:
            known = ", ".join(self.models)
            near = did_you_mean(name, self.models)
            raise SavedError(f"no adapter {name!r}{near}; there are {known}")
        self.active = name

    def say(self, text: str, write: Write) -> str:
        """Say something and return the answer, written as it comes.

        If it is interrupted, what was said so far stays as the answer.

        Raises:
            SavedError: it is longer than the model's context.
        """
        self.turns.append({"role": "user", "content": text})
        try:
            ids, self.dropped = self._ids(self.models[self.active])
        except BaseException:
            self.turns.pop()
            raise
        said: list[str] = []

        def keep(part: str) -> None:
            said.append(part)
            write(part)

        try:
            self._answer(self.models[self.active], ids, keep)
        finally:
            self.turns.append({"role": "assistant", "content": "".join(said)})
        return "".join(said)

    def retry(self, write: Write) -> str:
        """Have the last thing said answered again.

        Raises:
            SavedError: nothing was said yet.
        """
        kept = self.turns[-2:]
        said = self.undo()
        try:
            return self.say(said, write)
        except LoraExpError:
            self.turns += kept
            raise

    def undo(self) -> str:
        """Take back the last thing said and its answer, and return what was said.

        Raises:
            SavedError: nothing was said yet.
        """
        if not self.turns:
            raise SavedError("nothing was said yet")
        said = str(self.turns[-2]["content"])
        del self.turns[-2:]
        return said

    def clear(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.turns, self.dropped = [], 0

    def compare(self, text: str) -> dict[str, str]:
        """Return what each model would answer now; the conversation stays as it is."""
        found: dict[str, str] = {}
        kept = self.turns
        try:
            for name, loaded in self.models.items():
                self.turns = [*kept, {"role": "user", "content": text}]
                said: list[str] = []
                self._answer(loaded, self._ids(loaded)[0], said.append)
                found[name] = "".join(said)
        finally:
            self.turns = kept
        return found

    def save(self, path: Path) -> None:
        """Write the conversation as one JSON line, which is a row that training takes."""
        write_whole(path, json.dumps({"messages": self._messages()}, ensure_ascii=False) + "\n")

    def _messages(self) -> list[Row]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns]

    def _ids(self, loaded: Loaded) -> tuple[list[int], int]:
        """Return the prompt's tokens and how many turns, at its beginning, they leave out."""
        space = self._room(loaded)
        if loaded.tokenizer.chat_template is None:  # it completes texts, and knows no turns
            return self._fitting(loaded.tokenizer(self.turns[-1]["content"])["input_ids"], space), 0
        first = len(self._messages()) - len(self.turns)
        for start in range(0, len(self.turns), 2):
            messages = self._messages()
            kept = messages[:first] + messages[first + start :]
            text = render_chat(kept, loaded.tokenizer, answer=True)
            ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) <= space:
                break
        return self._fitting(ids, space), start

    def _fitting(self, ids: list[int], space: int) -> list[int]:
        if len(ids) > space:
            raise SavedError(f"{len(ids)} tokens do not fit: the context has room for {space}")
        return ids

    def _room(self, loaded: Loaded) -> int:
        """Return how many tokens are the prompt's; an answer has half the context at most."""
        whole = room(loaded.model, 0)
        return whole - min(self.settings.max_new_tokens, whole // 2)

    def _answer(self, loaded: Loaded, ids: list[int], write: Write) -> None:
        settings = self.settings
        drawn: dict[str, Any] = {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }
        if settings.temperature > 0:
            drawn = {
                "do_sample": True,
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "top_k": 0,
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
                streamer=_Written(loaded.tokenizer, write),
                **drawn,
            )
