"""A path that does not exist is an error of every command, before torch is imported."""

from __future__ import annotations

import pytest

from tests.cli.test_main import without_torch


@pytest.mark.parametrize(
    "command",
    [
        "inspect nowhere", "save nowhere -o out", "merge nowhere -o out", "check nowhere",
        "check . --adapter nowhere", "chat nowhere", "chat mine=nowhere", "serve nowhere",
        "generate nowhere --prompts p -o out", "evaluate nowhere --data d", "push nowhere me/it",
    ],
)  # fmt: skip
def test_a_missing_path_is_an_error_before_torch_is_imported(command: str) -> None:
    done = without_torch(*command.split())
    assert done.returncode == 1
    assert done.stderr == "SavedError: nowhere does not exist\n"
