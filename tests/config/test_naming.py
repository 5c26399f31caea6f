"""Names of runs, and of a sweep's jobs."""

from __future__ import annotations

from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf, open_dict

from lora_exp import compose
from lora_exp.config.door import CONF
from lora_exp.config.settled import settled_values


def sweep_name(*overrides: str, common: tuple[str, ...] = ()) -> str:
    """Return the name of a job of a sweep."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", list(overrides), return_hydra_config=True)
    choices: Any = OmegaConf.to_container(composed.hydra.runtime.choices)
    with open_dict(composed):
        del composed["hydra"]
    return str(settled_values(composed, choices, overrides, common)["name"])


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "r16-all_linear"),
        (["peft.r=8", "quant=nf4", "targets=qv"], "r8-nf4-qv"),
        (["peft=dora", "peft.r=4"], "dora-r4-all_linear"),
        (["train.learning_rate=1e-4"], "r16-all_linear-learning_rate=1e-4"),
        (["peft=none", "seed=7"], "full-seed=7"),
        (["peft.target_modules=[q_proj,v_proj]"], "r16-target_modules=_q_proj,v_proj_"),
        (["model=local", "model.path=pkg://hydra/conf"], "r16-all_linear-local-path=conf"),
        (
            ["train.eval_strategy=no", "data.max_rows=9", "data.num_proc=2"],
            "r16-all_linear-max_rows=9",
        ),
        (["name=mine", "peft.r=2"], "mine"),
    ],
)
def test_a_run_is_named_after_its_overrides(overrides: list[str], name: str) -> None:
    assert compose(*overrides).name == name


def test_jobs_of_a_sweep_have_different_names_however_long_they_are() -> None:
    lists = (f"[gate_proj,up_proj,down_proj,some_other_projection,{x}_proj]" for x in "qkv")
    names = [sweep_name(f"peft.target_modules={modules}") for modules in lists]
    names += [sweep_name("data=jsonl", f"data.path={x}/train.jsonl") for x in "ab"]
    names += [
        sweep_name(
            "peft.r=8", "train.lr_scheduler_type=constant_with_warmup", "train.weight_decay=0.1",
            f"train.learning_rate={x}e-4",
        )
        for x in (1, 2)
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 48


def test_a_jobs_name_keeps_what_differs_and_leaves_out_what_all_share() -> None:
    words = ["quant=nf4", "train.lr_scheduler_type=constant_with_warmup", "peft.r=8"]
    name = sweep_name(*words, "train.weight_decay=0.1", common=("quant",))
    assert name == "r8-lr_scheduler_type=constant_with_warmup-f94f"
