"""`scripts/bench` works: tiny measurements on a CPU run the code of large ones, and of a GPU."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.conftest import ROOT


@pytest.fixture
def bench(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, str]]:
    """Measure the cases that have a word, and return each one's result; commands are forked."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from benchmarks.gpu import bench as commands
    from benchmarks.gpu import gpu

    def forked(
        *words: str, timeout: float, env: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        assert timeout > 0
        return warm.python(*words, env=env)

    monkeypatch.setattr(commands, "python", forked)

    def measure(*words: str) -> dict[str, str]:
        gpu("quick", "--device", "cpu", *words)
        head, line, *rows = capsys.readouterr().out.splitlines()
        assert head.count("|") == line.count("|") == 5
        cells = [row.strip("|").split(" | ") for row in rows]
        return {f"{part.strip()}: {case}": result for part, case, result, _ in cells}

    return measure


def test_its_parts_measure(bench: Callable[..., dict[str, str]]) -> None:
    found = bench("resume", "pack against alone, nf4", "2 jobs", "memory")
    assert not [text for text in found.values() if "failed" in text or "not measured" in text]
    assert found["checks: pack against alone, nf4"].startswith("2 of 2 adapters equal; ")
    assert "proven: True" in found["checks: pack against alone, nf4"]
    resumed = found["checks: resume, then merge, bf16"]
    assert resumed.startswith("1 of 1 adapters equal; merge holds; ")
    assert "first adapter equal: True" in found["speed: 8B, 16 tokens, 2 jobs"]
    assert "dequantising" in found["profiles: 8B, 16 tokens, 2 jobs"]
    assert "estimate" in found["memory: 8B, 16 tokens"]


def test_what_fails_is_a_row(
    bench: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import bench as commands

    def failing(*words: str, **_: Any) -> subprocess.CompletedProcess[str]:
        if words[0].endswith("random_base.py"):
            raise subprocess.TimeoutExpired(words, 1)
        return subprocess.CompletedProcess(words, 1, "", "Traceback\nRuntimeError: a | b\n")

    monkeypatch.setattr(commands, "python", failing)
    found = bench("machine", "equal runs")
    assert found["machine: doctor"] == "**failed**: RuntimeError: a / b"
    assert found["bases: small bf16"] == "not measured: the time of its part is over"
    assert found["checks: equal runs, bf16"] == "not measured: the base small was not made"


def test_a_command_and_what_it_started_end_with_their_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from benchmarks.gpu.bench import python

    text = "import os, time; os.fork() or open({!r}, 'a').write('begun'); time.sleep(1)"
    script = text.format(str(tmp_path / "log")) + f"; open({str(tmp_path / 'log')!r}, 'a')"
    with pytest.raises(subprocess.TimeoutExpired):
        python("-S", "-c", f"{script}.write('ended')", timeout=0.5, env={})
    time.sleep(1)
    assert "ended" not in (tmp_path / "log").read_text()


def test_rows_are_measured_beside_datasets_in_processes_of_their_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from benchmarks import rows

    monkeypatch.setattr(rows, "python", warm.python)
    rows.rows("1100", "1")
    table = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        "| map", "| one process", "| data.num_proc=2", "| again"
    ]  # fmt: skip
