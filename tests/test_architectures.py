"""The kinds of models that most people tune: trained, opened by plain PEFT, merged, rewarded.

`scripts/architectures` tries all kinds and all commands; these are some of its cells.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.architectures.__main__ import table
from scripts.architectures.checks import Checks, write_rows
from scripts.architectures.models import KINDS, make

MOST_USED = (
    "llama 3", "mistral, sliding", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2",
    "granite", "glm4", "gpt_neox", "lfm2",
)  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    write_rows(folder)
    return folder


@pytest.mark.parametrize("kind", MOST_USED)
def test_an_adapter_of_this_kind_is_trained_opened_and_merged(kind: str, work: Path) -> None:
    checks = Checks(work, kind)
    make(kind, checks.model)
    assert [checks.train(), checks.peft(), checks.merge()] == ["yes"] * 3


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
