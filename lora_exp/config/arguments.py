"""Mistakes inside the arguments of schedulers and optimizers, and packages that are missing.

The tables are those of transformers 5.23, `optimization.py` and `trainer_optimizer.py`; a test
compares them with that source. Needs no torch.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from lora_exp.config.door import Section
from lora_exp.config.ranges import Fault, is_number
from lora_exp.config.signature import fits, signature, texts_in
from lora_exp.errors import did_you_mean

OPTIMIZATION = "transformers.optimization."
# scheduler -> the function or class that gets `lr_scheduler_kwargs`; None: it has no arguments
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
SET_BY_TRAINER = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "self")
NEEDED = {  # exactly one of these is required
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
FOLLOWS_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")
# beginning of an optimizer's name -> the arguments that its `optim_args` may set
OPTIM_ARGS = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop_bnb": (),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
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
FLAGS = ("nesterov", "centered", "use_kahan_summation", "bf16_stochastic_round")
SWITCHED_ON = ("kahan_sum", "decouple_lr")  # by any text, also by "false"
WORDS = (
    "momentum_dtype", "variance_dtype", "compensation_buffer_dtype", "proj_type", "proj",
    "scale_type",
)  # fmt: skip
SCHEDULER_CHOICES = {  # the values that a scheduler's argument may have
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
LOW_RANK = ("galore", "apollo")  # only these read `optim_target_modules`
# beginning of an optimizer's name -> the module that it needs, and the package that has it
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
# setting -> the module that it needs if it is on, and the package that has it
PACKAGES = {
    "use_liger_kernel": ("liger_kernel", "liger-kernel"),
    "use_vllm": ("vllm", "vllm"),
}


def argument_faults(cfg: Section) -> Iterator[Fault]:
    """Yield a fault for each mistake inside an argument, and each package that is missing."""
    by_key = {f"algorithm.args.{key}": value for key, value in cfg.algorithm.args.items()}
    by_key |= {f"train.{key}": value for key, value in cfg.train.items()}
    settings = {key.rpartition(".")[2]: (key, value) for key, value in by_key.items()}
    yield from _numbers(settings)
    yield from _scheduler(settings)
    yield from _optimizer(settings)
    yield from _packages(cfg, settings)
    yield from _best_metric(cfg, settings)


def _scheduler(settings: Mapping[str, tuple[str, Any]]) -> Iterator[Fault]:
    _, scheduler = settings.get("lr_scheduler_type", ("", None))
    key, kwargs = settings.get("lr_scheduler_kwargs", ("train.lr_scheduler_kwargs", None))
    if not isinstance(scheduler, str) or scheduler not in SCHEDULERS:
        return
    if scheduler in FOLLOWS_EVALUATIONS and settings.get("eval_strategy", ("", "no"))[1] == "no":
        text = f"{scheduler} follows evaluations; give train.eval_strategy"
        yield "train.lr_scheduler_type", text
    if kwargs is not None and not isinstance(kwargs, dict):
        if isinstance(kwargs, str):
            yield key, f"is not a section; give {key}={{name: value}}"
        return
    kwargs = {str(name): value for name, value in (kwargs or {}).items()}
    accepted = _scheduler_arguments(scheduler)
    for name, value in kwargs.items():
        if name not in accepted:
            near = did_you_mean(name, accepted) or f"; it takes {', '.join(accepted) or 'none'}"
            yield f"{key}.{name}", f"{scheduler} has no such argument{near}"
            continue
        choices, annotation = SCHEDULER_CHOICES.get(name), accepted[name]
        if annotation is None and isinstance(value, str) and choices is None:
            yield f"{key}.{name}", f"{value!r} is not a number"
            continue
        if not fits(value, annotation) or (choices is not None and value not in choices):
            allowed = choices or [ast.unparse(annotation or ast.Constant(None))]
            yield f"{key}.{name}", f"{value!r} is not {' or '.join(allowed)}"
    if is_number(kwargs.get("factor")) and not 0 < kwargs["factor"] < 1:
        yield f"{key}.factor", f"{kwargs['factor']} is not above 0 and below 1"
    rate = settings.get("learning_rate", ("", None))[1]
    if is_number(kwargs.get("lr_end")) and is_number(rate) and not kwargs["lr_end"] < rate:
        yield f"{key}.lr_end", f"{kwargs['lr_end']} is not below the learning rate, {rate}"
    needed = NEEDED.get(str(scheduler), ())
    count = sum(kwargs.get(name) is not None for name in needed)
    if needed and count != 1:
        text = f"{scheduler} needs {'one of ' if len(needed) > 1 else ''}{', '.join(needed)}"
        yield key, f"{text}: '+{key}={{{needed[-1]}: ...}}'"


def _scheduler_arguments(scheduler: Any) -> dict[str, ast.expr | None]:
    """Return the arguments that `lr_scheduler_kwargs` may set, with their annotations."""
    target = SCHEDULERS[scheduler]
    target_signature = signature(target) if target else None
    if target_signature is None:
        return {}
    return {k: v for k, v in target_signature.arguments.items() if k not in SET_BY_TRAINER}


def _optimizer(settings: Mapping[str, tuple[str, Any]]) -> Iterator[Fault]:
    optimizer = str(settings.get("optim", ("", ""))[1])
    key, optim_args = settings.get("optim_args", ("", None))
    accepted = _by_prefix(optimizer, OPTIM_ARGS) or ()
    for part in str(optim_args).replace(" ", "").split(",") if optim_args else ():
        name, equals, value = part.partition("=")
        if not equals or "=" in value:
            yield key, 'is not a text of name=value, like "momentum=0.9,nesterov=true"'
        elif name == "weight_decay":
            yield key, "weight_decay has no effect there; give train.weight_decay"
        elif name not in accepted:
            near = did_you_mean(name, accepted) or f"; it takes {', '.join(accepted) or 'none'}"
            yield key, f"{optimizer} has no argument {name}{near}"
        elif fault := _optim_value_fault(name, value):
            yield key, f"{name}={value}: {fault}"
    key, modules = settings.get("optim_target_modules", ("train.optim_target_modules", None))
    low_rank = optimizer.startswith(LOW_RANK)
    if modules and not low_rank:
        yield key, f"{optimizer} does not read it; {' and '.join(LOW_RANK)} do"
    if low_rank and not modules:
        yield key, f"is required by {optimizer}; give +{key}=all-linear, or a list"


def _optim_value_fault(name: str, value: str) -> str | None:
    if name in FLAGS:
        return None if value.lower() in ("true", "false") else "give true or false"
    if name in SWITCHED_ON:
        return None if value.lower() == "true" else "give true, or leave it out"
    return None if name in WORDS or _is_numeral(value) else "give a number"


def _by_prefix(name: str, table: Mapping[str, Any]) -> Any:
    return next((value for start, value in table.items() if name.startswith(start)), None)


def _is_numeral(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _packages(cfg: Section, settings: Mapping[str, tuple[str, Any]]) -> Iterator[Fault]:
    """Yield a fault for each setting whose package is not installed; nothing is imported."""
    enabled = ((name, key) for name, (key, value) in settings.items() if value)
    required = {key: PACKAGES[name] for name, key in enabled if name in PACKAGES}
    if package := _by_prefix(str(settings.get("optim", ("", ""))[1]), OPTIMIZER_PACKAGES):
        required["train.optim"] = package
    if str(cfg.model.get("attn_implementation")) in ("flash_attention_2", "flash_attention_3"):
        version_3 = cfg.model.attn_implementation.endswith("3")
        attention = ("flash_attn_interface", "flash-attn-3") if version_3 else ("flash_attn",) * 2
        if find_spec("kernels") is None:  # else transformers takes compiled attention from it
            required["model.attn_implementation"] = attention
    for key, (module, package) in required.items():
        if find_spec(module) is None:
            yield key, f"needs the package {package.replace('_', '-')}, which is not installed"


def _best_metric(cfg: Section, settings: Mapping[str, tuple[str, Any]]) -> Iterator[Fault]:
    """Check the metric of the best checkpoint, which trainers read only after training began."""
    key, metric = settings.get("metric_for_best_model", ("", None))
    if not key or metric is None:
        key, greater = settings.get("greater_is_better", ("", None))
        if greater is not None:
            yield key, "has no effect without train.metric_for_best_model; give goal=maximize"
        return
    name = str(metric).removeprefix("eval_")
    measured = {"loss", *map(str, cfg.algorithm.get("metrics") or ())}
    measured -= {"loss"} if cfg.algorithm.trainer._target_.endswith("PPOTrainer") else set()
    source_texts = texts_in(str(cfg.algorithm.trainer.get("_target_")))
    if name not in measured and not (name in source_texts or name.startswith("rewards/")):
        near = did_you_mean(f"eval_{name.removeprefix('eval/')}", {f"eval_{k}" for k in measured})
        text = f"{metric!r} is not measured; there are {', '.join(f'eval_{k}' for k in measured)}"
        yield key, f"{text}{near}"


def _numbers(settings: Mapping[str, tuple[str, Any]]) -> Iterator[Fault]:
    for name, (key, value) in settings.items():
        if not is_number(value):
            continue
        if name in BELOW_ONE and not 0 <= value < 1:
            yield key, f"{value!r} is not 0 or more and below 1"
        elif name in NOT_NEGATIVE and not 0 <= value < math.inf:
            yield key, f"{value!r} is not 0 or more"
        elif name in ABOVE_ZERO and not 0 < value < math.inf:
            yield key, f"{value!r} is not above 0"
