"""Mistakes inside arguments are one line each, before anything loads."""

from __future__ import annotations

import inspect

import pytest
import transformers.optimization
from transformers import trainer_optimizer

from lora_exp import compose
from lora_exp.config.arguments import NEEDED, OPTIM_ARGS, OPTIMIZATION, SCHEDULERS
from lora_exp.config.signature import members, signature
from tests.config.test_validation import faults

KWARGS, ARGS = "train.lr_scheduler_kwargs", "train.optim_args"


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (["train.lr_scheduler_type=polynomial", f"+{KWARGS}={{powr: 2}}"], f"{KWARGS}.powr",
         "polynomial has no such argument (did you mean power?)"),
        (["train.lr_scheduler_type=polynomial", f"+{KWARGS}={{lr_end: 0.1}}"], f"{KWARGS}.lr_end",
         "not below the learning rate"),
        (["train.lr_scheduler_type=linear", f"+{KWARGS}={{num_cycles: 2}}"],
         f"{KWARGS}.num_cycles", "it takes none"),
        (["train.lr_scheduler_type=cosine_with_restarts", f"+{KWARGS}={{num_cycles: two}}"],
         f"{KWARGS}.num_cycles", "'two' is not int"),
        (["train.lr_scheduler_type=polynomial", f"+{KWARGS}={{power: high}}"], f"{KWARGS}.power",
         "'high' is not a number"),
        (["train.lr_scheduler_type=cosine_warmup_with_min_lr"], KWARGS, "needs one of min_lr"),
        (["train.lr_scheduler_type=cosine_with_min_lr",
          f"+{KWARGS}={{min_lr: 1e-6, min_lr_rate: 0.1}}"], KWARGS, "needs one of"),
        (["train.lr_scheduler_type=warmup_stable_decay",
          f"+{KWARGS}={{num_decay_steps: 2, decay_type: sqrt}}"], f"{KWARGS}.decay_type",
         "linear or cosine or 1-sqrt"),
        (["train.lr_scheduler_type=reduce_lr_on_plateau", f"+{KWARGS}={{factor: 1.5}}"],
         f"{KWARGS}.factor", "above 0 and below 1"),
        (["train.lr_scheduler_type=greedy", "train.eval_strategy=no"], "train.lr_scheduler_type",
         "follows evaluations"),
        ([f"+{KWARGS}=power"], KWARGS, "is not a section"),
        (["train.optim=sgd", f'+{ARGS}="momentun=0.9"'], ARGS, "did you mean momentum?"),
        (["train.optim=sgd", f'+{ARGS}="momentum"'], ARGS, "name=value"),
        (["train.optim=rmsprop", f'+{ARGS}="alpha=high"'], ARGS, "alpha=high: give a number"),
        (["train.optim=sgd", f'+{ARGS}="nesterov=y"'], ARGS, "nesterov=y: give true or false"),
        (["train.optim=adagrad", f'+{ARGS}="weight_decay=0.1"'], ARGS, "give train.weight_decay"),
        (["train.optim=adafactor", "+train.optim_target_modules=all-linear"],
         "train.optim_target_modules", "does not read it"),
        (["train.optim=lomo"], "train.optim", "lomo-optim, which is not installed"),
        (["train.optim=schedule_free_radam"], "train.optim", "schedulefree, which is not"),
        (["train.optim=stable_adamw"], "train.optim", "torch-optimi, which is not installed"),
        (["+train.use_liger_kernel=true"], "train.use_liger_kernel", "liger-kernel"),
        (["model.attn_implementation=flash_attention_2"], "model.attn_implementation",
         "flash-attn, which is not installed"),
        (["+train.adam_beta2=1"], "train.adam_beta2", "below 1"),
        (["+train.adam_beta1=-0.1"], "train.adam_beta1", "below 1"),
        (["+train.adam_epsilon=0"], "train.adam_epsilon", "above 0"),
        (["train.weight_decay=-0.5"], "train.weight_decay", "0 or more"),
        (["train.max_grad_norm=-1"], "train.max_grad_norm", "0 or more"),
        (["train.warmup_steps=-5"], "train.warmup_steps", "0 or more"),
        (["+train.metric_for_best_model=eval/mean_token_accuracy"], "train.metric_for_best_model",
         "did you mean eval_mean_token_accuracy"),
        (["+train.metric_for_best_model=accuracy"], "train.metric_for_best_model",
         "is not measured"),
        (["+train.greater_is_better=true"], "train.greater_is_better", "give goal=maximize"),
    ],
)  # fmt: skip
def test_a_mistake_inside_an_argument_is_an_error(
    overrides: list[str], key: str, message: str
) -> None:
    faults_by_key = faults(*overrides)
    assert list(faults_by_key) == [key]
    assert message in faults_by_key[key]


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.lr_scheduler_type=polynomial", f"+{KWARGS}={{lr_end: 1e-7, power: 2.0}}"],
        ["train.lr_scheduler_type=cosine_with_min_lr", f"+{KWARGS}={{min_lr_rate: 0.1}}"],
        ["train.lr_scheduler_type=warmup_stable_decay", f"+{KWARGS}={{num_decay_steps: 5}}"],
        ["train.lr_scheduler_type=reduce_lr_on_plateau", f"+{KWARGS}={{patience: 2, mode: max}}"],
        ["train.optim=sgd", f'+{ARGS}="momentum=0.9, nesterov=true"'],
        ["train.optim=paged_ademamix_8bit", f'+{ARGS}="beta3=0.99,t_alpha=100"'],
        ["+train.metric_for_best_model=eval_mean_token_accuracy"],
        ["+train.metric_for_best_model=loss"],
        ["+train.metric_for_best_model=eval_entropy"],
    ],
)
def test_correct_values_inside_arguments_are_accepted(overrides: list[str]) -> None:
    assert compose(*overrides).train.keys() > {"learning_rate", "optim"}


def test_the_schedulers_are_those_of_transformers() -> None:
    assert set(SCHEDULERS) == members("transformers.trainer_utils.SchedulerType")
    functions = transformers.optimization.TYPE_TO_SCHEDULER_FUNCTION
    for name, target in SCHEDULERS.items():
        if target is not None:
            assert signature(target) is not None, target
        if target is not None and target.startswith(f"{OPTIMIZATION}get_"):
            assert functions[name].__name__ == target.removeprefix(OPTIMIZATION)
    for name, names in NEEDED.items():
        assert set(names) <= signature(SCHEDULERS[name]).arguments.keys()


def test_every_optimizer_argument_is_in_its_source() -> None:
    handlers = trainer_optimizer._OPTIMIZER_HANDLERS
    for optimizer, handler in handlers.items():
        names = next((v for k, v in OPTIM_ARGS.items() if str(optimizer.value).startswith(k)), ())
        source = inspect.getsource(handler)
        for name in names:
            assert f'"{name}"' in source, (optimizer, name)
        assert names or "optim_args" not in source or "bitsandbytes" in source, optimizer
