"""Build the algorithm's trainer from its own arguments.

Its class is subclassed for checkpoints; `evaluate`, the prompt sampler and the model's `train`,
`zero_grad` and `parameters` are replaced. Loss and optimizer are not changed.
"""

from __future__ import annotations

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
from lora_exp.config.processes import divided
from lora_exp.config.sharding import sharding, shares_all
from lora_exp.config.signature import signature
from lora_exp.data.rows import Rows
from lora_exp.data.tokens import Tokens
from lora_exp.errors import ConfigError, DataError
from lora_exp.model.determinism import forked_random_state
from lora_exp.model.loading import Base
from lora_exp.model.mixture import has_routers, name_experts, without_router_logits
from lora_exp.model.placement import device
from lora_exp.model.precision import autocast_dtype, is_quantised
from lora_exp.model.special_tokens import without_end
from lora_exp.parallel.world import world
from lora_exp.record.run import Record
from lora_exp.rewards import rewards
from lora_exp.training.best import Watched
from lora_exp.training.checkpoint import checkpointed
from lora_exp.training.draws import OwnDraws
from lora_exp.training.fsdp import Fsdp
from lora_exp.training.guards import FiniteLoss, GradientCheck
from lora_exp.training.housekeeping import avoid_module_walks
from lora_exp.training.resumption import Resumption
from lora_exp.training.zero import Zero, deepspeed_config


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
        callbacks: further ones, beside ours and those of the adapter's method.

    Raises:
        ConfigError: the trainer refuses its arguments.
    """
    train, held_out = data
    trained = [(p, p.data) for p in adapted.model.parameters() if p.requires_grad]
    _prepare_experts(cfg, base)
    own_arguments = _rewards_and_reference(cfg, base, adapted, rows)
    try:
        trainer = build(
            cfg,
            "algorithm.trainer",
            through=partial(checkpointed, mixins=_mixins(cfg)),
            model=adapted.model,
            args=_training_arguments(cfg, base, held_out, record),
            train_dataset=train.dataset,
            eval_dataset=held_out.dataset if held_out else None,
            processing_class=_tokenizer(cfg, base),
            callbacks=[*_checks(), *adapted.callbacks, *callbacks],
            **own_arguments,
        )
    except ConfigError:
        raise
    except TemplateError as error:
        raise DataError(f"the chat template refuses a row: {error}") from error
    except ValueError as error:
        raise ConfigError([("algorithm", str(error))]) from error
    trainer.owner = record.values["tracking_id"]
    trainer.watched = Watched.of(cfg)
    _correct(trainer, adapted, trained)
    return trainer


def _mixins(cfg: DictConfig) -> tuple[type, ...]:
    """Return the mixins of a trainer whose processes share out what trains."""
    if shares_all(cfg):
        return (Fsdp,)
    return (Zero,) if sharding(cfg) == "zero2" else ()


def _prepare_experts(cfg: DictConfig, base: Base) -> None:
    """Set what TRL reads of experts; refuse to balance routers that the base does not have."""
    if cfg.algorithm.args.get("router_aux_loss_coef") and not has_routers(base.model):
        text = f"{type(base.model).__name__} has no routers to balance; leave it out"
        raise ConfigError([("algorithm.args.router_aux_loss_coef", text)])
    name_experts(base.model)


def _checks() -> list[TrainerCallback]:
    return [FiniteLoss(), GradientCheck(), Resumption(), OwnDraws()]


def _rewards_and_reference(
    cfg: DictConfig, base: Base, adapted: Adapted, rows: Rows
) -> dict[str, Any]:
    """Return the arguments `reward_funcs` and `ref_model`, where the algorithm takes them."""
    arguments: dict[str, Any] = {}
    if "rewards" in cfg.algorithm:
        arguments["reward_funcs"] = rewards(cfg, base, adapted.model, rows)
    if adapted.reference is not None:
        arguments["ref_model"] = adapted.reference
    return arguments


def _tokenizer(cfg: DictConfig, base: Base) -> Any:
    """Return the trainer's tokenizer; for TRL's, which add the EOS token themselves, without it."""
    if cfg.algorithm.task_type == "SEQ_2_SEQ_LM":
        return base.tokenizer
    return without_end(base.tokenizer)


def tokens_trained(trainer: Any) -> int:
    """Return a trainer's count of tokens: since its process began, or since the run began."""
    if hasattr(trainer, "num_tokens"):  # ours
        return int(trainer.num_tokens)
    return int(getattr(trainer, "_total_train_tokens", 0) or trainer.state.num_input_tokens_seen)


