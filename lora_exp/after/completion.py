"""Answers to a file of prompts, in batches; an interrupted file is continued."""

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
from lora_exp.after.prompts import PromptRow, prompts_of, read
from lora_exp.after.saved import Saved, find
from lora_exp.config.resume import changes
from lora_exp.data.reading import files
from lora_exp.data.turns import Row
from lora_exp.errors import DataError, SavedError
from lora_exp.files.lock import hold
from lora_exp.files.strict import dumps
from lora_exp.files.whole import sha256, write_whole
from lora_exp.model.determinism import forked_random_state
from lora_exp.model.loading import Base
from lora_exp.record.conditions import versions
from lora_exp.record.console import tracked
from lora_exp.record.progress import quiet
from lora_exp.training.answers import batches, ids_of, room
from lora_exp.training.answers import generate as answer_batch

log = logging.getLogger("lora_exp")
HASHED = ("prompts", "tokens", "adapter.", "base")  # reported without their values


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
    """Answer every prompt of a file; the same call continues an interrupted one.

    Args:
        path: a run, an adapter or a whole model.
        prompts: JSON Lines, or a glob, of any format that training takes.
        out: the file to make: the rows in their order, each with its answer as `completion`; the
            known answer of a row becomes `expected`.
        base: the location of the base, if not the one that the adapter names.
        quant: how to quantise the base; None: as in its run.
        max_new_tokens: of each answer.
        temperature: 0: greedy answers.
        top_p: the share of the probability to sample from.
        seed: of sampling; the same seed gives the same bytes, interrupted or not.
        batch_size: prompts answered at a time; it changes what is sampled.
        as_chat: treat a `prompt` that is text as a user's turn; always, if its run did so.
        force: replace `out`, and an interrupted file of other settings.

    Returns:
        The file.

    Raises:
        SavedError: the model does not answer, or `out` exists or was begun with other settings.
        DataError: rows cannot be used, or do not fit the model's context.
        KeyboardInterrupt: the answers so far are kept in a file beside `out`.
    """
    quiet()
    target = Path(out).expanduser()
    check_file(target, force, str(prompts))
    settings = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
        "seed": seed, "batch_size": batch_size, "as_chat": as_chat,
    }  # fmt: skip
    _complete(_find_generative(path), prompts, target, settings, base, quant, force)
    return target


def _find_generative(path: str | Path) -> Saved:
    saved = find(path)
    if saved.task_type == "SEQ_CLS":
        text = "gives scores (algorithm=reward), it does not answer; lora-exp evaluate measures it"
        raise SavedError(f"{saved.folder} {text}")
    return saved


def _complete(
    saved: Saved,
    prompts: str | Path,
    target: Path,
    settings: dict[str, Any],
    base: str | None,
    quant: str | None,
    force: bool,
) -> None:
    """Answer the prompts, and write the answers to the target; see `generate`."""
    settings = settings | {"as_chat": settings["as_chat"] or saved.as_chat}
    rows = read(prompts, settings["as_chat"])
    loaded_base = load_base(saved, base, quant)
    loaded = load(saved, loaded_base)
    ids = _tokens(rows, loaded, settings["max_new_tokens"])
    inputs = {
        "prompts": [sha256(file) for file in files(str(prompts))],
        "tokens": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "quant": quant or saved.quant,
    }
    groups = batches(ids, loaded.model, settings["batch_size"])
    part = Part(target, settings | inputs | _identity(saved, loaded_base), force)
    _answer(part, loaded, [[ids[i] for i in group] for group in groups], settings)
    answers = dict(zip(chain(*groups), chain(*part.answers), strict=True))
    answered = [_answered(row, answers[i]) for i, row in enumerate(rows)]
    write_whole(target, "".join(map(_line, answered)))
    part.path.unlink()


