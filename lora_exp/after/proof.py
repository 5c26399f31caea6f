"""The numeric proof of a merge: base and adapter on one side, the merged model on the other."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_exp.after.difference import Apart, Bare, Seen, apart, seen
from lora_exp.after.loading import Loaded, in_floats, load, load_base, tokenizer_of
from lora_exp.after.merging import combine, identity
from lora_exp.after.prompts import prompts_of, read
from lora_exp.after.saved import RECORD, Saved, find, read_json
from lora_exp.after.weighted_sum import WeightedSum
from lora_exp.data.template import render_chat
from lora_exp.errors import AdapterError, SavedError
from lora_exp.model.loading import Base, exact_products
from lora_exp.model.memory import give_back
from lora_exp.model.precision import is_quantised
from lora_exp.record.console import tracked
from lora_exp.record.progress import quiet
from lora_exp.training.answers import room

# what rounding the merged weights explains: the largest difference of a logit, in float32 as it
# is and else as a share of the largest logit, and the least share of equal next tokens
TOLERANCE = {"float32": (1e-4, 1.0), "bfloat16": (2e-2, 0.95), "float16": (5e-3, 0.98)}
SUMS = 1e-3  # in float32 beside 4-bit layers, which cannot compute in float64
SHARE = 0.2  # of what the adapter itself changes: more, and the bare base might pass
PROMPTS = (
    "Who are you, and who made you?",
    "Name three colours of the rainbow.",
    "Write one sentence about the sea.",
    "What is 12 plus 30?",
    "Translate 'good morning' into French.",
    "List the days of the week.",
    "Explain in a sentence what a matrix is.",
    "Continue: once upon a time",
)
ROWS = 16  # prompts taken at most of a run's own


@dataclass(frozen=True)
class Proof:
    """How far a merged model is from the adapter on its base, in logits."""

    prompts: int
    tokens: int  # places compared: every prompt's, and the adapter's own answer's
    max_difference: float
    mean_difference: float
    kl: float  # nats a token, of the merged model from the adapter
    top1_agreement: float
    same_text: float  # share of prompts whose greedy answers are equal
    largest_logit: float
    effect: float  # the largest difference that the adapter makes
    dtype: str  # of the merged weights
    computed_in: str  # float64 where both sides can: then only the merge differs, not the sums
    reference: str

    @property
    def tolerance(self) -> float:
        """The difference that is let pass."""
        if self.dtype == "float32":
            share = TOLERANCE["float32"][0] if self.computed_in == "float64" else SUMS
        else:
            share = TOLERANCE[self.dtype][0] * self.largest_logit
        return min(share, SHARE * self.effect) if self.effect else share

    @property
    def holds(self) -> bool:
        """Whether the merged model is the adapter on its base."""
        agree = TOLERANCE[self.dtype][1]
        return self.max_difference <= self.tolerance and self.top1_agreement >= agree

    def values(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self) | {"tolerance": self.tolerance, "holds": self.holds}


def prove(
    merged: str | Path,
    adapters: Sequence[str | Path],
    base: str | None = None,
    quant: str | None = None,
    prompts: str | Path | None = None,
    max_new_tokens: int = 32,
) -> Proof:
    """Hold a merged model against the adapter on its base: the same prompts through both.

    Args:
        merged: the merged model's folder.
        adapters: the adapter, or its run; if several were merged, all of them, in their order.
        base: where the base lies, if not where the adapter says.
        quant: how the reference holds the base; None: as the merge says that it took it.
        prompts: a JSON Lines file with a `prompt` in each row; None: those that the run answered,
            or a few of our own.
        max_new_tokens: of each greedy answer.

    Raises:
        SavedError: one of them is missing.
        AdapterError: the merged model has another vocabulary than the base, or was made of another
            number of adapters.
    """
    quiet()
    whole_model, several = find(merged), [find(path) for path in adapters]
    saved = several[0]
    for each in several:
        if each.adapter is None:
            text = "is a whole model; --adapter takes an adapter or its run"
            raise SavedError(f"{each.folder} {text}")
    if whole_model.adapter is not None:
        raise SavedError(f"{whole_model.folder} is an adapter; the first is the merged model")
    made = _made(whole_model, several)
    dtype = _stored(whole_model)
    reference, told = _reference(made, several, base, quant)
    exact = dtype == "float32" and not is_quantised(reference.model)
    precision = torch.float64 if exact else torch.float32
    loaded, bare = _adapted(made, several, reference, precision)
    texts = _prompts(saved, loaded.tokenizer, prompts)
    asked = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    asked = [ids[-room(loaded.model, max_new_tokens) :] for ids in asked]
    expected = [
        seen(loaded.model, ids, max_new_tokens, bare=bare)
        for ids in tracked(asked, "adapter on its base")
    ]
    del loaded, reference, bare
    gc.collect()
    give_back()
    model = load_base(whole_model, None, "none", "float32").model.eval().to(precision)
    _check_vocabulary(model, expected)
    found = []
    for want in tracked(expected, "merged model"):
        got = seen(model, want.ids[: want.asked], max_new_tokens, want)
        found.append(apart(want, got))
    return _proof(expected, found, dtype, str(precision).removeprefix("torch."), told)


def _made(merged: Saved, several: list[Saved]) -> dict[str, Any]:
    """Return a merged model's record, or nothing: others merge too.

    Raises:
        AdapterError: it was made of other adapters than several, or of more than one.
    """
    path = merged.folder / RECORD
    made = read_json(path) if path.is_file() else {}
    theirs = made.get("adapters", [{}])
    if len(several) != len(theirs) or (
        len(several) > 1
        and [identity(saved)["sha256"] for saved in several]
        != [each.get("sha256") for each in theirs]
    ):
        names = ", ".join(str(each.get("name", "one adapter")) for each in theirs)
        text = f"was merged from {names}: give --adapter for each, in this order"
        raise AdapterError(f"{merged.folder} {text}")
    return made


def _reference(
    made: dict[str, Any], several: list[Saved], base: str | None, quant: str | None
) -> tuple[Base, str]:
    """Load the base as the merge took it, its products as exact as can be, and say how it is held.

    That of 8-bit layers is dequantised: they round what flows through them too. So is that of
    several adapters, whose updates are added to its weights.
    """
    saved = several[0]
    if quant is None and made.get("into") == "dequantised":  # as the run held it
        found, held = load_base(saved, base), saved.quant
    else:
        held = quant or "none"
        found = load_base(saved, base, held, "float32")
    if getattr(found.model, "is_loaded_in_8bit", False) or len(several) > 1:
        found = in_floats(found)
    exact_products(found.model, torch.float32)
    for parameter in found.model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.float()
    names = " and ".join(each.name for each in several)
    if (method := made.get("method", "cat")) != "cat":
        names += f", combined again by {method}"
    return found, f"{names} on {saved.base}" + ("" if held == "none" else f" in {held}")


def _adapted(
    made: dict[str, Any], several: list[Saved], reference: Base, precision: torch.dtype
) -> tuple[Loaded, Bare | None]:
    """Put what was merged on the reference's base, and say how to compute without it.

    A weighted sum is computed here from the adapters' files, by none of the merge's code. The
    other methods approximate it, some at random: they are combined again as the merge does it.
    """
    first = several[0]
    if len(several) > 1 and made["method"] == "cat":
        model = reference.model.eval().to(precision)
        added = WeightedSum(model, several, made["weights"])
        return Loaded(first.name, model, tokenizer_of(first, reference)), added.left_out
    loaded = load(first, reference)
    if len(several) > 1:
        combine(loaded.model, several, made["weights"], made["method"], made["density"])
    if precision == torch.float64:
        loaded.model.to(precision)
    return loaded, None


def _stored(saved: Saved) -> str:
    """Return the dtype of a model's weights on disk.

    Raises:
        SavedError: it is none that is proven.
    """
    config = read_json(saved.folder / "config.json")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if dtype not in TOLERANCE:
        raise SavedError(f"{saved.folder} is {dtype}; proven are {', '.join(TOLERANCE)}")
    return dtype


def _prompts(saved: Saved, tokenizer: Any, path: str | Path | None) -> list[str]:
    if path is not None:
        return [prompt.text for prompt in prompts_of(read(path), tokenizer)]
    samples = saved.run / "samples.jsonl" if saved.run else None
    if samples is not None and samples.is_file():
        lines = samples.read_text(encoding="utf-8").split("\n")
        if texts := [json.loads(line)["prompt"] for line in lines if line]:
            return texts[:ROWS]
    if tokenizer.chat_template is None:
        return list(PROMPTS)
    turns = [[{"role": "user", "content": text}] for text in PROMPTS]
    return [render_chat(turn, tokenizer, answer=True) for turn in turns]


def _check_vocabulary(model: Any, expected: list[Seen]) -> None:
    words = expected[0].logits_TV.shape[1]
    head = model.get_output_embeddings()
    own = model.config.num_labels if head is None else len(head.weight)
    if own != words:
        text = f"it tells {own} tokens apart, the adapter on its base {words}"
        raise AdapterError(f"the merged model is another one: {text}")


def _proof(
    expected: list[Seen], found: list[Apart], dtype: str, computed_in: str, reference: str
) -> Proof:
    tokens = sum(len(want.logits_TV) for want in expected)
    width = expected[0].logits_TV.shape[1]
    return Proof(
        prompts=len(expected),
        tokens=tokens,
        max_difference=max(each.largest for each in found),
        mean_difference=sum(each.total for each in found) / (tokens * width),
        kl=max(0.0, sum(each.kl for each in found) / tokens),
        top1_agreement=sum(each.agree for each in found) / tokens,
        same_text=sum(each.same_text for each in found) / len(found),
        largest_logit=max(float(want.logits_TV.abs().max()) for want in expected),
        effect=max(want.effect for want in expected),
        dtype=dtype,
        computed_in=computed_in,
        reference=reference,
    )
