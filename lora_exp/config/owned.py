"""Arguments that a run sets itself or that have no effect, and enumerated values of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_exp.config.ranges import Fault
from lora_exp.config.signature import members
from lora_exp.errors import did_you_mean

BY_SHARDING = "give parallel=fsdp or parallel=zero2, and parallel.processes=<number>"
BY_PARALLEL = "give parallel=ddp parallel.processes=<number>"
PUBLISHED = "use lora-exp push, which publishes what a run saved"
OWNED = {  # argument -> what to do instead
    "output_dir": "give hydra.run.dir=<directory>",
    "seed": "give seed=<number>",
    "report_to": "give tracking=wandb, tensorboard, mlflow, trackio or none",
    "disable_tqdm": "leave it out: the run has its own progress bar",
    "use_cpu": "set CUDA_VISIBLE_DEVICES= in the environment",
    "dataloader_pin_memory": "leave it out: it is on where there is a GPU",
    "logging_nan_inf_filter": "leave it out: a run stops at the first number that is not finite",
    "save_only_model": "leave it out: to resume bit for bit a run needs the whole checkpoint",
    "ignore_data_skip": "leave it out: a resumed run continues with the rows that it has not seen",
    "enable_jit_checkpoint": "leave it out: on SIGTERM a run saves at the end of the step",
    "dataset_kwargs": "leave it out: rows are tokenised before the trainer sees them",
    "resume_from_checkpoint": "give resume=<the run's directory>",
    "restore_callback_states_from_checkpoint": "leave it out: a resumed run restores what it needs",
    "run_name": "give name=<name>",
    "logging_dir": "give hydra.run.dir=<directory>",
    "project": "give tracking.project=<name>",
    "bf16_full_eval": "give model.dtype=bfloat16: evaluating would change the base's weights",
    "fp16_full_eval": "give model.dtype=float16: evaluating would change the base's weights",
    "do_train": "leave it out: a run trains",
    "do_eval": "give train.eval_strategy=no, steps or epoch",
    "do_predict": "use lora-exp generate",
    "batch_eval_metrics": "leave it out: no function of yours computes metrics",
    "include_for_metrics": "leave it out: no function of yours computes metrics",
    "local_rank": BY_PARALLEL,
    "fsdp": BY_SHARDING,
    "fsdp_config": BY_SHARDING,
    "deepspeed": BY_SHARDING,
    "parallelism_config": BY_SHARDING,
    **dict.fromkeys(
        (
            "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
            "ddp_static_graph", "ddp_backend", "ddp_timeout",
        ),
        BY_PARALLEL,
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
        "give tracking=wandb, tensorboard, mlflow, trackio or none",
    ),
}  # fmt: skip
TOKENISED = "leave it out: rows are tokenised before the trainer sees them"
# class of the trainer's arguments -> those that only its own tokenising or loading would read
UNREAD = {
    "trl.SFTConfig": {
        "model_init_kwargs": "give model.<argument>",
        "chat_template_path": "give data.chat_template=<file.jinja>",
        "assistant_only_loss": "give algorithm.args.completion_only_loss=true: answers alone count",
        "dataset_text_field": "give data.columns={text: <column>}",
        "dataset_num_proc": TOKENISED,
        "truncation_mode": "leave it out: rows are cut at their end",
        "eos_token": "give data.chat_template=<file.jinja> with the token that ends an answer",
        "pad_token": "leave it out: the tokenizer's own, or its end token",
    }
}
OWNED_IN_TRACKING = ("run",)
ENUMERATIONS = {  # argument -> the enumeration of its values
    "lr_scheduler_type": "transformers.trainer_utils.SchedulerType",
    "optim": "transformers.training_args.OptimizerNames",
    "eval_strategy": "transformers.trainer_utils.IntervalStrategy",
    "save_strategy": "transformers.trainer_utils.SaveStrategy",
    "logging_strategy": "transformers.trainer_utils.IntervalStrategy",
}


def owned_faults(target: str, arguments: dict[str, Any]) -> Iterator[Fault]:
    """Yield a fault for each argument that the run sets, has no effect or has an unknown value.

    Args:
        target: the class of the arguments.
        arguments: the values by full key.
    """
    for full, value in arguments.items():
        name = full.rpartition(".")[2]
        if name in OWNED:
            yield full, f"belongs to the run; {OWNED[name]}"
        known = members(ENUMERATIONS[name]) if name in ENUMERATIONS else frozenset()
        if known and not (isinstance(value, str) and value in known):
            near = did_you_mean(str(value), known)
            yield full, f"{value!r} is none of {', '.join(sorted(known))[:300]}{near}"
        alternative = UNREAD.get(target, {}).get(name)
        if alternative is not None:
            yield full, f"would have no effect; {alternative}"
