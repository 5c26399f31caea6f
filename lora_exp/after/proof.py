"""The numeric proof of a merge: base and adapter on one side, the merged model on the other."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from lora_exp.after.loading import in_floats, load, load_base
from lora_exp.after.merging import RECORD
from lora_exp.after.prompts import prompts_of, read
from lora_exp.after.saved import Saved, find
from lora_exp.console import tracked
from lora_exp.display import quiet
from lora_exp.errors import AdapterError, SavedError
from lora_exp.memory import give_back
from lora_exp.model import Base
from lora_exp.template import render_chat

# the largest difference of a logit, as a share of the largest logit, and the least share of
# places where both would say the same token: what rounding the merged weights explains
TOLERANCE = {"float32": (5e-6, 1.0), "bfloat16": (5e-2, 0.9), "float16": (1e-2, 0.97)}
SUMS = 5e-5  # the same for float32 weights beside 4-bit layers, which cannot compute in float64
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
    dtype: str  # of the merged weights
    computed_in: str  # float64 where both sides can: then only the merge differs, not the sums
    reference: str

    @property
    def tolerance(self) -> float:
        """The difference that is let pass."""
        share = TOLERANCE[self.dtype][0]
        if self.dtype == self.computed_in:
            share = SUMS
        return share * max(1.0, self.largest_logit)

    @property
    def holds(self) -> bool:
        """Whether the merged model is the adapter on its base."""
        agree = TOLERANCE[self.dtype][1]
        return self.max_difference <= self.tolerance and self.top1_agreement >= agree

    def values(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self) | {"tolerance": self.tolerance, "holds": self.holds}


@dataclass(frozen=True)
class Seen:
    """What a model makes of a prompt, and answers."""

    ids: list[int]  # prompt and answer
    asked: int  # how many of them are the prompt
    logits_TV: Tensor  # before each next token

    @property
    def answer(self) -> list[int]:
        """The answer's tokens."""
        return self.ids[self.asked :]


def prove(
    merged: str | Path,
    adapter: str | Path,
    base: str | None = None,
    quant: str | None = None,
    prompts: str | Path | None = None,
    max_new_tokens: int = 32,
) -> Proof:
    """Hold a merged model against the adapter on its base: the same prompts through both.

    Args:
        merged: the merged model's folder.
        adapter: the adapter, or its run.
        base: where the base lies, if not where the adapter says.
        quant: how the reference holds the base; None: as the merge says that it took it.
        prompts: a JSON Lines file with a `prompt` in each row; None: those that the run answered,
            or a few of our own.
        max_new_tokens: of each greedy answer.

    Raises:
        SavedError: one of them is missing.
        AdapterError: the merged model has another vocabulary than the base.
    """
    quiet()
    whole_model, saved = find(merged), find(adapter)
    if saved.adapter is None:
        raise SavedError(f"{saved.folder} is a whole model; --adapter takes an adapter or its run")
    if whole_model.adapter is not None:
        raise SavedError(f"{whole_model.folder} is an adapter; the first is the merged model")
    quant = quant or _quant(whole_model, saved)
    dtype = _stored(whole_model)
    reference = _base(saved, base, quant)
    exact = dtype == "float32" and getattr(reference.model, "quantization_method", None) is None
    precision = torch.float64 if exact else torch.float32
    loaded = load(saved, reference)
    if exact:
        loaded.model.to(precision)
    texts = _prompts(saved, loaded.tokenizer, prompts)
    asked = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    expected = [
        _seen(loaded.model, ids, max_new_tokens) for ids in tracked(asked, "adapter on its base")
    ]
    del loaded, reference
    gc.collect()
    give_back()
    model = _base(whole_model, None, "none").model.eval().to(precision)
    compared = []
    for want in tracked(expected, "merged model"):
        got = _seen(model, want.ids[: want.asked], max_new_tokens, want)
        compared.append((want, got))
    told = f"{saved.name} on {saved.base}" + (f" in {quant}" if quant != "none" else "")
    return _proof(compared, dtype, str(precision).removeprefix("torch."), told)


