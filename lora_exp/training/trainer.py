"""Build the algorithm's trainer from its own arguments.

It is subclassed for checkpoints; `evaluate`, the prompt sampler and the model's `train`,
`zero_grad` and `parameters` are replaced. Loss and optimizer are its own.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import transformers
from jinja2.exceptions import TemplateError
from omegaconf import DictConfig
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

from lora_exp.adapter.attach import Adapted
from lora_exp.adapter.several import copy_to
from lora_exp.config.door import build, plain
from lora_exp.config.signature import signature
from lora_exp.data.rows import Rows
from lora_exp.data.tokens import Tokens
from lora_exp.errors import ConfigError, DataError
from lora_exp.model.loading import Base, device
from lora_exp.model.precision import autocast_dtype
from lora_exp.model.special_tokens import without_end
from lora_exp.record.run import Record
from lora_exp.rewards import rewards
from lora_exp.training.best import Watched
from lora_exp.training.checkpoint import Intervals, checkpointed
from lora_exp.training.guards import FiniteLoss, GradientCheck
from lora_exp.training.housekeeping import spare


def trainer_of(
    cfg: DictConfig,
    base: Base,
    adapted: Adapted,
    rows: Rows,
    data: tuple[Tokens, Tokens | None],
    record: Record,
    callbacks: list[TrainerCallback],
) -> Any:
    """Build the trainer of a run.

    Args:
        cfg: the run's.
        base: the base and its tokenizer.
        adapted: the model to train.
        rows: in the algorithm's shape; rewards read their columns.
        data: the same rows as the trainer takes them: training, held-out.
        record: the run's record; checkpoints go to its directory.
        callbacks: added to ours and those of the adapter's method.

    Raises:
        ConfigError: the trainer refuses its arguments.
    """
    train, held_out = data
    trained = [(p, p.data) for p in adapted.model.parameters() if p.requires_grad]
    given: dict[str, Any] = {}
    known = signature(cfg.algorithm.trainer._target_)
    takes = known.arguments if known else {}
    if "rewards" in cfg.algorithm:
        both = [*rows.train, *rows.eval]
        given["reward_funcs"] = rewards(cfg, base, adapted.model, both)
    if "ref_model" in takes and adapted.method is None:
        given["ref_model"] = copy.deepcopy(adapted.model).eval().requires_grad_(False)
    guards = (FiniteLoss(), GradientCheck(), Intervals())
    apart = cfg.algorithm.task_type == "SEQ_2_SEQ_LM"  # its answers are tokenised apart, and end so
    tokenizer = base.tokenizer if apart else without_end(base.tokenizer)
    try:
        trainer = build(
            cfg,
            "algorithm.trainer",
            through=checkpointed,
            model=adapted.model,
            args=_arguments(cfg, base, held_out, record),
            train_dataset=train.dataset,
            eval_dataset=held_out.dataset if held_out else None,
            processing_class=tokenizer,
            callbacks=[*guards, *adapted.callbacks, *callbacks],
            **given,
        )
    except ConfigError:
        raise
    except TemplateError as error:
        raise DataError(f"the chat template refuses a row: {error}") from error
    except ValueError as error:
        raise ConfigError([("algorithm", str(error))]) from error
    trainer.owner = record.values["tracking_id"]
    trainer.watched = Watched.of(cfg)
    _ready(trainer, adapted, trained)
    return trainer


def tokens_trained(trainer: Any) -> int:
    """Return a trainer's count of tokens: since its process began, or since the run began."""
    if hasattr(trainer, "num_tokens"):  # ours
        return int(trainer.num_tokens)
    return int(getattr(trainer, "_total_train_tokens", 0) or trainer.state.num_input_tokens_seen)


def _ready(trainer: Any, adapted: Adapted, trained: list[tuple[Any, Any]]) -> None:
    """Put right what trl does to models and samplers.

    Args:
        trainer: just built.
        adapted: what trains.
        trained: its parameters, and their data before trl had them.
    """
    if adapted.method is None and getattr(trainer, "ref_model", None) is not None:
        # trl loads it anew, without a revision
        trainer.ref_model.load_state_dict(adapted.model.state_dict())
    if hasattr(trainer, "_get_train_sampler"):
        trainer._get_train_sampler = _resumable(trainer._get_train_sampler)
    trainer.remove_callback(transformers.PrinterCallback)
    spare(trainer.model)
    trainer.evaluate = _unnoticed(trainer.evaluate)
    if adapted.method is not None:
        # trl casts to bfloat16 on quantised bases: docs/decisions/0003
        for parameter in adapted.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        for parameter, data_before in trained:  # a start's own bits, not those of the cast
            parameter.data = data_before.float()
        if "ref" in adapted.model.peft_config:  # trl copies before the cast, and not all methods
            copy_to(adapted.model, "ref")


def _resumable(sampler: Any) -> Any:
    """Let a sampler of prompts, whose every epoch has an order of its own, begin at any epoch."""

    def sampled(*arguments: Any) -> Any:
        made = sampler(*arguments)
        if isinstance(made, RepeatSampler) and made.shuffle:
            made.set_epoch = partial(_advance, made)
        return made

    return sampled


def _advance(sampler: Any, epoch: int) -> None:
    sampler.generator.manual_seed(sampler.seed)
    for _ in range(epoch):
        torch.randperm(sampler.num_samples, generator=sampler.generator)


def _unnoticed(evaluate: Any) -> Any:
    """Evaluate without moving the random streams: loaders draw a seed that they never use."""

    def unnoticed(*arguments: Any, **options: Any) -> Any:
        with torch.random.fork_rng():
            return evaluate(*arguments, **options)

    return unnoticed


def _arguments(cfg: DictConfig, base: Base, held_out: Tokens | None, record: Record) -> Any:
    settings = plain(cfg.train)
    if settings["bf16"] is None:
        settings |= _precision(cfg, base)
    if settings.get("load_best_model_at_end"):
        if held_out is None:
            text = "best needs held-out rows; give data.eval_path or data.eval_share"
            raise ConfigError([("keep", text)])
        watched = Watched.of(cfg)
        settings["metric_for_best_model"] = f"eval_{watched.name}"
        settings["greater_is_better"] = watched.maximize
    if held_out is None:
        settings["eval_strategy"] = "no"
    known = signature(cfg.algorithm.args._target_)
    if known and "dataset_kwargs" in known.arguments and not cfg.algorithm.args.packing:
        settings["dataset_kwargs"] = {"skip_prepare_dataset": True}  # tokens and labels are there
    try:
        return build(
            cfg,
            "algorithm.args",
            **settings,
            seed=cfg.seed,
            output_dir=str(record.directory / "checkpoints"),
            report_to=[],
            use_cpu=device() == "cpu",
            dataloader_pin_memory=device() != "cpu",
            disable_tqdm=True,
            logging_nan_inf_filter=False,  # it would log a loss of 0 where there is none
        )
    except ValueError as error:
        raise ConfigError([("algorithm.args", str(error))]) from error


def _precision(cfg: DictConfig, base: Base) -> dict[str, bool]:
    """Return what `train.bf16=null` stands for on this base."""
    dtype = autocast_dtype(base.model, trains_whole=cfg.peft is None)
    half = {"fp16": dtype == torch.float16} if cfg.quant is not None else {}
    return {"bf16": dtype == torch.bfloat16} | half
