"""Private names of libraries that we call or override; a test fails if one is moved."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import sys
from abc import ABC
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import Trainer

import hydra_plugins.lockstep_launcher
import hydra_plugins.search_sweeper
import lora_exp
from lora_exp.training.checkpoint import Checkpoints, checkpointed
from tests.conftest import ROOT

TRAINER, MODEL = "transformers.Trainer", "transformers.PreTrainedModel"
CONFIG, HANDLER = "transformers.PretrainedConfig", "transformers.cli.serving.utils.BaseHandler"
CONVERSION = "transformers.core_model_loading.WeightTransform"
BNB_4BIT = "transformers.quantizers.quantizer_bnb_4bit.Bnb4BitHfQuantizer"
QUANTISING = "transformers.integrations.finegrained_fp8.Fp8Dequantize"
# what ABC and torch's metaclass of functions put into each class themselves
SET_BY_LIBRARIES = {*vars(ABC), "_backward_cls"}
# owner, name, and our files that call or override it
PRIVATE = [
    (TRAINER, "_maybe_log_save_evaluate", "training/checkpoint.py"),
    (TRAINER, "_get_eval_sampler", "training/averages.py"),
    (TRAINER, "_get_output_dir", "training/checkpoint.py"),
    (TRAINER, "set_initial_training_values", "training/checkpoint.py"),
    (TRAINER, "_save_checkpoint", "training/checkpoint.py"),
    (
        TRAINER,
        "_load_best_model",
        "training/checkpoint.py, training/saved_weights.py, training/fsdp.py",
    ),
    (TRAINER, "_issue_warnings_after_load", "training/saved_weights.py, training/fsdp.py"),
    (TRAINER, "_move_model_to_device", "training/fsdp.py"),
    (TRAINER, "_defer_fsdp_gradient_reduction", "training/fsdp.py"),
    (MODEL, "_keys_to_ignore_on_save", "training/saved_weights.py"),
    (TRAINER, "_load_rng_state", "training/checkpoint.py"),
    (TRAINER, "_tr_loss", "training/unlogged.py"),
    (TRAINER, "_globalstep_last_logged", "training/unlogged.py"),
    (
        TRAINER,
        "_load_optimizer_and_scheduler",
        "training/checkpoint.py, algorithm/ppo.py, training/shares.py",
    ),
    (
        TRAINER,
        "_load_from_checkpoint",
        "training/checkpoint.py, training/saved_weights.py, training/fsdp.py, algorithm/ppo.py",
    ),
    (TRAINER, "_save_optimizer_and_scheduler", "algorithm/ppo.py, training/shares.py"),
    (TRAINER, "_get_grad_norm", "training/zero.py, training/fsdp.py"),
    (TRAINER, "_save", "algorithm/ppo.py, training/saved_weights.py, training/fsdp.py"),
    ("accelerate.Accelerator", "_models", "training/checkpoint.py"),
    ("accelerate.Accelerator", "_is_accelerate_prepared", "training/checkpoint.py"),
    ("accelerate.Accelerator", "_original_forward", "training/checkpoint.py"),
    ("accelerate.state.PartialState", "_shared_state", "parallel/world.py"),
    ("transformers.TrainingArguments", "_n_gpu", "training/trainer.py"),
    (TRAINER, "_prepare_inputs", "algorithm/ppo.py"),
    (TRAINER, "_get_dataloader", "algorithm/ppo.py"),
    (TRAINER, "_get_train_sampler", "training/trainer.py, algorithm/ppo.py"),
    ("trl.GRPOTrainer", "_buffered_inputs", "training/rollouts.py"),
    ("trl.GRPOTrainer", "_step", "training/rollouts.py"),
    ("trl.RLOOTrainer", "_buffered_inputs", "training/rollouts.py"),
    ("trl.SFTTrainer", "_metrics", "training/averages.py, training/unlogged.py"),
    ("trl.SFTTrainer", "_total_train_tokens", "training/trainer.py, training/unlogged.py"),
    ("trl.RLOOTrainer", "_step", "training/rollouts.py"),
    (MODEL, "_keep_in_fp32_modules", "after/base_bytes.py, model/sharded.py"),
    (MODEL, "_keep_in_fp32_modules_strict", "model/sharded.py"),
    ("torch", "_C", "model/experts.py"),
    ("torch._C", "_autograd", "model/experts.py"),
    ("torch._C._autograd", "_top_saved_tensors_default_hooks", "model/experts.py"),
    ("torch.library.Library", "_destroy", "model/invariance.py"),
    (BNB_4BIT, "_process_model_before_weight_loading", "model/experts.py"),
    (BNB_4BIT, "_process_model_after_weight_loading", "model/experts.py"),
    ("transformers.AutoModelForMultimodalLM", "_model_mapping", "model/text_part.py"),
    (MODEL, "_no_split_modules", "model/sharded.py"),
    (
        "transformers.distributed.fsdp",
        "_is_fsdp_managed_module",
        "model/sharded.py, model/packing.py",
    ),
    (MODEL, "hf_quantizer", "adapter/attach.py"),
    ("transformers.core_model_loading", "_weight_conversions", "model/prequantised.py"),
    (CONVERSION, "_original_target_patterns", "model/prequantised.py"),
    (QUANTISING, "hf_quantizer", "model/prequantised.py"),
    (CONFIG, "_attn_implementation", "lockstep/eligibility.py, lockstep/body.py"),
    (CONFIG, "_commit_hash", "model/identity.py"),
    ("transformers.modeling_layers", "_gradient_checkpointing_func", "lockstep/body.py"),
    (HANDLER, "_resolve_model", "after/endpoints.py"),
    (HANDLER, "_build_generation_config", "after/endpoints.py"),
    (HANDLER, "_unused_fields", "after/endpoints.py"),
    ("accelerate.state.PartialState", "_shared_state", "lockstep/state.py"),
    ("accelerate.state.AcceleratorState", "_shared_state", "lockstep/state.py"),
    ("accelerate.state.GradientState", "_shared_state", "lockstep/state.py"),
    (
        "hydra.core.utils.JobReturn",
        "_return_value",
        "record/sweep.py, lockstep/worker.py, lockstep/events.py, search_sweeper/_core.py, "
        "lockstep_launcher/_jobs.py",
    ),
    (
        "hydra",
        "_internal.callbacks.Callbacks",
        "lockstep/worker.py, lockstep_launcher/_jobs.py, lockstep_launcher/__main__.py, "
        "tests/lockstep/test_launcher.py",
    ),
    ("hydra", "_internal.config_loader_impl.ConfigLoaderImpl", "lockstep_launcher/_loading.py"),
    ("hydra", "_internal.hydra.Hydra", "lockstep_launcher/__main__.py"),
    ("hydra", "_internal.utils.create_config_search_path", "lockstep_launcher/__main__.py"),
    ("submitit.SlurmExecutor", "_submit_command", "lockstep/slurm.py"),
    (
        "hydra._internal.config_loader_impl.ConfigLoaderImpl",
        "_apply_overrides_to_config",
        "lockstep_launcher/_loading.py",
    ),
    (
        "hydra",
        "_internal.config_loader_impl.get_overrides_dirname",
        "lockstep_launcher/_loading.py",
    ),
    ("hydra", "_internal.utils.get_args_parser", "tests/test_commands.py"),
    ("omegaconf.DictConfig", "_content", "config/door.py"),
    ("omegaconf.DictConfig", "_get_node", "config/frozen.py, lockstep_launcher/_loading.py"),
    ("omegaconf.nodes.ValueNode", "_val", "config/frozen.py, lockstep_launcher/_loading.py"),
    ("optuna.samplers.NSGAIISampler", "_get_generation_key", "search/study.py"),
    ("omegaconf", "_utils.get_omega_conf_dumper", "files/yaml_text.py"),
    ("peft.tuners.tuners_utils", "_check_lora_target_modules_mamba", "adapter/targets.py"),
    ("torch.optim.lr_scheduler.LRScheduler", "_last_lr", "training/resumption.py"),
    ("torch.utils", "_python_dispatch.TorchDispatchMode", "lockstep/proof.py"),
    (
        "torch.nn.parallel.DistributedDataParallel",
        "_set_params_and_buffers_to_ignore_for_model",
        "model/sharded.py",
    ),
    ("torch.Tensor", "_version", "lockstep/layers.py"),
    ("torch.nn.Module", "_parameters", "lockstep/probe.py"),
    ("torch.nn.Module", "_forward_pre_hooks", "lockstep/eligibility.py"),
    ("torch.nn.Module", "_forward_hooks", "lockstep/eligibility.py"),
    ("torch.nn.Module", "_backward_pre_hooks", "lockstep/eligibility.py"),
    ("torch.nn.Module", "_backward_hooks", "lockstep/eligibility.py"),
]
NAMES = {name for _, name, _ in PRIVATE}
OURS = ("lora_exp", "hydra_plugins")
SOURCES = [path for folder in OURS for path in (ROOT / folder).rglob("*.py")]


def resolve(dotted: str) -> Any:
    """Return the module or object of a dotted name."""
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return getattr(resolve(module), name)


def has(owner: str, name: str) -> bool:
    """Return whether a name exists, or is at least set or read in its owner's source."""
    try:
        resolve(f"{owner}.{name}")
    except (ImportError, AttributeError):
        try:
            return re.search(rf"\b{name}\b", inspect.getsource(resolve(owner))) is not None
        except (ImportError, AttributeError, TypeError):
            return False
    return True


