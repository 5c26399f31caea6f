"""The commands that write a folder from a trained model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.after.test_chat import run_cli

Trained = Callable[..., Path]


def test_inspect_merge_and_check_in_sequence(trained: Trained, tmp_path: Path) -> None:
    run, merged = str(trained("peft=lora", "quant=nf4")), str(tmp_path / "merged")
    page = run_cli("inspect", run)
    assert page.returncode == 0, page.stderr
    assert "norm of each module's update (r 16, alpha 32 everywhere)" in page.stdout
    assert "pkg://lora_exp/assets/tiny at sha256:" in page.stdout
    report = json.loads(run_cli("inspect", run, "--json").stdout)
    assert report["kind"] == "adapter"
    merging = run_cli("merge", run, "-o", merged)
    assert merging.returncode == 0, merging.stderr
    assert f"prove it: lora-exp check {merged} --adapter {run}" in merging.stdout
    options = ("--max-new-tokens", "8")
    proof = run_cli("check", merged, "--adapter", run, *options)
    assert proof.returncode == 0, proof.stderr
    assert "the merged model is the adapter on its base" in proof.stdout
    wrong = run_cli("check", merged, "--adapter", str(trained("peft=rslora")), "--json", *options)
    assert wrong.returncode == 1
    assert json.loads(wrong.stdout)["holds"] is False
    plain = run_cli("check", merged)
    assert plain.returncode == 0
    assert plain.stdout.count(" ok  ") == 4
    again = run_cli("merge", run, "-o", merged)
    assert again.returncode == 1
    assert "--force replaces it" in again.stderr
