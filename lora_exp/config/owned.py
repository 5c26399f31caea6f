"""Arguments of trainers and trackers that a run sets itself, and words that they may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_exp.config.ranges import Fault
from lora_exp.config.signature import members
from lora_exp.errors import did_you_mean

# arguments of trainers that a run sets itself, and what to say instead
OWNED = {
    "output_dir": "hydra.run.dir=<directory>",
    "seed": "seed=<number>",
    "report_to": "tracking=wandb or tracking=none",
    "disable_tqdm": "nothing: the run has its own progress bar",
    "use_cpu": "CUDA_VISIBLE_DEVICES= in the environment",
    "dataloader_pin_memory": "nothing: it is on where there is a GPU",
    "logging_nan_inf_filter": "nothing: a run stops at the first number that is not finite",
    "save_only_model": "nothing: a run goes on bit for bit, and needs all of a checkpoint for that",
    "ignore_data_skip": "nothing: a run that goes on sees the rows that it has not seen",
    "enable_jit_checkpoint": "nothing: SIGTERM saves at the end of a step",
    "run_name": "name=<name>",
    "logging_dir": "hydra.run.dir=<directory>",
    "project": "tracking.project=<project>",
    "dataset_kwargs": "nothing: rows are tokenised before the trainer sees them",
}
OWNED_IN_TRACKING = (
    "directory", "run_id", "run_name", "sweep", "job_type", "choices", "config",
)  # fmt: skip
CHOICES = {
    "lr_scheduler_type": "transformers.trainer_utils.SchedulerType",
    "optim": "transformers.training_args.OptimizerNames",
    "eval_strategy": "transformers.trainer_utils.IntervalStrategy",
    "save_strategy": "transformers.trainer_utils.SaveStrategy",
    "logging_strategy": "transformers.trainer_utils.IntervalStrategy",
}


def owned(given: dict[str, Any]) -> Iterator[Fault]:
    """Yield a fault for each argument that belongs to the run, or is none of the known words.

    Args:
        given: the trainer's, by their full keys.
    """
    for full, value in given.items():
        name = full.rpartition(".")[2]
        if name in OWNED:
            yield full, f"belongs to the run; say {OWNED[name]}"
        known = members(CHOICES[name]) if name in CHOICES else frozenset()
        if known and value not in known:
            near = did_you_mean(str(value), known)
            yield full, f"{value!r} is none of {', '.join(sorted(known))[:300]}{near}"