def _correct(trainer: Any, adapted: Adapted, trained: list[tuple[Any, Any]]) -> None:
    """Correct what trl and transformers do to models, samplers and evaluations.

    Args:
        trainer: just built.
        adapted: what trains.
        trained: its parameters, and their values before trl cast them.
    """
    loaded = getattr(trainer, "ref_model", None)
    if adapted.method is None and adapted.reference is None and loaded is not None:
        # trl loads it anew, without a revision
        loaded.load_state_dict(adapted.model.state_dict())
    without_router_logits(trainer.model)
    if hasattr(trainer, "_get_train_sampler"):
        trainer._get_train_sampler = _resumable(trainer._get_train_sampler)
    trainer.remove_callback(transformers.PrinterCallback)
    avoid_module_walks(trainer.model)
    if isinstance(trainer, Zero):
        trainer.use_autocast()
    if isinstance(trainer, Fsdp):
        trainer.leave_wrapping()
    trainer.evaluate = _with_own_random_state(trainer.evaluate)
    if adapted.method is not None:
        # trl casts to bfloat16 on quantised bases: docs/decisions/0003
        for parameter in adapted.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        for parameter, data_before in trained:  # the exact initial values, without the cast
            parameter.data = data_before.float()
        if "ref" in adapted.model.peft_config:
            # trl copies it before the cast, and only for some methods
            copy_to(adapted.model, "ref")


def _resumable(make_sampler: Any) -> Any:
    """Let a prompt sampler, which has another order in each epoch, start at any epoch."""

    def make_resumable(*arguments: Any) -> Any:
        sampler = make_sampler(*arguments)
        if isinstance(sampler, RepeatSampler) and sampler.shuffle:
            sampler.set_epoch = partial(_advance, sampler)
        return sampler

    return make_resumable


def _advance(sampler: Any, epoch: int) -> None:
    sampler.generator.manual_seed(sampler.seed)
    for _ in range(epoch):
        torch.randperm(sampler.num_samples, generator=sampler.generator)


def _with_own_random_state(evaluate: Any) -> Any:
    """Evaluate without changing the random state: data loaders draw a seed that they never use."""

    def evaluate_apart(*arguments: Any, **options: Any) -> Any:
        with forked_random_state():
            return evaluate(*arguments, **options)

    return evaluate_apart


def _training_arguments(
    cfg: DictConfig, base: Base, held_out: Tokens | None, record: Record
) -> Any:
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
    if world.size > 1:
        settings |= divided(cfg) or {}
        if sharding(cfg) == "zero2":
            settings["deepspeed"] = deepspeed_config()
        else:
            # without this, gradients are added up in another order from the second step on
            settings["ddp_find_unused_parameters"] = True
    if cfg.algorithm.args.get("activation_offloading") and device() == "cpu":
        text = "moves activations from a GPU to the CPU, and this run is on a CPU; give false"
        raise ConfigError([("algorithm.args.activation_offloading", text)])
    if base.attention == "flex_attention" and device() == "cpu":
        text = "flex_attention has no gradients on a CPU; give auto"
        raise ConfigError([("model.attn_implementation", text)])
    args_signature = signature(cfg.algorithm.args._target_)
    parameters = args_signature.arguments if args_signature else {}
    if "dataset_kwargs" in parameters and not cfg.algorithm.args.packing:
        settings["dataset_kwargs"] = {"skip_prepare_dataset": True}  # rows are tokenised already
    try:
        args = build(
            cfg,
            "algorithm.args",
            **settings,
            seed=cfg.seed,
            output_dir=str(record.directory / "checkpoints"),
            report_to=[],
            use_cpu=device() == "cpu",
            dataloader_pin_memory=device() != "cpu",
            disable_tqdm=True,
            logging_nan_inf_filter=False,  # it would replace NaN losses in the log
        )
    except ValueError as error:
        raise ConfigError([("algorithm.args", str(error))]) from error
    if args.n_gpu > 1:  # transformers would spread each pass over all GPUs that it sees
        args._n_gpu = 1
    return args


def _precision(cfg: DictConfig, base: Base) -> dict[str, bool]:
    """Return the arguments that `train.bf16=null` stands for on this base."""
    dtype = autocast_dtype(base.model, trains_whole=cfg.peft is None)
    half = {"fp16": dtype == torch.float16} if is_quantised(base.model) else {}
    return {"bf16": dtype == torch.bfloat16} | half


def precision(cfg: DictConfig, base: Base, trainer: Any) -> dict[str, str]:
    """Return the dtypes that a run has really used, for its record.

    Returns:
        `base`: of its weights, or how they are quantised; `computed_in`: of most products;
        `trained`: of the weights that train.
    """
    args = trainer.args
    computed_in = "bfloat16" if args.bf16 else "float16" if args.fp16 else base.dtype
    dtypes = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
    trained = ", ".join(sorted(dtype.removeprefix("torch.") for dtype in dtypes))
    quantised = cfg.choices.quant if is_quantised(base.model) else base.dtype
    return {"base": base.held or quantised, "computed_in": computed_in, "trained": trained}
