"""The kinds of models that most people tune: trained, opened by plain PEFT, merged, rewarded.

`scripts/architectures` tries all kinds and all commands; these are some of its cells.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.architectures.__main__ import table
from scripts.architectures.checks import Checks, write_rows
from scripts.architectures.models import KINDS, make

DENSE = (
    "llama 3", "mistral, sliding", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite",
    "falcon_h1",
)  # fmt: skip
MIXTURES = ("qwen3_moe", "gpt_oss", "deepseek_v3")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    write_rows(folder)
    return folder


@pytest.mark.parametrize("kind", [*DENSE, *MIXTURES])
def test_an_adapter_of_this_kind_is_trained_opened_and_merged(kind: str, work: Path) -> None:
    checks = Checks(work, kind)
    make(kind, checks.model)
    assert [checks.train(), checks.peft()] == ["yes"] * 2
    if kind in DENSE:
        assert checks.merge() == "yes"


def test_the_table_has_a_row_for_each_kind_and_a_note_for_each_reason() -> None:
    refused = {"word": "refused", "why": "peft: a | b"}
    lines = table({"qwen3": {"train": {"word": "yes", "why": ""}, "dpo": refused},
                   "gemma": {"dpo": refused}}).splitlines()  # fmt: skip
    assert lines[0].startswith("| kind | train | peft |")
    assert lines[2] == "| qwen3 | yes |  |  |  |  |  |  | refused (1) |  |"
    assert lines[3].startswith("| gemma |  |")
    assert lines[5:] == ["1. peft: a / b"]


def test_no_two_kinds_share_a_folder(work: Path) -> None:
    assert len({Checks(work, kind).model for kind in KINDS}) == len(KINDS)
