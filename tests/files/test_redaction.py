"""Secrets are recognised by key, by format and by environment; ordinary words stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_exp.files.redaction import REDACTED, redact, redact_files, redact_text

HF = "hf_" + "a1B2" * 8


@pytest.mark.parametrize("key", ["hub_token", "api_key", "apikey", "password", "client_secret"])
def test_a_secret_is_recognised_by_its_key(key: str) -> None:
    assert redact({"a": [{key: "x"}]}) == {"a": [{key: REDACTED}]}
    assert "hunter2" not in redact_text(f"train.{key}=hunter2")
    assert "hunter2" not in redact_text(f"  {key}: 'hunter2'")


@pytest.mark.parametrize("key", ["eos_token", "pad_token", "max_new_tokens", "num_virtual_tokens"])
def test_keys_about_text_tokens_are_not_secrets(key: str) -> None:
    assert redact({key: "x"}) == {key: "x"}
    assert redact_text(f"{key}: 64") == f"{key}: 64"


def test_a_null_secret_stays_readable() -> None:
    assert redact({"hub_token": None}) == {"hub_token": None}
    assert redact_text("hub_token: null") == "hub_token: null"


def test_a_secret_is_recognised_by_its_format_and_by_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_API_KEY", "canary-in-a-mine")
    assert redact(f"a {HF} b canary-in-a-mine c") == f"a {REDACTED} b {REDACTED} c"


def test_yaml_files_are_redacted_in_place(tmp_path: Path) -> None:
    (tmp_path / "overrides.yaml").write_text(f"- +train.hub_token={HF}\n- peft.r=8\n")
    redact_files(tmp_path)
    assert (tmp_path / "overrides.yaml").read_text() == (
        f"- +train.hub_token={REDACTED}\n- peft.r=8\n"
    )
