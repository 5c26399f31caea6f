"""Names that other tools use for our keys and options, for hints in errors."""

from __future__ import annotations

from collections.abc import Sequence

OTHER_KEYS = {  # our key -> names of other tools
    "train.learning_rate": ("lr", "learning_rate", "learningrate"),
    "train.num_train_epochs": ("epochs", "epoch", "num_epochs", "num_train_epochs", "n_epochs"),
    "train.max_steps": ("steps", "max_steps", "num_steps", "iters", "max_iters"),
    "train.per_device_train_batch_size": (
        "batch_size", "bs", "batch", "train_batch_size", "micro_batch_size",
        "per_device_train_batch_size",
    ),
    "train.per_device_eval_batch_size": ("eval_batch_size", "per_device_eval_batch_size"),
    "train.gradient_accumulation_steps": (
        "grad_accum", "gradient_accumulation", "grad_accumulation_steps", "accumulation_steps",
        "gradient_accumulation_steps",
    ),
    "train.gradient_checkpointing": ("gradient_checkpointing", "grad_checkpointing"),
    "train.warmup_steps": ("warmup", "warmup_steps", "warmup_ratio"),
    "train.lr_scheduler_type": ("scheduler", "lr_scheduler", "lr_scheduler_type"),
    "train.optim": ("optimizer", "optim", "optimiser"),
    "train.weight_decay": ("weight_decay", "wd"),
    "train.max_grad_norm": ("max_grad_norm", "grad_clip", "clip_grad"),
    "train.bf16": ("bf16",),
    "train.logging_steps": ("logging_steps", "log_steps"),
    "train.save_steps": ("save_steps",),
    "train.eval_steps": ("eval_steps",),
    "algorithm.args.max_length": (
        "max_length", "max_seq_length", "max_seq_len", "seq_len", "seq_length", "cutoff_len",
        "context_length",
    ),
    "algorithm.args.packing": ("packing",),
    "algorithm.args.beta": ("beta",),
    "algorithm.args.num_generations": ("num_generations",),
    "algorithm.rewards": ("rewards", "reward_funcs"),
    "peft.r": ("rank", "r", "lora_r", "lora_rank"),
    "peft.lora_alpha": ("alpha", "lora_alpha"),
    "peft.lora_dropout": ("dropout", "lora_dropout"),
    "peft.target_modules": ("target_modules", "lora_target_modules", "modules"),
    "model.path": ("model_name", "model_name_or_path", "base_model", "model_path", "base"),
    "model.dtype": ("dtype", "torch_dtype", "precision"),
    "data=jsonl data.path": (
        "dataset", "dataset_path", "data_path", "train_file", "train_data", "data_file",
    ),
    "hydra.run.dir": ("output_dir", "output", "out", "save_dir", "run_dir"),
    "tracking.project": ("project", "wandb_project"),
    "tracking.tags": ("tags",),
    "name": ("run_name", "experiment_name"),
    "samples.max_new_tokens": ("max_new_tokens",),
}  # fmt: skip
OVERRIDES = {  # name of another tool -> our override
    "load_in_4bit": "quant=nf4", "4bit": "quant=nf4", "load_in_8bit": "quant=int8",
    "8bit": "quant=int8", "qlora": "quant=nf4", "lora": "peft=lora", "method": "peft=lora",
    "task": "algorithm=sft", "stage": "algorithm=sft", "wandb": "tracking=wandb",
    "report_to": "tracking=wandb", "config": "experiment=NAME", "eval": "data.eval_share=0.1",
    "val_size": "data.eval_share=0.1", "checkpoint": "resume=RUN",
    "resume_from_checkpoint": "resume=RUN",
}  # fmt: skip
OTHER_OPTIONS = {  # group -> name of another tool -> our option
    "quant": {
        "4bit": "nf4", "4": "nf4", "int4": "nf4", "bnb": "nf4", "qlora": "nf4", "8bit": "int8",
        "8": "int8", "bf16": "none", "fp16": "none", "16bit": "none",
    },
    "peft": {"full": "none", "prefix": "prefix_tuning", "prompt": "prompt_tuning"},
    "targets": {"all": "all_linear", "attn": "attention", "ffn": "mlp", "linear": "all_linear"},
    "tracking": {"off": "none", "no": "none", "false": "none", "true": "wandb", "null": "none"},
    "algorithm": {
        "pt": "pretrain", "finetune": "sft", "lora": "sft", "rm": "reward", "reinforce": "rloo",
    },
    "parallel": {
        "deepspeed": "zero2", "zero": "zero2", "zero1": "zero2", "zero3": "fsdp", "fsdp2": "fsdp",
        "off": "none", "no": "none",
    },
}  # fmt: skip
SECTIONS = ("train", "algorithm", "algorithm.args", "peft", "model", "samples", "data", "tracking")


def key_hint(key: str) -> str | None:
    """Return the override for a key of another tool, with `...` for its value.

    Args:
        key: as typed, without signs: `lr`, `train.epochs`, `peft.rank`.
    """
    section, _, word = key.lower().replace("-", "_").rpartition(".")
    if section and section not in SECTIONS:
        return None
    if word in OVERRIDES:
        return OVERRIDES[word]
    our_key = next((ours for ours, theirs in OTHER_KEYS.items() if word in theirs), None)
    return f"{our_key}=..." if our_key is not None and our_key != key else None


def option_hint(group: str, name: str, options: Sequence[str]) -> str | None:
    """Return the overrides for another tool's name of an option.

    Args:
        group: such as `quant`.
        name: as typed.
        options: those of the group.
    """
    plain = name.lower().replace("-", "_")
    if (group, plain) in (("peft", "qlora"), ("algorithm", "qlora")):
        return "peft=lora quant=nf4"
    if group == "model" and ("/" in name or name.startswith("~")):
        return f"model=local model.path={name}"
    if group == "data" and name.rpartition(".")[2] in ("jsonl", "json", "csv", "parquet"):
        return f"data=jsonl data.path={name}"
    if group == "data" and "/" in name:
        return f"data=hub data.path={name}"
    option = OTHER_OPTIONS.get(group, {}).get(plain) or (plain if plain in options else None)
    return f"{group}={option}" if option else None
