"""Publishing: what is sent is what was trained, whole, and nothing else of this machine."""

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

Trained = Callable[..., Path]
TOKEN = "hf_" + "x" * 24
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
TOKENIZER = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
MODEL = {"README.md", "config.json", "generation_config.json", "model.safetensors"}


class Hub(ThreadingHTTPServer):
    """Answers as the Hub does to a client that makes a repository and commits small files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos: dict[str, str] = {}  # and who may see each
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}  # of a repository's branch
        self.messages: list[str] = []
        self.tokens: set[str] = set()
        self.refuses: tuple[str, int, str] | None = None  # part of a path, status, what is said

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        repo = self.path.partition("?")[0].removeprefix("/api/models/")
        known = self.server.repos.get(repo)
        if known is None:
            self._say(404, {"error": "Repository not found"})
        else:
            self._say(200, {"id": repo, "sha": "0" * 40, "private": known == "private"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuses and self.server.refuses[0] in self.path:
            _, status, said = self.server.refuses
            self._say(status, {"error": said})
            return
        what = self.path.partition("?")[0].removeprefix("/api/").split("/")
        if what == ["repos", "create"]:
            self._create(json.loads(body))
        elif what == ["validate-yaml"]:
            self._say(200, {"errors": [], "warnings": []})
        elif what[3] == "branch":
            self.server.files["/".join(what[1:3]), what[4]] = {}
            self._say(200, {})
        elif what[3] == "preupload":
            files = json.loads(body)["files"]
            told = {"uploadMode": "regular", "shouldIgnore": False}
            self._say(200, {"files": [{"path": file["path"], **told} for file in files]})
        elif what[3] == "commit":
            self._commit("/".join(what[1:3]), what[4], body)

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.server.repos:
            url = f"{self.server.url}/{repo}"
            self._say(409, {"error": "You already created this model repo", "url": url})
            return
        self.server.repos[repo] = asked["visibility"]
        self._say(200, {"url": f"{self.server.url}/{repo}"})

    def _commit(self, repo: str, branch: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        self.server.messages.append(lines[0]["value"]["summary"])
        found = (line["value"] for line in lines[1:])
        files = {value["path"]: base64.b64decode(value["content"]) for value in found}
        self.server.files[repo, branch] = files
        commit = f"{self.server.url}/{repo}/commit/{'1' * 40}"
        self._say(200, {"success": True, "commitOid": "1" * 40, "commitUrl": commit})

    def _say(self, status: int, told: Any) -> None:
        text = json.dumps(told).encode()
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
def near(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The same for this process, where the client has read its environment before."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def pushed(url: str, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    told = {"HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-m", "lora_exp.cli", "push", *arguments],
        env=os.environ | told, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_adapter_arrives_byte_for_byte_and_private(
    hub: Hub, trained: Trained, tmp_path: Path
) -> None:
    run = trained("peft=lora")
    done = pushed(hub.url, str(run), "me/mirror")
    assert done.returncode == 0, done.stderr
    arrived = hub.files["me/mirror", "main"]
    assert arrived == contents(dry_run(run, "me/mirror", tmp_path / "dry"))
    assert set(arrived) == ADAPTER | TOKENIZER
    for name in {"adapter_model.safetensors", *TOKENIZER}:
        assert arrived[name] == (run / "adapter" / name).read_bytes()
    assert hub.repos == {"me/mirror": "private"}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert hub.messages == ["mirror, with lora-exp"]
    assert f"{hub.url}/me/mirror\nprivate, commit {'1' * 40}" in done.stdout


def test_a_model_arrives_public_on_a_branch_with_a_message(hub: Hub, trained: Trained) -> None:
    run = trained("peft=none")
    more = ["--public", "--revision", "v1", "--message", "all of it"]
    done = pushed(hub.url, str(run), "me/whole", *more)
    assert done.returncode == 0, done.stderr
    arrived = hub.files["me/whole", "v1"]
    assert set(arrived) == MODEL | TOKENIZER
    weights = (run / "model" / "model.safetensors").read_bytes()
    assert arrived["model.safetensors"] == weights
    assert hub.repos == {"me/whole": "public"}
    assert hub.messages == ["all of it"]


def test_a_second_push_goes_to_the_same_repository(near: Hub, trained: Trained) -> None:
    run = trained("peft=lora")
    assert push(run, "me/mirror") == push(run, "me/mirror")
    assert len(near.messages) == 2


def test_a_repository_that_is_public_takes_nothing_by_chance(near: Hub, trained: Trained) -> None:
    near.repos["me/mirror"] = "public"
    with pytest.raises(HubError, match="me/mirror is there and public; --public sends"):
        push(trained("peft=lora"), "me/mirror")
    assert not near.files
    assert push(trained("peft=lora"), "me/mirror", public=True)["private"] is False


@pytest.mark.parametrize(
    ("place", "status", "said", "told"),
    [
        ("create", 401, "Invalid token", "401 (Invalid token); the token is not accepted"),
        ("create", 403, "No rights", "403 (No rights); the token may not write there"),
        ("create", 500, "Oops", "500 (Oops); try again later"),
        ("commit", 412, "A commit happened since", "412 (A commit happened since)"),
        ("commit", 409, "Another is going on", "409 (Another is going on)"),
        ("yaml", 400, "licence", "Invalid metadata in README.md."),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_line(
    near: Hub, trained: Trained, place: str, status: int, said: str, told: str
) -> None:
    near.refuses = (place, status, said)
    with pytest.raises(HubError, match=r"^me/mirror was not sent: ") as error:
        push(trained("peft=lora"), "me/mirror")
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert not near.files


def test_no_network_is_told_in_a_line(trained: Trained) -> None:
    done = pushed("http://127.0.0.1:9", str(trained("peft=lora")), "me/mirror")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("HubError: me/mirror was not sent: http://127.0.0.1:9 cannot be reached")


def test_without_a_token_only_a_dry_run_goes_on(
    hub: Hub, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # no token of this machine's user
    run = str(trained("peft=lora"))
    done = pushed(hub.url, run, "me/mirror", token="")
    assert done.returncode == 1
    assert "`hf auth login`" in done.stderr
    dry = pushed(hub.url, run, "me/mirror", "--dry-run", "-o", str(tmp_path / "dry"), token="")
    assert dry.returncode == 0, dry.stderr
    assert "to me/mirror, main, private" in dry.stdout
    assert set(contents(tmp_path / "dry")) == ADAPTER | TOKENIZER
    assert not hub.repos


@pytest.mark.parametrize("name", ["me", "a/b/c", "me/x y", "me/.x", "me/x--y"])
def test_a_name_that_the_hub_would_not_take_is_refused_before_anything(name: str) -> None:
    with pytest.raises(SavedError):
        push("nowhere", name)  # the path, which is wrong too, was not looked at
    with pytest.raises(SavedError, match="nowhere does not exist"):
        dry_run("nowhere", "me/x")


def test_what_belongs_to_the_run_alone_is_not_sent(trained: Trained, tmp_path: Path) -> None:
    run = copied(trained("peft=lora"), tmp_path / "run")
    (run / "adapter" / "notes.txt").write_text("mine")
    (run / "adapter" / "training_args.bin").write_text("mine")
    checkpoint = max((run / "checkpoints").glob("checkpoint-*"))
    assert (checkpoint / "optimizer.pt").is_file()
    for path in (run, checkpoint):
        made = dry_run(path, "me/x", tmp_path / f"dry-{path.name}")
        assert set(contents(made)) == ADAPTER | TOKENIZER


def test_the_card_says_how_to_load_it_from_the_hub(trained: Trained, tmp_path: Path) -> None:
    card = (dry_run(trained("peft=lora"), "me/mirror", tmp_path / "a") / "README.md").read_text()
    assert 'PeftModel.from_pretrained(base, "me/mirror")' in card
    assert "base_model" not in card.partition("\n# ")[0]  # the Hub has no pkg://


def test_a_merged_models_card_says_what_it_is_made_of(trained: Trained, tmp_path: Path) -> None:
    run = trained("peft=lora", "quant=nf4")
    merged = merge([run], tmp_path / "merged", dtype="bfloat16", into="dequantised")
    made = dry_run(merged, "me/merged", tmp_path / "dry")
    assert set(contents(made)) == MODEL | TOKENIZER | {"merge.json"}
    card = ModelCard((made / "README.md").read_text())
    assert card.data.library_name == "transformers"
    known = json.loads((made / "merge.json").read_text())
    assert "A whole model in bfloat16" in card.text
    assert known["adapters"][0]["sha256"][:12] in card.text
    assert f"`pkg://lora_exp/assets/tiny` at `{known['base']['revision']}`" in card.text
    assert "as nf4 held it, dequantised" in card.text
    assert 'AutoModelForCausalLM.from_pretrained("me/merged", dtype="auto")' in card.text
    assert "PeftModel" not in card.text
    assert "rows to train on" in card.text
    assert card.text.count("\n# ") == 1


def test_a_base_that_lies_on_this_machine_needs_a_name_for_others(
    trained: Trained, tmp_path: Path
) -> None:
    from lora_exp.files.paths import asset

    own = copied(asset("pkg://lora_exp/assets/tiny"), tmp_path / "own base")
    run = trained("peft=lora", "model=local", f"model.path='{own}'", "rate.model=10")
    merged = merge([run], tmp_path / "merged")
    whole = trained("peft=none", "model=local", f"model.path='{own}'", "rate.model=10")
    for path in (run, merged, whole):
        with pytest.raises(SavedError, match=r"a folder of this machine .*--base-id OWNER/NAME"):
            dry_run(path, "me/x", tmp_path / "dry")
        assert not (tmp_path / "dry").exists()
        made = dry_run(path, "me/x", tmp_path / "dry", base_id="them/tiny")
        assert not any(str(tmp_path).encode() in text for text in contents(made).values())
        assert ModelCard((made / "README.md").read_text()).data.base_model == "them/tiny"
        shutil.rmtree(made)
    made = dry_run(run, "me/x", tmp_path / "dry", base_id="them/tiny")
    config = json.loads((made / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "them/tiny"
    packaged = dry_run(trained("peft=lora"), "me/x", tmp_path / "packaged", base_id="them/tiny")
    card = (packaged / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("them/tiny")' in card
    assert "lora_exp.config" not in card


def test_an_adapter_that_names_no_base_is_given_one(trained: Trained, tmp_path: Path) -> None:
    adapter = copied(trained("peft=lora") / "adapter", tmp_path / "alone")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(SavedError, match="names no base; --base-id OWNER/NAME does"):
        dry_run(adapter, "me/x", tmp_path / "dry")
    made = dry_run(adapter, "me/x", tmp_path / "dry", base_id="them/tiny")
    config = json.loads((made / "adapter_config.json").read_text())
    assert config == json.loads(file.read_text()) | {"base_model_name_or_path": "them/tiny"}


@pytest.mark.parametrize(
    ("name", "text"), [("README.md", "password: hunter2!"), ("chat_template.jinja", TOKEN)]
)
def test_a_secret_in_a_text_is_refused(
    trained: Trained, tmp_path: Path, name: str, text: str
) -> None:
    run = copied(trained("peft=lora"), tmp_path / "run")
    with (run / "adapter" / name).open("a") as file:
        file.write(text)
    with pytest.raises(SavedError, match=f"{name} holds what looks like a secret"):
        dry_run(run, "me/x", tmp_path / "dry")
    assert not (tmp_path / "dry").exists()


def test_weights_that_are_missing_damaged_or_not_finite_are_refused(
    trained: Trained, tmp_path: Path
) -> None:
    run = copied(trained("peft=none"), tmp_path / "run")
    file = run / "model" / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(SavedError, match=r"is not finite; not sent"):
        dry_run(run, "me/x", tmp_path / "dry")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SavedError, match=r"model\.safetensors is damaged"):
        dry_run(run, "me/x", tmp_path / "dry")
    file.rename(run / "model" / "other.safetensors")
    with pytest.raises(SavedError, match="has no weights to send"):
        dry_run(run, "me/x", tmp_path / "dry")
    assert not (tmp_path / "dry").exists()


def test_a_lost_shard_is_named(trained: Trained, tmp_path: Path) -> None:
    merged = merge([trained("peft=lora")], tmp_path / "merged", max_shard_size="1MB")
    shards = sorted(merged.glob("model-*.safetensors"))
    assert len(shards) > 2
    made = dry_run(merged, "me/x", tmp_path / "dry")
    assert {shard.name for shard in shards} < set(contents(made))
    shards[1].unlink()
    with pytest.raises(SavedError, match=f"lacks {shards[1].name}, which model"):
        dry_run(merged, "me/x", tmp_path / "dry", force=True)
    assert (made / shards[1].name).is_file()  # what was there stays


def test_a_dry_run_writes_over_nothing_unless_told(trained: Trained, tmp_path: Path) -> None:
    run, folder = trained("peft=lora"), tmp_path / "dry"
    dry_run(run, "me/x", folder)
    with pytest.raises(SavedError, match="--force replaces it"):
        dry_run(run, "me/x", folder)
    dry_run(run, "me/y", folder, force=True)
    assert '"me/y"' in (folder / "README.md").read_text()
    with pytest.raises(SavedError, match="is what is read"):
        dry_run(folder, "me/x", folder, force=True)


def test_python_callers_get_the_same_error_without_a_token(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(HubError, match="--dry-run needs none"):
        push(trained("peft=lora"), "me/x")
