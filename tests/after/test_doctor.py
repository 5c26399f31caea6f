"""The doctor reports what is installed, what is wrong and how to fix it."""

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
from tests.warm import python


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lora_exp.cli", "doctor", *arguments],
        env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def run_doctor_warm(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """Run it in a process that has imported torch; `path` is searched first for versions."""
    script = f"import sys; sys.path.insert(0, {path!r}); from lora_exp.cli import main; main()"
    return python("-c", script, "doctor", *arguments)


def states(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    return {line["what"]: (line["state"], line["details"]) for line in json.loads(done.stdout)}


def fake_package(folder: Path, name: str, version: str) -> str:
    """Make a package of another version that is imported before the installed one."""
    dist_info = folder / f"{name}-{version}.dist-info"
    dist_info.mkdir(parents=True)
    (dist_info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )
    return str(folder)


def test_brackets_are_printed_verbatim() -> None:
    text = "pip install 'lora-exp[eval]' brings sacrebleu"
    console = Console(file=io.StringIO(), width=100)
    console.print(doctor([{"state": "known", "what": "extra [eval]", "details": text}]))
    assert isinstance(console.file, io.StringIO)
    assert f"extra [eval]  {text}" in console.file.getvalue()


def test_a_machine_that_passes_the_tests_has_no_errors(tmp_path: Path) -> None:
    done = run_doctor("--json", HF_HOME=str(tmp_path), LORA_EXP_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = states(done)
    assert not [what for what, (state, _) in lines.items() if state == "wrong"]
    needed = [Requirement(line) for line in requires("lora-exp") or () if "extra" not in line]
    for package in needed:
        assert lines[package.name] == ("ok", version(package.name))
    assert lines["4 bits"][0] == "ok"
    assert lines["W&B"] == ("ok", "offline, set by WANDB_MODE")
    assert lines["cache"][0] == "ok"
    assert not (tmp_path / "cache").exists()  # checked without creating it


def test_the_page_has_a_line_for_each_check() -> None:
    done = run_doctor_warm()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["ok", "peft", version("peft")] in lines
    assert any(line[1:3] == ["Hub", "token"] for line in lines)


def test_a_package_of_another_version_is_wrong_and_the_fix_is_printed(tmp_path: Path) -> None:
    done = run_doctor_warm("--json", path=fake_package(tmp_path, "peft", "0.12.0"))
    assert done.returncode == 1
    state, text = states(done)["peft"]
    assert state == "wrong"
    assert text.startswith("0.12.0 is not ")
    assert "pip install 'peft" in text


def test_a_package_that_cannot_be_imported_does_not_stop_other_checks(
    tmp_path: Path,
) -> None:
    (tmp_path / "bitsandbytes.py").write_text("raise ImportError('libcuda.so.1: cannot open')")
    done = run_doctor("--json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    lines = states(done)
    assert lines["bitsandbytes"] == ("wrong", "cannot be checked: libcuda.so.1: cannot open")
    assert lines["disk"][0] in ("ok", "warning")


def test_a_cache_that_cannot_be_written_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache"
    environment = os.environ | {"LORA_EXP_CACHE": str(folder)}
    done = python("-m", "lora_exp.cli", "doctor", env=environment)
    assert done.returncode == 1
    assert "set LORA_EXP_CACHE to another folder" in " ".join(done.stdout.split())


@pytest.mark.parametrize(("key", "state"), [("", "warning"), ("x" * 40, "ok")])
def test_a_missing_login_is_a_warning_with_its_fix(tmp_path: Path, key: str, state: str) -> None:
    done = run_doctor(
        "--json", WANDB_MODE="online", WANDB_API_KEY=key, HF_TOKEN=key, HF_HOME=str(tmp_path),
        HOME=str(tmp_path), NETRC=str(tmp_path / "netrc"), HF_HUB_OFFLINE="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = states(done)
    assert (lines["W&B"][0], lines["Hub token"][0]) == (state, state)
    if state == "warning":
        assert "`wandb login`" in lines["W&B"][1]
        assert "`hf auth login`" in lines["Hub token"][1]
    assert "x" * 40 not in done.stdout + done.stderr
