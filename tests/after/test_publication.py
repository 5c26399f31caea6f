"""Publishing: the trained model is uploaded whole, and nothing else of this machine."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from lora_exp.after.merging import merge
from lora_exp.after.publication import dry_run, push
from lora_exp.errors import HubError, SavedError
from tests.after.copies import copy_run
from tests.warm import python

Trained = Callable[..., Path]
TOKEN = "hf_" + "x" * 24
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
TOKENIZER = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
MODEL = {"README.md", "config.json", "generation_config.json", "model.safetensors"}


class Hub(ThreadingHTTPServer):
    """A server that answers like the Hub when a repository is created and small files committed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repos: dict[str, str] = {}  # repository -> visibility
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}  # by repository and branch
        self.messages: list[str] = []
        self.tokens: set[str] = set()
        self.refuses: tuple[str, int, str] | None = None  # part of a path, status, message

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        repo = self.path.partition("?")[0].removeprefix("/api/models/")
        known = self.server.repos.get(repo)
        if known is None:
            self._reply(404, {"error": "Repository not found"})
        else:
            self._reply(200, {"id": repo, "sha": "0" * 40, "private": known == "private"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuses and self.server.refuses[0] in self.path:
            _, status, message = self.server.refuses
            self._reply(status, {"error": message})
            return
        parts = self.path.partition("?")[0].removeprefix("/api/").split("/")
        if parts == ["repos", "create"]:
            self._create(json.loads(body))
        elif parts == ["validate-yaml"]:
            self._reply(200, {"errors": [], "warnings": []})
        elif parts[3] == "branch":
            self.server.files["/".join(parts[1:3]), parts[4]] = {}
            self._reply(200, {})
        elif parts[3] == "preupload":
            files = json.loads(body)["files"]
            settings = {"uploadMode": "regular", "shouldIgnore": False}
            self._reply(200, {"files": [{"path": file["path"], **settings} for file in files]})
        elif parts[3] == "commit":
            self._commit("/".join(parts[1:3]), parts[4], body)

    def _create(self, request: dict[str, Any]) -> None:
        repo = f"{request['organization']}/{request['name']}"
        if repo in self.server.repos:
            url = f"{self.server.url}/{repo}"
            self._reply(409, {"error": "You already created this model repo", "url": url})
            return
        self.server.repos[repo] = request["visibility"]
        self._reply(200, {"url": f"{self.server.url}/{repo}"})

    def _commit(self, repo: str, branch: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        self.server.messages.append(lines[0]["value"]["summary"])
        values = (line["value"] for line in lines[1:])
        files = {value["path"]: base64.b64decode(value["content"]) for value in values}
        self.server.files[repo, branch] = files
        commit = f"{self.server.url}/{repo}/commit/{'1' * 40}"
        self._reply(200, {"success": True, "commitOid": "1" * 40, "commitUrl": commit})

    def _reply(self, status: int, answer: Any) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        Thread(target=server.serve_forever).start()
        yield server
        server.shutdown()


@pytest.fixture
def client_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The same server for this process, whose client has read its environment already."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


# in a process that has imported the Hub's client already, which reads its environment once
PUSH = """
import os
from huggingface_hub import constants
constants.ENDPOINT, constants.HF_HUB_OFFLINE = os.environ["HF_ENDPOINT"], False
constants.HF_TOKEN_PATH = os.environ["HF_HOME"] + "/token"
from tests.after.copies import copy_run
from lora_exp.cli import main
main()
"""


def run_push(
    url: str, *arguments: str, token: str = TOKEN, home: Path = Path()
) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HOME": str(home)}
    return python("-c", PUSH, "push", *arguments, env=os.environ | settings)


def run_push_anew(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-m", "lora_exp.cli", "push", *arguments],
        env=os.environ | settings, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_adapter_is_uploaded_byte_for_byte_and_private(
    hub: Hub, trained: Trained, tmp_path: Path
) -> None:
    run = trained("peft=lora")
    done = run_push_anew(hub.url, str(run), "me/mirror")
    assert done.returncode == 0, done.stderr
    uploaded = hub.files["me/mirror", "main"]
    assert uploaded == contents(dry_run(run, "me/mirror", tmp_path / "dry"))
    assert set(uploaded) == ADAPTER | TOKENIZER
    for name in {"adapter_model.safetensors", *TOKENIZER}:
        assert uploaded[name] == (run / "adapter" / name).read_bytes()
    assert hub.repos == {"me/mirror": "private"}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert hub.messages == ["mirror, with lora-exp"]
    assert f"{hub.url}/me/mirror\nprivate, commit {'1' * 40}" in done.stdout


def test_a_model_can_be_uploaded_public_to_a_branch_with_a_message(
    hub: Hub, trained: Trained
) -> None:
    run = trained("peft=none")
    options = ["--public", "--revision", "v1", "--message", "all of it"]
    done = run_push(hub.url, str(run), "me/whole", *options)
    assert done.returncode == 0, done.stderr
    uploaded = hub.files["me/whole", "v1"]
    assert set(uploaded) == MODEL | TOKENIZER
    weights = (run / "model" / "model.safetensors").read_bytes()
    assert uploaded["model.safetensors"] == weights
    assert hub.repos == {"me/whole": "public"}
    assert hub.messages == ["all of it"]


def test_a_second_push_goes_to_the_same_repository(client_hub: Hub, trained: Trained) -> None:
    run = trained("peft=lora")
    assert push(run, "me/mirror") == push(run, "me/mirror")
    assert len(client_hub.messages) == 2


def test_a_push_to_a_public_repository_needs_public(client_hub: Hub, trained: Trained) -> None:
    client_hub.repos["me/mirror"] = "public"
    with pytest.raises(HubError, match="me/mirror exists and is public; give --public"):
        push(trained("peft=lora"), "me/mirror")
    assert not client_hub.files
    assert push(trained("peft=lora"), "me/mirror", public=True)["private"] is False


@pytest.mark.parametrize(
    ("endpoint", "status", "message", "expected"),
    [
        ("create", 401, "Invalid token", "401 (Invalid token); the token is not accepted"),
        ("create", 403, "No rights", "403 (No rights); the token may not write there"),
        ("create", 500, "Oops", "500 (Oops); try again later"),
        ("commit", 412, "A commit happened since", "412 (A commit happened since)"),
        ("commit", 409, "Another is going on", "409 (Another is going on)"),
        ("yaml", 400, "licence", "Invalid metadata in README.md."),
    ],
)
def test_a_refusal_of_the_hub_is_one_clear_line(
    client_hub: Hub, trained: Trained, endpoint: str, status: int, message: str, expected: str
) -> None:
    client_hub.refuses = (endpoint, status, message)
    with pytest.raises(HubError, match=r"^me/mirror was not uploaded: ") as error:
        push(trained("peft=lora"), "me/mirror")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert not client_hub.files


def test_a_missing_network_is_one_clear_line(trained: Trained) -> None:
    done = run_push("http://127.0.0.1:9", str(trained("peft=lora")), "me/mirror")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "HubError: me/mirror was not uploaded: http://127.0.0.1:9 cannot be reached"
    )


def test_without_a_token_only_a_dry_run_works(hub: Hub, trained: Trained, tmp_path: Path) -> None:
    run = str(trained("peft=lora"))
    done = run_push(hub.url, run, "me/mirror", token="", home=tmp_path)
    assert done.returncode == 1
    assert "`hf auth login`" in done.stderr
    options = ["--dry-run", "-o", str(tmp_path / "dry")]
    dry = run_push(hub.url, run, "me/mirror", *options, token="", home=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "to me/mirror, main, private" in dry.stdout
    assert set(contents(tmp_path / "dry")) == ADAPTER | TOKENIZER
    assert not hub.repos


@pytest.mark.parametrize("name", ["me", "a/b/c", "me/x y", "me/.x", "me/x--y"])
def test_an_invalid_name_is_refused_before_anything_loads(name: str) -> None:
    with pytest.raises(SavedError):
        push("nowhere", name)  # the path does not exist either, but is not read
    with pytest.raises(SavedError, match="nowhere does not exist"):
        dry_run("nowhere", "me/x")


def test_files_that_only_the_run_needs_are_not_uploaded(trained: Trained, tmp_path: Path) -> None:
    run = copy_run(trained("peft=lora"), tmp_path / "run")
    (run / "adapter" / "notes.txt").write_text("mine")
    (run / "adapter" / "training_args.bin").write_text("mine")
    checkpoint = max((run / "checkpoints").glob("checkpoint-*"))
    assert (checkpoint / "optimizer.pt").is_file()
    for path in (run, checkpoint):
        out = dry_run(path, "me/x", tmp_path / f"dry-{path.name}")
        assert set(contents(out)) == ADAPTER | TOKENIZER


def test_the_card_says_how_to_load_it_from_the_hub(trained: Trained, tmp_path: Path) -> None:
    card = (dry_run(trained("peft=lora"), "me/mirror", tmp_path / "a") / "README.md").read_text()
    assert 'PeftModel.from_pretrained(base, "me/mirror")' in card
    assert "base_model" not in card.partition("\n# ")[0]  # the Hub has no pkg://


def test_the_card_of_a_merged_model_names_its_parts(trained: Trained, tmp_path: Path) -> None:
    run = trained("peft=lora", "quant=nf4")
    merged = merge([run], tmp_path / "merged", dtype="bfloat16", into="dequantised")
    out = dry_run(merged, "me/merged", tmp_path / "dry")
    assert set(contents(out)) == MODEL | TOKENIZER | {"merge.json"}
    card = ModelCard((out / "README.md").read_text())
    assert card.data.library_name == "transformers"
    record = json.loads((out / "merge.json").read_text())
    assert "A whole model in bfloat16" in card.text
    assert record["adapters"][0]["sha256"][:12] in card.text
    assert f"`pkg://lora_exp/assets/tiny` at `{record['base']['revision']}`" in card.text
    assert "as nf4 held it, dequantised" in card.text
    assert 'AutoModelForCausalLM.from_pretrained("me/merged", dtype="auto")' in card.text
    assert "PeftModel" not in card.text
    assert "rows to train on" in card.text
    assert card.text.count("\n# ") == 1


def test_a_base_on_this_machine_needs_a_hub_id(trained: Trained, tmp_path: Path) -> None:
    from lora_exp.files.paths import asset

    local_base = copy_run(asset("pkg://lora_exp/assets/tiny"), tmp_path / "own base")
    run = trained("peft=lora", "model=local", f"model.path='{local_base}'", "rate.model=10")
    merged = merge([run], tmp_path / "merged")
    full = trained("peft=none", "model=local", f"model.path='{local_base}'", "rate.model=10")
    for path in (run, merged, full):
        with pytest.raises(SavedError, match=r"a folder of this machine .*--base-id OWNER/NAME"):
            dry_run(path, "me/x", tmp_path / "dry")
        assert not (tmp_path / "dry").exists()
        out = dry_run(path, "me/x", tmp_path / "dry", base_id="them/tiny")
        assert not any(str(tmp_path).encode() in text for text in contents(out).values())
        assert ModelCard((out / "README.md").read_text()).data.base_model == "them/tiny"
        shutil.rmtree(out)
    out = dry_run(run, "me/x", tmp_path / "dry", base_id="them/tiny")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "them/tiny"
    packaged = dry_run(trained("peft=lora"), "me/x", tmp_path / "packaged", base_id="them/tiny")
    card = (packaged / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("them/tiny")' in card
    assert "lora_exp.config" not in card


def test_an_adapter_that_names_no_base_needs_a_base_id(trained: Trained, tmp_path: Path) -> None:
    adapter = copy_run(trained("peft=lora") / "adapter", tmp_path / "alone")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(SavedError, match="names no base; give --base-id OWNER/NAME"):
        dry_run(adapter, "me/x", tmp_path / "dry")
    out = dry_run(adapter, "me/x", tmp_path / "dry", base_id="them/tiny")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config == json.loads(file.read_text()) | {"base_model_name_or_path": "them/tiny"}


@pytest.mark.parametrize(
    ("name", "text"), [("README.md", "password: hunter2!"), ("chat_template.jinja", TOKEN)]
)
def test_a_secret_in_a_text_is_refused(
    trained: Trained, tmp_path: Path, name: str, text: str
) -> None:
    run = copy_run(trained("peft=lora"), tmp_path / "run")
    with (run / "adapter" / name).open("a") as file:
        file.write(text)
    with pytest.raises(SavedError, match=f"{name} holds what looks like a secret"):
        dry_run(run, "me/x", tmp_path / "dry")
    assert not (tmp_path / "dry").exists()


def test_weights_that_are_missing_damaged_or_not_finite_are_refused(
    trained: Trained, tmp_path: Path
) -> None:
    run = copy_run(trained("peft=none"), tmp_path / "run")
    file = run / "model" / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(SavedError, match=r"is not finite; not uploaded"):
        dry_run(run, "me/x", tmp_path / "dry")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SavedError, match=r"model\.safetensors is damaged"):
        dry_run(run, "me/x", tmp_path / "dry")
    file.rename(run / "model" / "other.safetensors")
    with pytest.raises(SavedError, match="has no weights to upload"):
        dry_run(run, "me/x", tmp_path / "dry")
    assert not (tmp_path / "dry").exists()


def test_a_missing_shard_is_named(trained: Trained, tmp_path: Path) -> None:
    merged = merge([trained("peft=lora")], tmp_path / "merged", max_shard_size="1MB")
    shards = sorted(merged.glob("model-*.safetensors"))
    assert len(shards) > 2
    out = dry_run(merged, "me/x", tmp_path / "dry")
    assert {shard.name for shard in shards} < set(contents(out))
    shards[1].unlink()
    with pytest.raises(SavedError, match=f"lacks {shards[1].name}, which model"):
        dry_run(merged, "me/x", tmp_path / "dry", force=True)
    assert (out / shards[1].name).is_file()  # the earlier output stays


def test_a_dry_run_replaces_files_only_with_force(trained: Trained, tmp_path: Path) -> None:
    run, folder = trained("peft=lora"), tmp_path / "dry"
    dry_run(run, "me/x", folder)
    with pytest.raises(SavedError, match="--force replaces it"):
        dry_run(run, "me/x", folder)
    dry_run(run, "me/y", folder, force=True)
    assert '"me/y"' in (folder / "README.md").read_text()
    with pytest.raises(SavedError, match="is also the input"):
        dry_run(folder, "me/x", folder, force=True)


def test_python_callers_get_the_same_error_without_a_token(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(HubError, match="--dry-run needs no token"):
        push(trained("peft=lora"), "me/x")
