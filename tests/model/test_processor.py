"""The processor is named as the system names it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_exp.model import processor


@pytest.fixture
def xeon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = "processor\t: {}\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: fpu avx2 avx512f amx_tile\n"
    (tmp_path / "cpuinfo").write_text(one.format(0) + "\n" + one.format(1))
    monkeypatch.setattr(processor, "CPU", tmp_path / "cpuinfo")


@pytest.mark.usefixtures("xeon")
def test_a_processor_is_its_name_and_what_it_can_do() -> None:
    assert processor.processor() == {
        "model name": "Intel(R) Xeon(R)", "flags": "fpu avx2 avx512f amx_tile",
    }  # fmt: skip
    told = processor.capability()
    assert told.startswith("Intel(R) Xeon(R) (AVX2, AVX-512, AMX), torch uses ")
    assert f", {torch.get_num_threads()} thread" in told


def test_a_system_that_tells_nothing_still_has_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "CPU", tmp_path / "none")
    assert set(processor.processor()) == {"machine"}
