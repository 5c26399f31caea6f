"""A run does not load torch's compiler, and whoever compiles gets it."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_exp import libraries
from tests.conftest import QUICK, ROOT

RUN = """
import gc, sys
from lora_exp.__main__ import main

sys.argv = ["run.py", *sys.argv[1:]]
main()
import torch
compiler = "torch._inductor.compile_fx" in sys.modules
print(compiler, gc.isenabled(), gc.get_freeze_count() > 100_000, torch.compile.__module__)
"""


def test_a_run_does_not_load_torchs_compiler(tmp_path: Path) -> None:
    overrides = ["tracking=none", *QUICK, "train.max_steps=1", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *overrides],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False True True torch"


def test_a_function_is_compiled_at_its_first_call_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, Any]] = []

    def compile_now(function: Any, **options: Any) -> Any:
        compiled.append(options)
        return lambda x: function(x) + 1

    monkeypatch.setattr(torch, "compile", compile_now)
    with libraries._compiled_when_called():
        double = torch.compile(lambda x: 2 * x)
        triple = torch.compile(dynamic=False)(lambda x: 3 * x)
    assert torch.compile is compile_now
    assert compiled == []
    assert [double(1), double(2), triple(1)] == [3, 5, 4]
    assert compiled == [{}, {"dynamic": False}]


def test_collections_go_on_after_an_import_that_fails() -> None:
    def fail() -> None:
        assert not gc.isenabled()
        raise ImportError

    with pytest.raises(ImportError), libraries._without_collections():
        fail()
    assert gc.isenabled()
