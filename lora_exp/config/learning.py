"""Find runs that cannot learn: they make no step, or their loss is constant. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from omegaconf import DictConfig

from lora_exp.config.door import Section
from lora_exp.config.ranges import Fault, is_number, number
from lora_exp.errors import ConfigError

GROUPED = ("trl.GRPOTrainer", "trl.RLOOTrainer")  # they compare answers to one prompt
PPO = "lora_exp.algorithm.ppo.PPOTrainer"  # its steps take whole rollouts
REFERENCED = ("trl.DPOTrainer", "trl.KTOTrainer")  # beta scales everything in their losses


def learning_faults(cfg: Section) -> Iterator[Fault]:
    """Yield a fault for each setting under which nothing can be learnt."""
    args, trainer = cfg.algorithm.args, cfg.algorithm.trainer.get("_target_")
    if trainer in REFERENCED and args.get("beta") == 0 and "sft" not in _losses(args):
        text = "0 makes the loss a constant, so nothing is learnt; give a number above 0"
        yield "algorithm.args.beta", text
    for key in ("reward_weights", "loss_weights"):
        weights = args.get(key)
        if isinstance(weights, list) and weights and not any(weights):
            yield f"algorithm.args.{key}", "every weight is 0, so nothing is learnt"
    if args.get("desirable_weight") == 0 and args.get("undesirable_weight") == 0:
        text = "is 0, and so is undesirable_weight, so nothing is learnt"
        yield "algorithm.args.desirable_weight", text
    group = args.get("num_generations")
    if trainer in GROUPED and is_number(group) and group == 1:
        text = "1 answer to a prompt has no other to be compared with; give 2 or more"
        yield "algorithm.args.num_generations", text


def _losses(args: Section) -> list[str]:
    losses = args.get("loss_type") or []
    return [losses] if isinstance(losses, str) else list(losses)


def check_rows(cfg: DictConfig, count: int, packed: bool = False) -> None:
    """Check that there are enough rows for one step.

    Args:
        cfg: the run's config.
        count: the number of rows to train on.
        packed: whether they are packed already, if the run packs them.

    Raises:
        ConfigError: training would end without a step.
    """
    batch, args = number(cfg.train.per_device_train_batch_size), cfg.algorithm.args
    if cfg.algorithm.trainer._target_ in GROUPED:
        steps = args.get("steps_per_generation") or cfg.train.gradient_accumulation_steps
        answers = args.get("generation_batch_size") or batch * number(steps, 1)
        required = math.ceil(answers / number(args.get("num_generations"), 8))
        cause = f"{answers:g} answers, {args.get('num_generations', 8)} to a prompt"
        remedy = "a smaller train.per_device_train_batch_size"
    elif cfg.algorithm.trainer._target_ == PPO:
        minibatches = number(args.get("num_minibatches"), 1)
        required = int(batch * (minibatches * cfg.train.gradient_accumulation_steps))
        cause, remedy = "a whole rollout", "smaller ones"
    elif cfg.train.get("dataloader_drop_last") and not (args.get("packing") and not packed):
        required, cause = int(batch), f"train.dataloader_drop_last and batches of {batch:g}"
        remedy = "train.dataloader_drop_last=false, or smaller batches"
    else:
        required, cause, remedy = 1, "at least one", "more rows"
    if count < required:
        unit = "prompts" if cfg.algorithm.shape == "prompt" else "rows"
        text = f"a step takes {required} {unit} ({cause}), and there are {count}; give {remedy}"
        raise ConfigError([("data", text)])
