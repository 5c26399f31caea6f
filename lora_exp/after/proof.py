"""The numeric proof of a merge: the merged model, compared with the adapter on its base."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_exp.after.combination import combine
from lora_exp.after.difference import AdapterOff, Difference, Response, compare, force, respond
from lora_exp.after.loading import Loaded, in_floats, load, load_base, tokenizer_of
from lora_exp.after.merging import identity
from lora_exp.after.prompts import prompts_of, read
from lora_exp.after.rounding import rounding_effect
from lora_exp.after.saved import MERGE_RECORD, Saved, find, read_json
from lora_exp.after.tolerance import TOLERANCE, Proof
from lora_exp.after.weighted_sum import WeightedSum
from lora_exp.data.template import render_chat
from lora_exp.errors import AdapterError, SavedError
from lora_exp.files.revision import named
from lora_exp.model.loading import Base
from lora_exp.model.memory import give_back
from lora_exp.model.precision import computes_in_float64, computing_in
from lora_exp.model.quantised import exact_products
from lora_exp.record.console import tracked
from lora_exp.record.progress import quiet
from lora_exp.training.answers import room

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
ROWS = 16  # prompts of a run's samples that are used at most


def prove(
    merged: str | Path,
    adapters: Sequence[str | Path],
    base: str | None = None,
    quant: str | None = None,
    prompts: str | Path | None = None,
    max_new_tokens: int = 32,
) -> Proof:
    """Compare a merged model with the adapter on its base, on the same prompts.

    Args:
        merged: the merged model's folder.
        adapters: the adapter, or its run; if several were merged, all of them, in their order.
        base: the location of the base, if not the one that the adapter names.
        quant: how the reference's base is quantised; None: as the record of the merge says.
        prompts: a JSON Lines file with a `prompt` in each row; None: those of the run's samples,
            or a few built-in ones.
        max_new_tokens: of each greedy answer.

    Raises:
        SavedError: one of them is missing.
        AdapterError: the merged model has another vocabulary, or was made from other adapters.
    """
    quiet()
    merged_model, several = find(merged), [find(path) for path in adapters]
    _check_paths(merged_model, several)
    record = _merge_record(merged_model, several)
    base = base or _merged_base(record, several[0])
    dtype = _stored_dtype(merged_model)
    base_model, reference = _reference(record, several, base, quant)
    exact = dtype == "float32" and computes_in_float64(base_model.model.eval())
    precision = torch.float64 if exact else torch.float32
    loaded, adapter_off = _adapted(record, several, base_model, precision)
    prompt_ids = _prompt_ids(several[0], loaded, prompts, max_new_tokens)
    expected = [
        respond(loaded.model, ids, max_new_tokens, adapter_off=adapter_off)
        for ids in tracked(prompt_ids, "adapter on its base")
    ]
    del loaded, base_model, adapter_off
    gc.collect()
    give_back()
    model = computing_in(precision, load_base(merged_model, None, "none", "float32").model.eval())
    _check_vocabulary(model, expected)
    differences = [
        compare(response, respond(model, response.prompt, max_new_tokens, response))
        for response in tracked(expected, "merged model")
    ]
    proof = _proof(expected, differences, dtype, str(precision).removeprefix("torch."), reference)
    if proof.holds:
        return proof
    forced = [force(model, response) for response in expected]
    return replace(proof, rounding=rounding_effect(model, forced, getattr(torch, dtype)))


def _check_paths(merged_model: Saved, several: list[Saved]) -> None:
    for saved in several:
        if saved.adapter is None:
            text = "is a whole model; --adapter takes an adapter or its run"
            raise SavedError(f"{saved.folder} {text}")
    if merged_model.adapter is not None:
        text = "is an adapter; the first path must be the merged model"
        raise SavedError(f"{merged_model.folder} {text}")


def _merge_record(merged: Saved, several: list[Saved]) -> dict[str, Any]:
    """Return the record of a merge; empty for merges by other programs, which write none.

    Raises:
        AdapterError: the model was merged from other adapters.
    """
    path = merged.folder / MERGE_RECORD
    record = read_json(path) if path.is_file() else {}
    recorded = record.get("adapters", [{}])
    if len(several) != len(recorded) or (
        len(several) > 1
        and [identity(saved)["sha256"] for saved in several]
        != [adapter.get("sha256") for adapter in recorded]
    ):
        names = ", ".join(str(adapter.get("name", "one adapter")) for adapter in recorded)
        text = f"was merged from {names}: give --adapter for each, in this order"
        raise AdapterError(f"{merged.folder} {text}")
    return record


def _merged_base(record: dict[str, Any], first: Saved) -> str | None:
    """Return the base that was merged into, if it was another than the adapter's; None: it was not.

    An adapter that was trained on a quantised base is merged into the original of another name.
    """
    place = (record.get("base") or {}).get("path")
    if place is None or first.record.get("saved_as") is None or place == first.base:
        return None
    return f"{named(first.base)}={place}"


def _reference(
    record: dict[str, Any], several: list[Saved], base: str | None, quant: str | None
) -> tuple[Base, str]:
    """Load the base that was merged into, with exact products, and describe the reference.

    A base with 8-bit layers is dequantised, since these round activations too. So is the base of
    several adapters, since their updates are added to its weights.
    """
    first = several[0]
    if quant is None and record.get("into") == "dequantised":  # as in the run
        loaded_base, quant = load_base(first, base), first.quant
    else:
        quant = quant or "none"
        loaded_base = load_base(first, base, quant, "float32")
    if getattr(loaded_base.model, "is_loaded_in_8bit", False) or len(several) > 1:
        loaded_base = in_floats(loaded_base)
    exact_products(loaded_base.model, torch.float32)
    for parameter in loaded_base.model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.float()
    names = " and ".join(saved.name for saved in several)
    if (method := record.get("method", "cat")) != "cat":
        names += f", combined again by {method}"
    description = f"{names} on {first.base}" + ("" if quant == "none" else f" in {quant}")
    return loaded_base, description


def _adapted(
    record: dict[str, Any], several: list[Saved], base: Base, precision: torch.dtype
) -> tuple[Loaded, AdapterOff | None]:
    """Put the merged adapters on the base, and return a context that switches them off.

    A weighted sum is computed from the adapters' files, without the merge's code. The other methods
    approximate it, some at random, so the adapters are combined again with the merge's code.
    """
    first = several[0]
    if len(several) > 1 and record["method"] == "cat":
        model = computing_in(precision, base.model.eval())
        updates = WeightedSum(model, several, record["weights"])
        return Loaded(first.name, model, tokenizer_of(first, base)), updates.left_out
    loaded = load(first, base)
    if len(several) > 1:
        combine(loaded.model, several, record["weights"], record["method"], record["density"])
    if precision == torch.float64:
        computing_in(precision, loaded.model)
    return loaded, None


def _stored_dtype(saved: Saved) -> str:
    """Return the dtype of a model's weights on disk.

    Raises:
        SavedError: there is no tolerance for this dtype.
    """
    config = read_json(saved.folder / "config.json")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if dtype not in TOLERANCE:
        raise SavedError(f"{saved.folder} is {dtype}; only {', '.join(TOLERANCE)} can be proven")
    return dtype


def _prompt_ids(
    saved: Saved, loaded: Loaded, path: str | Path | None, max_new_tokens: int
) -> list[list[int]]:
    """Return the prompts' tokens, without the first ones where the context is too short."""
    texts = _prompts(saved, loaded.tokenizer, path)
    prompts = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [ids[-room(loaded.model, max_new_tokens) :] for ids in prompts]


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
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    return [render_chat(chat, tokenizer, answer=True) for chat in chats]


