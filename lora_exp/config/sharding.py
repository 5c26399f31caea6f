"""What the processes of one run share out among them, and what cannot be. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from lora_exp.config.door import Section
from lora_exp.config.processes import SHARED, process_count
from lora_exp.config.ranges import Fault
from lora_exp.errors import did_you_mean

# their update of a number depends on no other, so that each process can make its share of them
ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd")


def sharding(cfg: Any) -> str | None:
    """Return what a settled config's processes share out; None: each has everything."""
    parallel = cfg.get("parallel")  # which configs of earlier versions do not have
    kind = parallel.get("sharding") if parallel else None
    return str(kind) if kind and process_count(cfg) > 1 else None


def shares_all(cfg: Any) -> bool:
    """Return whether a settled config's processes share all weights out: they all train."""
    return sharding(cfg) == "fsdp" and cfg.peft is None


def sharding_faults(cfg: Section) -> Iterator[Fault]:
    """Yield a fault for each setting with which nothing can be shared out."""
    parallel = cfg.get("parallel")
    kind = parallel.get("sharding") if parallel is not None else None
    if kind is None:
        return
    if str(kind) not in SHARED:
        text = f"{kind!r} is none of {', '.join(SHARED)}{did_you_mean(str(kind), SHARED)}"
        yield "parallel.sharding", text
        return
    if kind == "fsdp" and cfg.quant is not None:  # in one process, too: others may have more GPUs
        text = f"{cfg.choices.quant} with fsdp gives wrong numbers (bitsandbytes issue 1945), or"
        text = f"{text} every process keeps all weights (accelerate PR 3987); give parallel=ddp"
        yield "quant", text
    if process_count(cfg) > 1:
        yield from _zero_faults(cfg) if kind == "zero2" else _fsdp_faults(cfg)


def _zero_faults(cfg: Section) -> Iterator[Fault]:
    if find_spec("deepspeed") is None:
        yield "parallel", 'zero2 needs the package deepspeed: pip install "lora-exp[deepspeed]"'
    if cfg.algorithm.trainer._target_ == "lora_exp.algorithm.ppo.PPOTrainer":
        text = "ppo trains in two backward passes, of which DeepSpeed makes two steps"
        yield "parallel", f"zero2: {text}; give parallel=ddp"
    if cfg.peft is not None and cfg.peft._target_ == "peft.AdaLoraConfig":
        text = "adalora needs the gradients after a step, and DeepSpeed has removed them"
        yield "parallel", f"zero2: {text}; give parallel=ddp"
    yield from _optimizer_faults(cfg, "zero2")
    if cfg.train.get("fp16"):
        yield "train.fp16", "zero2 does not scale the loss; give train.bf16=true"


def _optimizer_faults(cfg: Section, kind: str) -> Iterator[Fault]:
    if cfg.train.optim not in ELEMENTWISE:
        text = f"{cfg.train.optim} does not update each number by itself, so it cannot be shared"
        yield "train.optim", f"{text} out with {kind}; give {' or '.join(ELEMENTWISE)}"


def _fsdp_faults(cfg: Section) -> Iterator[Fault]:
    if cfg.algorithm.args.get("precompute_ref_log_probs"):
        key = "algorithm.args.precompute_ref_log_probs"
        yield key, "needs whole weights, which fsdp does not have; give parallel=ddp"
    if cfg.peft is None:
        yield from _whole_faults(cfg)
    elif cfg.peft.get("target_parameters") or "experts" in str(cfg.peft.get("target_modules")):
        text = "adapters of whole parameters need them outside of their layer's pass"
        yield "parallel", f"fsdp: {text}; give parallel=ddp"
    elif cfg.peft._target_ == "peft.AdaLoraConfig":
        yield "parallel", "fsdp: adalora changes weights outside of a pass; give parallel=ddp"
    if cfg.algorithm.task_type == "SEQ_2_SEQ_LM":
        text = "encoder and decoder make passes of their own, and only whole ones are in step"
        yield "parallel", f"fsdp: {text}; give parallel=ddp"


def _whole_faults(cfg: Section) -> Iterator[Fault]:
    """Yield a fault for what needs whole weights in full fine-tuning."""
    if cfg.algorithm.trainer._target_ == "lora_exp.algorithm.ppo.PPOTrainer":
        yield "parallel", "fsdp with peft=none: ppo trains two models; give parallel=ddp"
    elif cfg.algorithm.shape == "prompt" and cfg.algorithm.args.get("beta"):
        text = f"{cfg.choices.algorithm} loads its reference whole; algorithm.args.beta=0"
        yield "parallel", f"fsdp with peft=none: {text}, or parallel=ddp"
    if cfg.algorithm.args.get("sync_ref_model"):
        text = "a reference that is updated cannot be saved by fsdp; give parallel=ddp"
        yield "algorithm.args.sync_ref_model", text
    yield from _optimizer_faults(cfg, "fsdp")
    if cfg.train.get("fp16"):
        yield "train.fp16", "fsdp with peft=none does not scale the loss; give train.bf16=true"