def _stored(saved: Saved) -> str:
    """Return the dtype of a model's weights on disk."""
    config = json.loads((saved.folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype", config.get("torch_dtype", "float32")))


def _base(saved: Saved, base: str | None, quant: str) -> Base:
    """Load a base whose products are as exact as can be.

    That of 8-bit layers is dequantised: they round what flows through them too.
    """
    found = load_base(saved, base, quant, "float32")
    for module in found.model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    return in_floats(found) if quant == "int8" else found


def _quant(merged: Saved, saved: Saved) -> str:
    """Return how the base was held that a merge took: unquantised, or as the adapter's run did."""
    path = merged.folder / RECORD
    into = json.loads(path.read_text(encoding="utf-8")).get("into") if path.is_file() else None
    chosen = saved.settings.get("choices", {}).get("quant", "none")
    return str(chosen) if into == "dequantised" else "none"


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


@torch.no_grad()
def _seen(model: Any, prompt: list[int], new: int, like: Seen | None = None) -> Seen:
    """Answer greedily, then read the logits; of another's answer where one is given."""
    ids = torch.tensor([prompt], device=model.device)
    answered = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
        do_sample=False, temperature=None, top_p=None, top_k=None,
    )[0].tolist()  # fmt: skip
    read = torch.tensor([like.ids if like else answered], device=model.device)
    logits = model(input_ids=read, use_cache=False).logits[0].cpu()
    return Seen(answered, len(prompt), logits)


def _proof(pairs: list[tuple[Seen, Seen]], dtype: str, computed_in: str, reference: str) -> Proof:
    """Sum up; KL(adapter || merged) in nats, averaged over tokens."""
    first, second = pairs[0][0].logits_TV, pairs[0][1].logits_TV
    if first.shape[1] != second.shape[1]:
        sizes = f"{second.shape[1]} tokens, the base has {first.shape[1]}"
        raise AdapterError(f"the merged model is another one: its vocabulary has {sizes}")
    wanted = torch.cat([want.logits_TV for want, _ in pairs])
    found = torch.cat([got.logits_TV for _, got in pairs])
    difference = (wanted - found).abs()
    kl = (wanted.softmax(-1) * (wanted.log_softmax(-1) - found.log_softmax(-1))).sum(-1)
    return Proof(
        prompts=len(pairs),
        tokens=len(wanted),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        kl=float(kl.mean().clamp(min=0)),
        top1_agreement=float((wanted.argmax(-1) == found.argmax(-1)).float().mean()),
        same_text=sum(want.answer == got.answer for want, got in pairs) / len(pairs),
        largest_logit=float(wanted.abs().max()),
        dtype=dtype,
        computed_in=computed_in,
        reference=reference,
    )


class _Ends(LogitsProcessor):  # type: ignore[misc]
    """Say the end token third, to see whether the model's own settings stop there."""

    def __init__(self, end: int, asked: int) -> None:
        self.end, self.at = end, asked + 2

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        if ids_BT.shape[1] == self.at:
            forced = torch.full_like(scores_BV, float("-inf"))
            forced[:, self.end] = 0
            return forced
        barred = scores_BV.clone()
        barred[:, self.end] = float("-inf")
        return barred


def examine(path: str | Path) -> dict[str, str | None]:
    """See whether a model can be used as it lies there.

    Returns:
        What was looked at -> what is wrong with it, or None.

    Raises:
        SavedError: no whole model lies there.
        ConfigError: it cannot be loaded.
    """
    quiet()
    saved = find(path)
    if saved.adapter is not None:
        raise SavedError(f"{saved.folder} is an adapter; check takes a merged or whole model")
    loaded = load(saved, load_base(saved))
    model, tokenizer = loaded.model, loaded.tokenizer
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    found = {"weights are finite": f"{len(bad)} are not, the first is {bad[0]}" if bad else None}
    rows = model.get_input_embeddings().weight.shape[0]
    found["tokenizer fits the embeddings"] = (
        f"{len(tokenizer)} tokens, {rows} embeddings" if len(tokenizer) > rows else None
    )
    if bad or not model.can_generate():
        return found
    return found | _generates(model, tokenizer)


def _generates(model: Any, tokenizer: Any) -> dict[str, str | None]:
    end = tokenizer.eos_token_id
    prompt = torch.tensor([tokenizer("Hello")["input_ids"]], device=model.device)
    told = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        made = model.generate(input_ids=prompt, **told)
        found = {"generates": None if made.shape[1] > prompt.shape[1] else "no token came"}
        if end is None:
            return found | {"ends at EOS": "the tokenizer has no end token"}
        forced = LogitsProcessorList([_Ends(end, prompt.shape[1])])
        ended = model.generate(input_ids=prompt, logits_processor=forced, **told)
    length = ended.shape[1] - prompt.shape[1]
    wrong = (
        f"goes on after {tokenizer.eos_token!r}; generation_config.json has another eos_token_id"
    )
    return found | {"ends at EOS": None if length == 3 else wrong}
