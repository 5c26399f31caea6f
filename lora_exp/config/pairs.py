"""Methods, quantisations and algorithms that do not work together. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig

from lora_exp.config.door import Section
from lora_exp.config.initialization import (
    NEEDS_FLOATS,
    NEEDS_PREPARATION,
    initialization,
    rewrites_base,
    saved_as_plain_lora,
)
from lora_exp.config.ranges import Fault
from lora_exp.files.paths import is_path

QUANTISATIONS = ("nf4", "fp4", "int8")  # options of conf/quant
FLOAT_BASE = ("is initialised from float weights, and a quantised base has none", "quant=none")
# kind of adapter -> quantisation -> why the pair is refused, and the cure; found by running them
REFUSED: dict[str, dict[str, tuple[str, str]]] = {
    "dora": {"int8": ("bitsandbytes drops the scale that the weight's norm needs", "quant=nf4")},
    **{kind: dict.fromkeys(QUANTISATIONS, FLOAT_BASE) for kind in NEEDS_FLOATS},
}
COMPILES = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
PROMPTS = ("peft.PromptTuningConfig", "peft.PromptEncoderConfig", "peft.PrefixTuningConfig")


def pair_faults(cfg: Section) -> Iterator[Fault]:
    """Yield a fault for each combination that does not work, by values, not by options' names."""
    if cfg.quant is not None:
        yield from quantised_faults(cfg, _quantisation(cfg))
        if cfg.model.random_weights:
            text = f"untrained weights cannot be loaded as {_quantisation(cfg)}; quant=none"
            yield "model.random_weights", text
    yield from _moving_reference(cfg)
    arguments = cfg.train, cfg.algorithm.args
    if cfg.batch_invariant and any(section.get(key) for section in arguments for key in COMPILES):
        text = "torch_compile makes kernels of its own, with other bits; leave one out"
        yield "batch_invariant", text
    if cfg.peft is None:
        return
    if cfg.peft._target_ == "peft.AdaLoraConfig" and cfg.train.get("load_best_model_at_end"):
        text = "best, but adalora moves its ranks, and its checkpoints lack a part of that state"
        yield "keep", f"{text}; keep=last, and leave train.load_best_model_at_end out"
    if cfg.model.get("add_tokens") and cfg.peft._target_ != "peft.LoraConfig":
        text = f"{cfg.choices.peft} cannot train the embeddings of new tokens; peft=lora, or none"
        yield "model.add_tokens", text
    init = initialization(cfg.peft)
    if init in NEEDS_PREPARATION:
        yield "peft.init_lora_weights", f"{init} needs a preparation that a run does not make"
    patterns = cfg.peft.get("rank_pattern") or cfg.peft.get("alpha_pattern")
    if saved_as_plain_lora(cfg.peft) and cfg.peft.get("use_rslora") and patterns:
        text = "with rank or alpha patterns cannot be saved as plain LoRA"
        yield "peft.use_rslora", f"{init} {text}"
    is_prompt_method = cfg.peft._target_ in PROMPTS
    if _shares_base(cfg):
        if rewriter := rewrites_base(cfg.peft):
            text = f"{rewriter} rewrites the base, but reference, value or reward need the original"
            yield "peft", f"{text}; peft=lora"
        if is_prompt_method or cfg.peft._target_ == "peft.AdaLoraConfig":
            text = f"{cfg.choices.peft} allows one adapter on a base; reference, value or reward"
            text += " would be a second"
            yield "peft", f"{text}; peft=lora"
    if cfg.peft._target_ == "peft.PrefixTuningConfig" and cfg.train.gradient_checkpointing:
        yield "train.gradient_checkpointing", "prefix_tuning's keys do not survive it; give false"
    if is_prompt_method and cfg.algorithm.args.get("packing"):
        text = "after trained virtual tokens, packed rows would attend to each other; give false"
        yield "algorithm.args.packing", text


def quantised_faults(cfg: DictConfig | Section, quant: str, saved: bool = False) -> Iterator[Fault]:
    """Yield a fault for each reason why a method cannot train on a quantised base.

    Args:
        cfg: the run's.
        quant: nf4, fp4, int8, or another method of a base that was saved quantised.
        saved: whether the base was saved so, and `quant` is not the run's own.
    """
    if cfg.peft is None:
        text = f"none trains every weight, but {quant} weights cannot be trained"
        yield "peft", f"{text}; {_cure('quant=none', saved)}"
        return
    init = initialization(cfg.peft)
    for kind in ("dora", init) if cfg.peft.get("use_dora") else (init,):
        if quant in REFUSED.get(kind, {}):
            text, cure = REFUSED[kind][quant]
            yield "peft", f"{kind} on {quant}: {text}; {_cure(cure, saved)}"


def _cure(cure: str, saved: bool) -> str:
    return f"take the base's unquantised original, with {cure}" if saved else cure


def _moving_reference(cfg: Section) -> Iterator[Fault]:
    args, key = cfg.algorithm.args, "algorithm.args.sync_ref_model"
    if not args.get("sync_ref_model"):
        return
    if cfg.peft is not None:
        yield key, "the reference is the base without its adapter, and cannot move; peft=none"
    if args.get("precompute_ref_log_probs"):
        yield key, "what is computed before training cannot move; precompute_ref_log_probs=false"
    if args.get("beta") == 0:
        yield key, "with beta 0 there is no reference"


def _shares_base(cfg: Section) -> bool:
    """Return whether a run uses the base with other adapters, or without an adapter, too."""
    args, rewards = cfg.algorithm.args, cfg.algorithm.get("rewards") or ()
    reward_adapter = any(isinstance(name, str) and is_path(name) for name in rewards)
    ppo = cfg.algorithm.trainer._target_ == "lora_exp.algorithm.ppo.PPOTrainer"
    return bool("beta" in args and args.beta) or ppo or reward_adapter


def _quantisation(cfg: Section) -> str:
    if cfg.quant is None:
        return "none"
    return str(cfg.quant.get("quant_type", "int8"))
