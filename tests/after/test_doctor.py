"""The doctor says what is there, what is wrong and what to do; on real packages and folders."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from lora_exp.after.pages import doctor


def asked(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lora_exp.cli", "doctor", *arguments],
        env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def found(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    return {line["what"]: (line["state"], line["told"]) for line in json.loads(done.stdout)}


def fake(folder: Path, name: str, version: str) -> str:
    """Put a package of another version before the installed one, as a second install would."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(folder)


def test_brackets_stand_as_they_are() -> None:
    told = "pip install 'lora-exp[eval]' brings sacrebleu"
    console = Console(file=io.StringIO(), width=100)
    console.print(doctor([{"state": "known", "what": "extra [eval]", "told": told}]))
    assert isinstance(console.file, io.StringIO)
    assert f"extra [eval]  {told}" in console.file.getvalue()


def test_a_machine_that_passes_the_tests_is_well(tmp_path: Path) -> None:
    done = asked("--json", HF_HOME=str(tmp_path), LORA_EXP_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = found(done)
    assert not [what for what, (state, _) in lines.items() if state == "wrong"]
    needed = [Requirement(line) for line in requires("lora-exp") or () if "extra" not in line]
    for package in needed:
        assert lines[package.name] == ("ok", version(package.name))
    assert lines["4 bits"][0] == "ok"
    assert lines["W&B"] == ("ok", "offline, as WANDB_MODE says")
    assert lines["cache"][0] == "ok"
    assert not (tmp_path / "cache").exists()  # looked at, not made


def test_the_page_has_a_line_for_each(tmp_path: Path) -> None:
    done = asked(HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["ok", "peft", version("peft")] in lines
    assert any(line[:3] == ["warning", "Hub", "token"] for line in lines)


def test_a_package_of_another_version_is_wrong_and_its_cure_is_told(tmp_path: Path) -> None:
    done = asked("--json", PYTHONPATH=fake(tmp_path, "peft", "0.12.0"))
    assert done.returncode == 1
    state, told = found(done)["peft"]
    assert state == "wrong"
    assert told.startswith("0.12.0 is not ")
    assert "pip install 'peft" in told


def test_a_package_that_cannot_be_imported_is_wrong_and_the_rest_is_still_told(
    tmp_path: Path,
) -> None:
    (tmp_path / "bitsandbytes.py").write_text("raise ImportError('libcuda.so.1: cannot open')")
    done = asked("--json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    lines = found(done)
    assert lines["bitsandbytes"] == ("wrong", "cannot be looked at: libcuda.so.1: cannot open")
    assert lines["disk"][0] in ("ok", "warning")


def test_a_cache_that_cannot_be_written_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "cache"
    done = asked(LORA_EXP_CACHE=str(place))
    assert done.returncode == 1
    assert "LORA_EXP_CACHE=<folder> names another" in done.stdout


@pytest.mark.parametrize(("key", "state"), [("", "warning"), ("x" * 40, "ok")])
def test_what_is_not_logged_in_is_a_warning_with_its_cure(
    tmp_path: Path, key: str, state: str
) -> None:
    done = asked(
        "--json", WANDB_MODE="online", WANDB_API_KEY=key, HF_TOKEN=key, HF_HOME=str(tmp_path),
        HOME=str(tmp_path), NETRC=str(tmp_path / "netrc"), HF_HUB_OFFLINE="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = found(done)
    assert (lines["W&B"][0], lines["Hub token"][0]) == (state, state)
    if state == "warning":
        assert "`wandb login`" in lines["W&B"][1]
        assert "`hf auth login`" in lines["Hub token"][1]
    assert "x" * 40 not in done.stdout + done.stderr