def _tokens(rows: list[PromptRow], loaded: Loaded, max_new_tokens: int) -> list[list[int]]:
    """Return the prompts' tokens.

    Raises:
        DataError: a prompt and its answer do not fit the context.
    """
    prompts = prompts_of(rows, loaded.tokenizer)
    ids = [ids_of(prompt, loaded.tokenizer, loaded.model) for prompt in prompts]
    space = room(loaded.model, max_new_tokens)
    lengths = [(row.where, len(tokens)) for row, tokens in zip(rows, ids, strict=True)]
    too_long = [(where, length) for where, length in lengths if length > space]
    if too_long:
        (where, length), count = too_long[0], len(too_long)
        text = f"{length} tokens, and the context holds {space} beside {max_new_tokens} new ones"
        more = f" (and {count - 1} more)" if count > 1 else ""
        raise DataError(f"{where}: {text}{more}; shorten it, or lower --max-new-tokens")
    return ids


def _identity(saved: Saved, base: Base) -> dict[str, Any]:
    """Return what identifies the weights, and everything else that changes the answers."""
    return {
        "adapter": {file.name: sha256(file) for file in saved.folder.glob("adapter_*")},
        "base": base.revision or base.path,
        "dtype": str(base.model.dtype),
        "device": base.model.device.type,
        "versions": versions(),
    }


class Part:
    """The answers so far, in a file beside the target.

    Its first line has everything that changes the answers; then each batch has a line, which is on
    the disk before the next batch starts. One process at a time writes it.
    """

    def __init__(self, target: Path, conditions: dict[str, Any], force: bool) -> None:
        """Begin, or continue after the last complete line.

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
            self._begin(json.loads(json.dumps(conditions)), force)
        except BaseException:
            self.close()
            raise

    def _begin(self, conditions: dict[str, Any], force: bool) -> None:
        self._file.seek(0)
        whole, _, _ = self._file.read().rpartition(b"\n")
        lines = whole.splitlines()
        try:
            saved, *self.answers = [json.loads(line) for line in lines] or [conditions]
            differences = [
                f"{key} changed" if key.startswith(HASHED) else f"{key}: {now}, was {was}"
                for key, (was, now) in changes(saved, conditions).items()
            ]
        except (ValueError, AttributeError) as error:
            differences = [f"it is damaged ({error})"]
        if differences and not force:
            text = f"{'; '.join(differences)}; give the same settings, or --force to start again"
            raise SavedError(f"{self.path} cannot be continued: {text}")
        if differences or not lines:
            self.answers = []
            self._file.truncate(0)
            self._write(conditions)
        else:
            self._file.truncate(len(whole) + 1)

    def add(self, texts: list[str]) -> None:
        """Save a batch's answers."""
        self._write(texts)
        self.answers.append(texts)

    def close(self) -> None:
        """Close the file, and release its lock."""
        self._file.close()
        self._lock.release()

    def _write(self, line: Any) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _answer(
    part: Part, loaded: Loaded, groups: list[list[list[int]]], settings: dict[str, Any]
) -> None:
    """Answer the remaining batches, each with a random seed of its own."""
    tokenizer, model = loaded.tokenizer, loaded.model
    sampling = {key: settings[key] for key in ("max_new_tokens", "temperature", "top_p")}
    done = len(part.answers)
    try:
        with loaded.answering(), forked_random_state():
            for number, prompts in enumerate(tracked(groups[done:], "answers", done), done):
                digest = hashlib.sha256(f"{settings['seed']} {number}".encode()).digest()
                torch.manual_seed(int.from_bytes(digest[:8], "big"))
                part.add(answer_batch(model, tokenizer, prompts, **sampling))
    except KeyboardInterrupt:
        text = "%d of %d batches are answered; the same command continues"
        log.warning(text, len(part.answers), len(groups))
        raise
    finally:
        part.close()


def _line(row: Row) -> str:
    """Return a row as JSON; of what tables have beside JSON's types, such as dates, the text."""
    return dumps(row, ensure_ascii=False, default=str) + "\n"


def _answered(row: PromptRow, answer: str) -> Row:
    expected = {} if row.expected is None else {"expected": row.expected}
    return row.original | expected | {"completion": answer}
