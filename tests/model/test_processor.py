"""The processor's name and instruction sets are read from the system."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_exp.model import processor


@pytest.fixture
def xeon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "fpu smep avx2 avx512f amx_tile"
    entry = f"processor\t: {{}}\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: {flags}\n"
    (tmp_path / "cpuinfo").write_text(entry.format(0) + "\n" + entry.format(1))
    monkeypatch.setattr(processor, "CPU", tmp_path / "cpuinfo")


@pytest.mark.usefixtures("xeon")
def test_a_processor_has_a_name_and_its_instruction_sets() -> None:
    assert processor.processor() == {
        "model name": "Intel(R) Xeon(R)", "flags": "fpu smep avx2 avx512f amx_tile",
    }  # fmt: skip
    capability = processor.capability()
    assert capability.startswith("Intel(R) Xeon(R) (AVX2, AVX-512, AMX), torch uses ")
    assert f", {torch.get_num_threads()} thread" in capability


@pytest.mark.usefixtures("xeon")
def test_what_decides_how_a_device_computes_is_short() -> None:
    facts = processor.device_facts("cpu")
    assert (facts["name"], facts["flags"]) == ("Intel(R) Xeon(R)", "amx_tile avx2 avx512f")
    assert facts["capability"] == torch.backends.cpu.get_cpu_capability()


def test_the_settings_of_kernels_are_those_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("OTHER_KEY", "secret")
    settings = processor.kernel_settings()
    assert settings["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert "OTHER_KEY" not in settings


def test_without_cpuinfo_the_machine_type_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "CPU", tmp_path / "none")
    assert set(processor.processor()) == {"machine"}
