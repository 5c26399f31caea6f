"""The processor's name and instruction sets are read from the system."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_exp.model import processor


@pytest.fixture
def xeon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = (
        "processor\t: {}\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: fpu avx2 avx512f amx_tile\n"
    )
    (tmp_path / "cpuinfo").write_text(entry.format(0) + "\n" + entry.format(1))
    monkeypatch.setattr(processor, "CPU", tmp_path / "cpuinfo")


@pytest.mark.usefixtures("xeon")
def test_a_processor_has_a_name_and_its_instruction_sets() -> None:
    assert processor.processor() == {
        "model name": "Intel(R) Xeon(R)", "flags": "fpu avx2 avx512f amx_tile",
    }  # fmt: skip
    capability = processor.capability()
    assert capability.startswith("Intel(R) Xeon(R) (AVX2, AVX-512, AMX), torch uses ")
    assert f", {torch.get_num_threads()} thread" in capability


def test_without_cpuinfo_the_machine_type_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "CPU", tmp_path / "none")
    assert set(processor.processor()) == {"machine"}
