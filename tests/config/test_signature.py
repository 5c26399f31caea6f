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
from lora_exp.config.signature import fits, functions, signature, texts_compared_with


@pytest.mark.parametrize("target", sorted(shipped_targets()))
def test_the_signature_of_every_shipped_target_equals_pythons(target: str) -> None:
    module, _, name = target.rpartition(".")
    expected = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    read = signature(target)
    assert read is not None
    assert set(read.arguments) == set(expected)
    assert not read.open


def test_a_target_that_accepts_any_argument_is_detected() -> None:
    bnb_signature = signature("transformers.BitsAndBytesConfig")
    assert bnb_signature is not None
    assert bnb_signature.open


@pytest.mark.parametrize("target", ["peft.LoraConfigg", "nowhere.at.all", "json", "peft", ""])
def test_a_target_that_does_not_exist_is_none(target: str) -> None:
    assert signature(target) is None


def test_the_losses_that_a_trainer_knows_are_those_it_compares_with() -> None:
    assert texts_compared_with("trl.KTOTrainer", "loss_type") == {"kto", "apo_zero_unpaired"}
    assert {"sigmoid", "ipo", "sft"} < texts_compared_with("trl.DPOTrainer", "loss_type")
    assert texts_compared_with("trl.RewardTrainer", "loss_type") == frozenset()
    assert texts_compared_with("trl.NoTrainer", "loss_type") == frozenset()
    assert texts_compared_with(
        "tests.config.test_signature.OwnTrainer", "loss_type"
    ) > texts_compared_with("trl.KTOTrainer", "loss_type")


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
        ([3], "list[str] | None", False),
        ({"prompt": "ask"}, "dict[str, str] | None", True),
        ({"prompt": 3}, "dict[str, str] | None", False),
        ("ask", "dict[str, str] | None", False),
        ("all", 'Literal["none", "all"]', True),
        ("some", 'Literal["none", "all"]', False),
        (object(), "SomethingElse", True),
        (1, "'str'", False),
    ],
)
def test_values_are_checked_against_annotations(
    value: object, annotation: str, expected: bool
) -> None:
    assert fits(value, ast.parse(annotation, mode="eval").body) is expected


class OwnTrainer(KTOTrainer):  # type: ignore[misc]
    """A user's trainer with the losses of its base class, and one more."""

    def knows(self) -> bool:
        return bool(self.loss_type == "mine")