@pytest.mark.parametrize(("owner", "name", "ours"), PRIVATE, ids=lambda value: value)
def test_a_private_name_that_we_use_is_still_there(owner: str, name: str, ours: str) -> None:
    package = owner.partition(".")[0]
    version = importlib.metadata.version({"hydra": "hydra-core"}.get(package, package))
    assert has(owner, name), (
        f"{package} {version} has no {owner}.{name} any more; {ours} uses it: "
        f"find its replacement there, or keep the older {package} in pyproject.toml"
    )


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[a-z]\w*(?<!_)", name) is not None


def names_used(tree: ast.Module) -> Iterator[str]:
    """Yield the private names that a file uses of other objects than its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            yield str(getattr(node.args[1], "value", ""))
        if isinstance(node, ast.ImportFrom):
            at = f".{node.module}.".find("._")
            if at >= 0 and not str(node.module).startswith(("__", "lora_exp", "hydra_plugins")):
                yield from (f"{str(node.module)[at:]}.{alias.name}" for alias in node.names)


def names_defined(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a file defines, or sets on `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) == "self" else []


def classes() -> Iterator[type]:
    """Yield every class of ours, and our mixin of checkpoints on the trainer it is mixed into."""
    for package in (lora_exp, hydra_plugins.lockstep_launcher, hydra_plugins.search_sweeper):
        for module_info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module_info.name.endswith("__main__"):
                members = vars(importlib.import_module(module_info.name)).values()
                yield from (member for member in members if isinstance(member, type))
    yield checkpointed(Trainer)


def test_every_private_name_that_we_use_is_listed() -> None:
    trees = {path: ast.parse(path.read_text()) for path in SOURCES}
    ours = {name for tree in trees.values() for name in names_defined(tree)}
    for path, tree in trees.items():
        names = {name for name in names_used(tree) if is_private(name.partition(".")[0])}
        assert not names - ours - NAMES, (
            f"{path}: list the names that it uses of libraries in PRIVATE"
        )


def test_every_private_name_that_we_override_is_listed() -> None:
    assert Checkpoints in checkpointed(Trainer).__mro__
    for our_class in classes():
        tops = {base: base.__module__.partition(".")[0] for base in our_class.__mro__}
        ours = {name for base, top in tops.items() if top in OURS for name in vars(base)}
        theirs = set(tops.values()) - {*OURS, *sys.stdlib_module_names}
        names = {name for base, top in tops.items() if top in theirs for name in vars(base)}
        overridden = {name for name in ours & names if is_private(name)} - SET_BY_LIBRARIES
        assert not overridden - NAMES, f"{our_class}: list the names that it overrides in PRIVATE"


def test_a_missing_name_is_detected() -> None:
    assert not has(TRAINER, "_a_name_that_was_never_there")
    assert not has("hydra", "_internal.callbacks.Nobody")


@pytest.mark.parametrize("files", sorted({files for *_, files in PRIVATE}))
def test_the_list_names_files_that_use_it(files: str) -> None:
    for file in files.split(", "):
        folder = next(f for f in ("lora_exp", "hydra_plugins", ".") if (ROOT / f / file).is_file())
        text = (ROOT / folder / file).read_text()
        for _, name, listed in PRIVATE:
            if listed == files:
                assert name.rpartition(".")[2] in text, f"{file} does not use {name}"
