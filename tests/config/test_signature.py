"""The arguments read from source are those that Python reports."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys

import pytest
from trl import KTOTrainer

from lora_exp.config.door import shipped_targets
from lora_exp.config.signature import compared, fits, functions, signature


@pytest.mark.parametrize("target", sorted(shipped_targets()))
def test_every_shipped_target_reads_as_python_reports_it(target: str) -> None:
    module, _, name = target.rpartition(".")
    real = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    found = signature(target)
    assert found is not None
    assert set(found.arguments) == set(real)
    assert not found.open


def test_a_target_that_swallows_arguments_is_seen() -> None:
    found = signature("transformers.BitsAndBytesConfig")
    assert found is not None
    assert found.open


@pytest.mark.parametrize("target", ["peft.LoraConfigg", "nowhere.at.all", "json", "peft", ""])
def test_a_target_that_does_not_exist_is_none(target: str) -> None:
    assert signature(target) is None


def test_the_losses_that_a_trainer_knows_are_those_it_compares_with() -> None:
    assert compared("trl.KTOTrainer", "loss_type") == {"kto", "apo_zero_unpaired"}
    assert {"sigmoid", "ipo", "sft"} < compared("trl.DPOTrainer", "loss_type")
    assert compared("trl.RewardTrainer", "loss_type") == frozenset()
    assert compared("trl.NoTrainer", "loss_type") == frozenset()
    assert compared("tests.config.test_signature.Mine", "loss_type") > compared(
        "trl.KTOTrainer", "loss_type"
    )


def test_the_functions_of_a_module_are_dotted_names() -> None:
    assert "lora_exp.rewards.exact_match" in functions("lora_exp.rewards")
    assert not any("._" in name for name in functions("lora_exp.rewards"))


def test_reading_a_signature_imports_neither_torch_nor_peft() -> None:
    code = (
        "import sys; from lora_exp.config.signature import signature;"
        "assert signature('trl.SFTConfig'); assert signature('peft.LoraConfig');"
        "assert not {'torch', 'peft', 'trl'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, "int", True),
        (True, "int", False),
        ("abc", "int", False),
        (1, "float", True),
        (None, "int | None", True),
        ("x", "Optional[int]", False),
        (["q"], "Optional[Union[list[str], str]]", True),
        (3, "Optional[Union[list[str], str]]", False),
        ("all", 'Literal["none", "all"]', True),
        ("some", 'Literal["none", "all"]', False),
        (object(), "SomethingElse", True),
        (1, "'str'", False),
    ],
)
def test_values_are_held_against_annotations(
    value: object, annotation: str, expected: bool
) -> None:
    assert fits(value, ast.parse(annotation, mode="eval").body) is expected


class Mine(KTOTrainer):  # type: ignore[misc]
    """A trainer of one's own knows its base's losses, and another."""

    def knows(self) -> bool:
        return bool(self.loss_type == "mine")
