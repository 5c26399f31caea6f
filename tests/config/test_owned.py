"""Every argument of a trainer has its effect, alone and in a pack, or is refused by name."""

from __future__ import annotations

import pytest

from lora_exp import compose
from lora_exp.config.owned import OWNED, UNREAD
from lora_exp.config.signature import signature
from lora_exp.errors import ConfigError
from lora_exp.lockstep.plan import APART
from tests.config.test_validation import faults

# arguments that affect only one job's rows, batches, optimizer, loss or reports, not the base
OWN_JOB = {
    "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "optim",
    "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "gradient_accumulation_steps", "average_tokens_across_devices", "max_grad_norm",
    "label_smoothing_factor", "bf16", "fp16", "gradient_checkpointing", "use_cache",
    "torch_empty_cache_steps", "logging_strategy", "logging_steps", "logging_first_step",
    "log_on_each_node", "include_num_input_tokens_seen", "log_level_replica", "eval_strategy",
    "eval_steps", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only",
    "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object",
    "eval_accumulation_steps", "save_strategy", "save_steps", "save_on_each_node",
    "save_total_limit", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "data_seed", "dataloader_drop_last", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "remove_unused_columns",
    "label_names", "train_sampling_strategy", "length_column_name", "skip_memory_metrics",
    # of trl
    "trust_remote_code", "router_aux_loss_coef", "max_length", "shuffle_dataset", "packing",
    "packing_strategy", "padding_free", "pad_to_multiple_of", "eval_packing",
    "completion_only_loss", "loss_type",
    "activation_offloading",  # such a job shares no pass: lockstep/pack.py
}  # fmt: skip


def test_every_argument_is_classified() -> None:
    sft_signature = signature("trl.SFTConfig")
    assert sft_signature is not None
    names = set(sft_signature.arguments)
    classified = OWNED.keys() | UNREAD["trl.SFTConfig"].keys() | APART.keys() | OWN_JOB
    question = "is it one job's own (OWN_JOB), alone (APART), or the run's (OWNED, UNREAD)?"
    assert names - classified == set(), question
    assert OWN_JOB & (OWNED.keys() | APART.keys()) == set()


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("+train.push_to_hub=true", "belongs to the run; use lora-exp push"),
        ("+train.resume_from_checkpoint=x", "give resume="),
        ("+train.fsdp=full_shard", "give parallel=fsdp or parallel=zero2"),
        ("+train.deepspeed=zero3.json", "give parallel=fsdp or parallel=zero2"),
        ("+train.bf16_full_eval=true", "would change the base's weights"),
        ("+train.run_name=x", "give name="),
        ("+train.project=x", "give tracking.project="),
        ("+train.output_dir=x", "give hydra.run.dir="),
        ("+algorithm.args.assistant_only_loss=true", "would have no effect; give"),
        ("+algorithm.args.truncation_mode=keep_end", "rows are cut at their end"),
    ],
)
def test_arguments_that_the_run_sets_are_refused_with_an_alternative(
    override: str, text: str
) -> None:
    with pytest.raises(ConfigError, match=text) as error:
        compose(override)
    assert error.value.faults[0][0] == override.lstrip("+").partition("=")[0]


def test_the_argument_of_trackers_that_the_run_sets_is_refused() -> None:
    assert "belongs to the run" in faults("+tracking.run=x")["tracking.run"]
