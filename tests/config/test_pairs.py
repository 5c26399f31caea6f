"""Pairs that do not work are refused by their values, with the reason."""

from __future__ import annotations

import pytest

from lora_exp import compose
from lora_exp.config.door import CONF
from lora_exp.config.pairs import REFUSED
from tests.config.test_validation import faults


def test_a_quantised_base_cannot_be_fully_trained_or_have_random_weights() -> None:
    assert "cannot be trained" in faults("quant=nf4", "peft=none")["peft"]
    assert "model.random_weights" in faults("quant=int8", "model.random_weights=true")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+peft.use_dora=true", "quant=int8"], "dora on int8"),
        (["+peft.init_lora_weights=pissa_niter_4", "quant=nf4"], "pissa on nf4"),
        (["+peft.init_lora_weights=pissa_niter_4"], None),
        (["peft=pissa", "+peft.use_dora=true", "quant=nf4"], "pissa on nf4"),
        (["+peft.kasa_config={}", "algorithm=dpo", "data=demo_pairs"], "kasa rewrites the base"),
        (["quant=nf4", "quant.quant_type=nf5"], "'nf5' is none of nf4, fp4 (did you mean nf4?)"),
        (["peft=pissa", "peft.use_rslora=true", "peft.rank_pattern={q_proj:2}"], "cannot be saved"),
        (["peft=prompt_tuning", "algorithm.args.packing=true"], "would attend to each other"),
        (["algorithm.args.packing=true", "algorithm.args.max_length=null"], "give a number"),
        (["experiment=balanced", "peft=none"], "is no option of conf/peft"),
        (["peft=prefix_tuning", "train.gradient_checkpointing=true"], "do not survive"),
        (["keep=best", "peft=adalora"], "a part of that state; keep=last, and leave"),
    ],
)
def test_pairs_are_checked_by_their_values(overrides: list[str], message: str | None) -> None:
    if message is None:
        assert compose(*overrides)
    else:
        assert message in " ".join(faults(*overrides).values())


@pytest.mark.parametrize(
    ("method", "quant"), [(m, q) for m, pairs in REFUSED.items() for q in pairs]
)
def test_a_pair_that_does_not_work_is_refused_with_the_reason(method: str, quant: str) -> None:
    option = (CONF / "peft" / f"{method}.yaml").is_file()
    chosen = f"peft={method}" if option else f"+peft.init_lora_weights={method}"
    assert faults(chosen, f"quant={quant}")["peft"] == (
        f"{method} on {quant}: {'; '.join(REFUSED[method][quant])}"
    )
