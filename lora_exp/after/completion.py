"""Answers to a file of prompts: in batches, and after an interruption from where it stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout

from lora_exp.after.loading import Loaded, load, load_base
from lora_exp.after.output import check_file
from lora_exp.after.prompts import Asking, prompts_of, read
from lora_exp.after.saved import Saved, find
from lora_exp.config.resume import changes
from lora_exp.data.reading import files
from lora_exp.data.turns import Row
from lora_exp.errors import DataError, SavedError
from lora_exp.files.lock import hold
from lora_exp.files.whole import sha256, write_whole
from lora_exp.model.loading import Base
from lora_exp.record.console import tracked
from lora_exp.record.progress import quiet
from lora_exp.record.run import versions
from lora_exp.training.answers import batches, ids_of, left, room
from lora_exp.training.answers import generate as answer_batch

log = logging.getLogger("lora_exp")
HASHED = ("prompts", "tokens", "adapter.", "base")  # told without their values


def generate(
    path: str | Path,
    prompts: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    quant: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    as_chat: bool = False,
    force: bool = False,
) -> Path:
    """Answer every prompt of a file; the same call goes on where an interrupted one stopped.

    Args:
        path: a run, an adapter or a whole model.
        prompts: JSON Lines, or a glob, of any format that training takes.
        out: the file to make: the rows as they were, in their order, each with its `completion`; a
            `completion` that a row had is its `expected`.
        base: where the base lies, if not where the adapter says.
        quant: how to hold the base; None: as its run did.
        max_new_tokens: of each answer.
        temperature: 0: the likeliest token each time.
        top_p: the share of the likelihood that is drawn from.
        seed: of what is drawn; the same one gives the same bytes, interrupted or not.
        batch_size: prompts answered at a time; with a temperature it shapes what is drawn.
        as_chat: a `prompt` that is text is a user's turn.
        force: replace `out`, and what was begun with other settings.

    Returns:
        The file.

    Raises:
        SavedError: nothing that answers, `out` is there, or it was begun with other settings.
        DataError: rows that cannot be used, or that the model's context has no room for.
        KeyboardInterrupt: what is done so far lies beside `out`.
    """
    quiet()
    target = Path(out).expanduser()
    check_file(target, force, str(prompts))
    saved = find(path)
    if saved.task_type == "SEQ_CLS":
        text = "gives scores (algorithm=reward), it does not answer; lora-exp evaluate measures it"
        raise SavedError(f"{saved.folder} {text}")
    rows = read(prompts, as_chat)
    found = load_base(saved, base, quant)
    loaded = load(saved, found)
    ids = _tokens(rows, loaded, max_new_tokens)
    settings = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
        "seed": seed, "batch_size": batch_size, "as_chat": as_chat,
    }  # fmt: skip
    asked = {
        "prompts": [sha256(file) for file in files(str(prompts))],
        "tokens": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "quant": quant or saved.quant,
    }
    groups = batches(ids, loaded.model, batch_size)
    part = Part(target, settings | asked | _identity(saved, found), force)
    _answer(part, loaded, [[ids[i] for i in group] for group in groups], settings)
    said = dict(zip(chain(*groups), chain(*part.answers), strict=True))
    answered = [_answered(each.written, said[i]) for i, each in enumerate(rows)]
    write_whole(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answered))
    part.path.unlink()
    return target


def _tokens(rows: list[Asking], loaded: Loaded, max_new_tokens: int) -> list[list[int]]:
    """Return the prompts' tokens, if the context holds each of them and its answer."""
    prompts = prompts_of(rows, loaded.tokenizer)
    ids = [ids_of(prompt, loaded.tokenizer) for prompt in prompts]
    space = room(loaded.model, max_new_tokens)
    long = [(row.where, len(own)) for row, own in zip(rows, ids, strict=True) if len(own) > space]
    if long:
        (where, length), count = long[0], len(long)
        text = f"{length} tokens, and the context holds {space} beside {max_new_tokens} new ones"
        more = f" (and {count - 1} more)" if count > 1 else ""
        raise DataError(f"{where}: {text}{more}; shorten it, or lower --max-new-tokens")
    return ids


def _identity(saved: Saved, base: Base) -> dict[str, Any]:
    """Return what tells weights apart, and all else that shapes what they answer."""
    return {
        "adapter": {file.name: sha256(file) for file in saved.folder.glob("adapter_*")},
        "base": base.revision or base.path,
        "dtype": str(base.model.dtype),
        "device": base.model.device.type,
        "versions": versions(),
    }


class Part:
    """What was answered so far, beside the file to be.

    A line with all that shapes the answers, then a line for each batch: on the disk before the next
    one begins. One process at a time writes it.
    """

    def __init__(self, target: Path, shape: dict[str, Any], force: bool) -> None:
        """Begin, or go on after the last whole line.

        Raises:
            SavedError: it was begun with other settings, is damaged, or is being written.
        """
        self.path = target.with_name(f"{target.name}.part")
        self.answers: list[list[str]] = []
        try:
            self._lock = hold(self.path)
        except Timeout as error:
            raise SavedError(f"{self.path} is being written by another process") from error
        self._file = self.path.open("a+b")
        try:
            self._begin(json.loads(json.dumps(shape)), force)
        except BaseException:
            self.close()
            raise

    def _begin(self, shape: dict[str, Any], force: bool) -> None:
        self._file.seek(0)
        whole, _, _ = self._file.read().rpartition(b"\n")
        lines = whole.splitlines()
        try:
            begun, *self.answers = [json.loads(line) for line in lines] or [shape]
            told = [
                f"{key} changed" if key.startswith(HASHED) else f"{key}: {now}, was {was}"
                for key, (was, now) in changes(begun, shape).items()
            ]
        except (ValueError, AttributeError) as error:
            told = [f"it is damaged ({error})"]
        if told and not force:
            text = f"{'; '.join(told)}; give what it was begun with, or --force to begin anew"
            raise SavedError(f"{self.path} does not go on: {text}")
        if told or not lines:
            self.answers = []
            self._file.truncate(0)
            self._write(shape)
        else:
            self._file.truncate(len(whole) + 1)

    def add(self, texts: list[str]) -> None:
        """Keep a batch's answers."""
        self._write(texts)
        self.answers.append(texts)

    def close(self) -> None:
        """Let others have it."""
        self._file.close()
        self._lock.release()

    def _write(self, what: Any) -> None:
        self._file.write(json.dumps(what).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _answer(
    part: Part, loaded: Loaded, groups: list[list[list[int]]], settings: dict[str, Any]
) -> None:
    """Answer the batches that are left; each draws from random numbers of its own."""
    tokenizer, model = left(loaded.tokenizer), loaded.model
    drawn = {key: settings[key] for key in ("max_new_tokens", "temperature", "top_p")}
    done = len(part.answers)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with loaded.answering(), torch.random.fork_rng(devices):
            for number, prompts in enumerate(tracked(groups[done:], "answers", done), done):
                own = hashlib.sha256(f"{settings['seed']} {number}".encode()).digest()
                torch.manual_seed(int.from_bytes(own[:8], "big"))
                part.add(answer_batch(model, tokenizer, prompts, **drawn))
    except KeyboardInterrupt:
        told = "%d of %d batches are answered; the same command goes on"
        log.warning(told, len(part.answers), len(groups))
        raise
    finally:
        part.close()


def _answered(row: Row, said: str) -> Row:
    known = {"expected": row["completion"]} if "completion" in row else {}
    return row | known | {"completion": said}
