"""What processes share out, and what is refused before anything loads; without torch."""

from __future__ import annotations

from typing import Any

import pytest

from lora_exp import compose
from lora_exp.config import processes
from lora_exp.config import sharding as module
from lora_exp.config.settled import fingerprint
from lora_exp.config.sharding import sharding
from lora_exp.errors import ConfigError
from tests.config.test_validation import faults

TWO = ["parallel=zero2", "parallel.processes=2"]


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "VISIBLE", [])
    monkeypatch.setattr(module, "find_spec", lambda _: object())


def test_several_processes_share_out_what_the_option_says() -> None:
    assert sharding(compose(*TWO)) == "zero2"
    assert sharding(compose("parallel=ddp", "parallel.processes=2")) is None
    assert sharding(compose()) is None
    assert fingerprint(compose(*TWO)) != fingerprint(compose("parallel=ddp", TWO[1]))


def test_one_process_has_nothing_to_share_out() -> None:
    cfg = compose("parallel=zero2", "parallel.processes=1")
    assert sharding(cfg) is None
    assert fingerprint(cfg) == fingerprint(compose())


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (["parallel.sharding=zero1"], "parallel.sharding", "'zero1' is none of zero2, fsdp"),
        (["parallel.sharding=[zero2]"], "parallel.sharding", "is none of zero2, fsdp"),
        (["experiment=demo_ppo"], "parallel", "zero2: ppo trains in two backward passes"),
        (["peft=adalora"], "parallel", "zero2: adalora needs the gradients after a step"),
        (["train.optim=adafactor"], "train.optim", "does not update each number by itself"),
        (["+train.fp16=true"], "train.fp16", "does not scale the loss; give train.bf16=true"),
        (["early_stopping=median"], "early_stopping", "median compares jobs"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(overrides: list[str], key: str, message: str) -> None:
    assert message in faults(*TWO, *overrides)[key]


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (["quant=nf4"], "quant", "nf4 with fsdp gives wrong numbers (bitsandbytes issue 1945)"),
        (["quant=int8"], "quant", "keeps all weights (accelerate PR 3987); give parallel=ddp"),
        (["peft=none", "experiment=demo_ppo"], "parallel", "peft=none: ppo trains two models"),
        (["peft=none", "experiment=demo_grpo"], "parallel", "grpo loads its reference whole"),
        (["peft=none", "train.optim=adafactor"], "train.optim", "does not update each number"),
        (
            ["peft=none", "experiment=demo_dpo", "+algorithm.args.sync_ref_model=true"],
            "algorithm.args.sync_ref_model",
            "a reference that is updated cannot be saved",
        ),
        (
            ["experiment=demo_dpo", "+algorithm.args.precompute_ref_log_probs=true"],
            "algorithm.args.precompute_ref_log_probs",
            "needs whole weights",
        ),
        (["peft=none", "+train.fp16=true"], "train.fp16", "does not scale the loss"),
        (["targets=experts"], "parallel", "adapters of whole parameters need them outside"),
        (["peft=adalora"], "parallel", "fsdp: adalora changes weights outside of a pass"),
        (["algorithm=seq2seq"], "parallel", "encoder and decoder make passes of their own"),
        (["early_stopping=halving"], "early_stopping", "halving compares jobs"),
    ],
)
def test_what_needs_whole_layers_is_refused(overrides: list[str], key: str, message: str) -> None:
    assert message in faults("parallel=fsdp", "parallel.processes=2", *overrides)[key]


def test_a_quantised_base_cannot_be_shared_out_in_one_process_either() -> None:
    """The same command is refused on a laptop and on a node with eight GPUs."""
    assert "nf4 with fsdp gives wrong numbers" in faults("parallel=fsdp", "quant=nf4")["quant"]
    assert compose("parallel=fsdp").parallel.processes == 1


def test_names_of_other_tools_have_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"parallel: .*zero3.*fsdp"):
        compose("parallel=zero3")


def test_a_missing_package_is_one_line_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        assert name == "deepspeed"

    monkeypatch.setattr(module, "find_spec", missing)
    text = 'zero2 needs the package deepspeed: pip install "lora-exp[deepspeed]"'
    assert faults(*TWO) == {"parallel": text}