def _check_vocabulary(model: Any, expected: list[Response]) -> None:
    expected_size = expected[0].logits_TV.shape[1]
    head = model.get_output_embeddings()
    size = model.config.num_labels if head is None else len(head.weight)
    if size != expected_size:
        text = f"it has {size} outputs, the adapter on its base {expected_size}"
        raise AdapterError(f"the merged model is another one: {text}")


def _proof(
    expected: list[Response],
    differences: list[Difference],
    dtype: str,
    computed_in: str,
    reference: str,
) -> Proof:
    tokens = sum(len(response.logits_TV) for response in expected)
    vocabulary = expected[0].logits_TV.shape[1]
    experts = sum(difference.experts for difference in differences)
    same_experts = sum(difference.same_experts for difference in differences)
    return Proof(
        prompts=len(expected),
        tokens=tokens,
        max_difference=max(difference.largest for difference in differences),
        mean_difference=sum(difference.total for difference in differences) / (tokens * vocabulary),
        kl=max(0.0, sum(difference.kl for difference in differences) / tokens),
        top1_agreement=sum(difference.same_top1 for difference in differences) / tokens,
        same_text=sum(difference.same_text for difference in differences) / len(differences),
        same_experts=same_experts / experts if experts else None,
        largest_logit=max(float(response.logits_TV.abs().max()) for response in expected),
        effect=max(response.effect for response in expected),
        rounding=0.0,
        dtype=dtype,
        computed_in=computed_in,
        reference=reference,
    )
