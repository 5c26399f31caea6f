"""Mistakes inside arguments: those of a scheduler or optimizer, and packages that they need.

As read in transformers 5.23, `optimization.py` and `trainer_optimizer.py`; a test holds the tables
against their source. Needs no torch.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig

from lora_exp.config.ranges import Fault, is_number
from lora_exp.config.signature import fits, signature, texts
from lora_exp.errors import did_you_mean

OPTIMIZATION = "transformers.optimization."
# scheduler -> the function or class that takes `lr_scheduler_kwargs`; None: it takes none
SCHEDULERS = {
    "constant": None,
    "constant_with_warmup": None,
    "linear": f"{OPTIMIZATION}get_linear_schedule_with_warmup",
    "cosine": f"{OPTIMIZATION}get_cosine_schedule_with_warmup",
    "cosine_with_restarts": f"{OPTIMIZATION}get_cosine_with_hard_restarts_schedule_with_warmup",
    "polynomial": f"{OPTIMIZATION}get_polynomial_decay_schedule_with_warmup",
    "inverse_sqrt": f"{OPTIMIZATION}get_inverse_sqrt_schedule",
    "cosine_with_min_lr": f"{OPTIMIZATION}get_cosine_with_min_lr_schedule_with_warmup",
    "cosine_warmup_with_min_lr": (
        f"{OPTIMIZATION}get_cosine_with_min_lr_schedule_with_warmup_lr_rate"
    ),
    "warmup_stable_decay": f"{OPTIMIZATION}get_wsd_schedule",
    "reduce_lr_on_plateau": "torch.optim.lr_scheduler.ReduceLROnPlateau",
    "greedy": f"{OPTIMIZATION}GreedyLR",
}
ITS_OWN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "self")
NEEDED = {  # one of these has to be there
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
JUDGING = ("reduce_lr_on_plateau", "greedy")  # they follow evaluations
# how an optimizer's name begins -> what its `optim_args` may say
OPTIM_ARGS = {
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop_bnb": (),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
    "ademamix": ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3"),
    "paged_ademamix": ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3"),
    "adamw_anyprecision": (
        "use_kahan_summation", "momentum_dtype", "variance_dtype", "compensation_buffer_dtype",
    ),
    "galore": ("rank", "update_proj_gap", "scale", "proj_type"),
    "apollo": ("rank", "proj", "scale_type", "update_proj_gap", "scale", "proj_type"),
    "grokadamw": (
        "alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping",
    ),
    "stable_adamw": ("max_lr", "kahan_sum", "decouple_lr"),
    "schedule_free": ("weight_lr_power", "r"),
    "adamw_torch_4bit": ("block_size", "bf16_stochastic_round"),
    "adamw_torch_8bit": ("block_size", "bf16_stochastic_round"),
}  # fmt: skip
WORDS = {
    "nesterov", "centered", "use_kahan_summation", "momentum_dtype", "variance_dtype",
    "compensation_buffer_dtype", "proj_type", "proj", "scale_type", "kahan_sum", "decouple_lr",
    "bf16_stochastic_round",
}  # fmt: skip
CHOICES = {  # words that a scheduler's argument may be
    "warmup_type": ("linear", "cosine", "1-sqrt"),
    "decay_type": ("linear", "cosine", "1-sqrt"),
    "mode": ("min", "max"),
    "threshold_mode": ("rel", "abs"),
}
BELOW_ONE = ("adam_beta1", "adam_beta2", "label_smoothing_factor")
NOT_NEGATIVE = (
    "weight_decay", "max_grad_norm", "warmup_steps", "eval_delay", "neftune_noise_alpha",
    "dataloader_num_workers",
)  # fmt: skip
ABOVE_ZERO = ("adam_epsilon", "eval_steps")
LOW_RANK = ("galore", "apollo")  # they alone read `optim_target_modules`
# how an optimizer's name begins -> the module that it needs, and the package that has it
OPTIMIZER_PACKAGES = {
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "adalomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_torch_xla": ("torch_xla", "torch-xla"),
    "adamw_torch_npu_fused": ("torch_npu", "torch-npu"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
}
# key -> the module that it needs where it is on, and the package that has it
PACKAGES = {
    "use_liger_kernel": ("liger_kernel", "liger-kernel"),
    "use_vllm": ("vllm", "vllm"),
}


def arguments(cfg: DictConfig) -> Iterator[Fault]:
    """Yield a fault for each mistake inside an argument, and each package that is missing."""
    settings = {f"algorithm.args.{key}": value for key, value in cfg.algorithm.args.items()}
    settings |= {f"train.{key}": value for key, value in cfg.train.items()}
    named = {key.rpartition(".")[2]: (key, value) for key, value in settings.items()}
    yield from _numbers(named)
    yield from _scheduler(named)
    yield from _optimizer(named)
    yield from _packages(cfg, named)
    yield from _best(cfg, named)


def _scheduler(named: Mapping[str, tuple[str, Any]]) -> Iterator[Fault]:
    _, kind = named.get("lr_scheduler_type", ("", None))
    key, given = named.get("lr_scheduler_kwargs", ("train.lr_scheduler_kwargs", None))
    if kind not in SCHEDULERS:
        return
    if kind in JUDGING and named.get("eval_strategy", ("", "no"))[1] == "no":
        yield "train.lr_scheduler_type", f"{kind} follows evaluations; give train.eval_strategy"
    if given is not None and not isinstance(given, DictConfig):
        if isinstance(given, str):
            yield key, f"is not a section; give {key}={{name: value}}"
        return
    given = {str(name): value for name, value in (given or {}).items()}
    target = SCHEDULERS[kind]
    known = signature(target) if target else None
    takes = {k: v for k, v in known.arguments.items() if k not in ITS_OWN} if known else {}
    for name, value in given.items():
        if name not in takes:
            near = did_you_mean(str(name), takes) or f"; it takes {', '.join(takes) or 'none'}"
            yield f"{key}.{name}", f"{kind} has no such argument{near}"
        elif not fits(value, takes[str(name)]) or value not in CHOICES.get(str(name), [value]):
            words = CHOICES.get(str(name)) or [ast.unparse(takes[str(name)] or ast.Constant(None))]
            yield f"{key}.{name}", f"{value!r} is not {' or '.join(words)}"
    if is_number(given.get("factor")) and not 0 < given["factor"] < 1:
        yield f"{key}.factor", f"{given['factor']} is not above 0 and below 1"
    rate = named.get("learning_rate", ("", None))[1]
    if is_number(given.get("lr_end")) and is_number(rate) and not given["lr_end"] < rate:
        yield f"{key}.lr_end", f"{given['lr_end']} is not below the learning rate, {rate}"
    needed = NEEDED.get(str(kind), ())
    count = sum(given.get(name) is not None for name in needed)
    if needed and count != 1:
        text = f"{kind} needs {'one of ' if len(needed) > 1 else ''}{', '.join(needed)}"
        yield key, f"{text}: '+{key}={{{needed[-1]}: ...}}'"


def _optimizer(named: Mapping[str, tuple[str, Any]]) -> Iterator[Fault]:
    kind = str(named.get("optim", ("", ""))[1])
    key, given = named.get("optim_args", ("", None))
    takes = _of(kind, OPTIM_ARGS) or ()
    for part in str(given).replace(" ", "").split(",") if given else ():
        name, equals, value = part.partition("=")
        if not equals or "=" in value:
            yield key, 'is not a text of name=value, like "momentum=0.9,nesterov=true"'
        elif name not in takes:
            near = did_you_mean(name, takes) or f"; it takes {', '.join(takes) or 'none'}"
            yield key, f"{kind} has no argument {name}{near}"
        elif name not in WORDS and not _is_numeral(value):
            yield key, f"{name} is no number"
    key, modules = named.get("optim_target_modules", ("train.optim_target_modules", None))
    low_rank = kind.startswith(LOW_RANK)
    if modules and not low_rank:
        yield key, f"{kind} does not read it; {' and '.join(LOW_RANK)} do"
    if low_rank and not modules:
        yield key, f"is required by {kind}; give +{key}=all-linear, or a list"


def _of(kind: str, table: Mapping[str, Any]) -> Any:
    return next((value for start, value in table.items() if kind.startswith(start)), None)


def _is_numeral(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _packages(cfg: DictConfig, named: Mapping[str, tuple[str, Any]]) -> Iterator[Fault]:
    """Refuse what needs a package that is not installed; nothing is imported to look for it."""
    on = ((name, key) for name, (key, value) in named.items() if value)
    wanted = {key: PACKAGES[name] for name, key in on if name in PACKAGES}
    if package := _of(str(named.get("optim", ("", ""))[1]), OPTIMIZER_PACKAGES):
        wanted["train.optim"] = package
    if str(cfg.model.get("attn_implementation")) in ("flash_attention_2", "flash_attention_3"):
        newer = cfg.model.attn_implementation.endswith("3")
        attention = ("flash_attn_interface", "flash-attn-3") if newer else ("flash_attn",) * 2
        if find_spec("kernels") is None:  # transformers takes a compiled one from there
            wanted["model.attn_implementation"] = attention
    for key, (module, package) in wanted.items():
        if find_spec(module) is None:
            yield key, f"needs the package {package.replace('_', '-')}, which is not installed"


def _best(cfg: DictConfig, named: Mapping[str, tuple[str, Any]]) -> Iterator[Fault]:
    """Check what chooses the best checkpoint, which trainers look up after training has begun."""
    key, metric = named.get("metric_for_best_model", ("", None))
    if not key or metric is None:
        return
    name = str(metric).removeprefix("eval_")
    known = {"loss", *map(str, cfg.algorithm.get("metrics") or ())}
    known -= {"loss"} if cfg.algorithm.trainer._target_.endswith("PPOTrainer") else set()
    written = texts(str(cfg.algorithm.trainer.get("_target_")))
    if name not in known and not (name in written or name.startswith("rewards/")):
        near = did_you_mean(f"eval_{name.removeprefix('eval/')}", {f"eval_{k}" for k in known})
        text = f"{metric!r} is not measured; there are {', '.join(f'eval_{k}' for k in known)}"
        yield key, f"{text}{near}"


def _numbers(named: Mapping[str, tuple[str, Any]]) -> Iterator[Fault]:
    for name, (key, value) in named.items():
        if not is_number(value):
            continue
        if name in BELOW_ONE and not 0 <= value < 1:
            yield key, f"{value!r} is not 0 or more and below 1"
        elif name in NOT_NEGATIVE and not 0 <= value < math.inf:
            yield key, f"{value!r} is not 0 or more"
        elif name in ABOVE_ZERO and not 0 < value < math.inf:
            yield key, f"{value!r} is not above 0"
