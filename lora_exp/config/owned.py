"""Arguments that a run sets itself, or that would have no effect, and words that they may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_exp.config.ranges import Fault
from lora_exp.config.signature import members
from lora_exp.errors import did_you_mean

ONE_DEVICE = "nothing: a run trains on one device"
PUBLISHED = "lora-exp push, which publishes what a run saved"
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
    "dataset_kwargs": "nothing: rows are tokenised before the trainer sees them",
    "resume_from_checkpoint": "resume=<the run's directory>",
    "restore_callback_states_from_checkpoint": "nothing: a run that resumes restores what it needs",
    "run_name": "name=<name>",
    "logging_dir": "hydra.run.dir=<directory>",
    "project": "tracking.project=<name>",
    "bf16_full_eval": "model.dtype=bfloat16: evaluating would change the base's weights",
    "fp16_full_eval": "model.dtype=float16: evaluating would change the base's weights",
    "do_train": "nothing: a run trains",
    "do_eval": "train.eval_strategy=no, steps or epoch",
    "do_predict": "lora-exp generate",
    "batch_eval_metrics": "nothing: no function of one's own computes metrics",
    "include_for_metrics": "nothing: no function of one's own computes metrics",
    "local_rank": ONE_DEVICE,
    "fsdp": ONE_DEVICE,
    "fsdp_config": ONE_DEVICE,
    "deepspeed": ONE_DEVICE,
    "parallelism_config": ONE_DEVICE,
    **dict.fromkeys(
        (
            "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
            "ddp_static_graph", "ddp_backend", "ddp_timeout",
        ),
        ONE_DEVICE,
    ),
    **dict.fromkeys(
        (
            "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy",
            "hub_always_push", "hub_revision",
        ),
        PUBLISHED,
    ),
    **dict.fromkeys(
        ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        "tracking=wandb or tracking=none",
    ),
}  # fmt: skip
TOKENISED = "nothing: rows are tokenised before the trainer sees them"
# by the trainer's arguments: what only its own tokenising, or its own loading, would read
UNREAD = {
    "trl.SFTConfig": {
        "model_init_kwargs": "model.<argument>",
        "chat_template_path": "data.chat_template=<file.jinja>",
        "assistant_only_loss": "algorithm.args.completion_only_loss=true: answers alone count",
        "dataset_text_field": "data.columns={text: <column>}",
        "dataset_num_proc": TOKENISED,
        "truncation_mode": "nothing: rows are cut at their end",
        "eos_token": "data.chat_template=<file.jinja> with the token that ends an answer",
        "pad_token": "nothing: the tokenizer's own, or its end token",
    }
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


def owned(target: str, given: dict[str, Any]) -> Iterator[Fault]:
    """Yield a fault for each argument that belongs to the run, has no effect or is no known word.

    Args:
        target: the class of the arguments.
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
        why = UNREAD.get(target, {}).get(name)
        if why is not None:
            yield full, f"would have no effect; say {why}"
