"""What was trained, sent to the Hugging Face Hub, or written as it would be sent."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open
from yaml import YAMLError

from lora_exp.after.output import check_free, written
from lora_exp.after.saved import RECORD, Saved, find, read_json
from lora_exp.after.saving import TOKENIZER, save
from lora_exp.errors import HubError, LoraExpError, SavedError
from lora_exp.files.redaction import redact_text
from lora_exp.record.card import HERE
from lora_exp.record.console import console, tracked

INDEX = "model.safetensors.index.json"
WEIGHTS = ("adapter_model.safetensors", "model*.safetensors")
CONFIGS = ("adapter_config.json", "config.json", "generation_config.json", RECORD, INDEX)
SENT = (*WEIGHTS, *CONFIGS, *TOKENIZER, "README.md")
TEXTS = (".json", ".md", ".jinja", ".txt")
VOCABULARY = re.compile(r"tokenizer\.json|vocab\..*|merges\.txt")  # `password:` may be a token
CURES = {
    401: "; the token is not accepted: `hf auth login` takes another",
    403: "; the token may not write there: `hf auth login` takes one that may",
}


def dry_run(
    path: str | Path,
    repo_id: str,
    out: str | Path | None = None,
    base_id: str | None = None,
    force: bool = False,
) -> Path:
    """Write the folder that `push` would send, without token and network.

    Args:
        path: as for `push`.
        repo_id: as for `push`.
        out: the folder to make; None: push-dry-run/ and the repository's name.
        base_id: as for `push`.
        force: replace `out` if it is there.

    Returns:
        The folder.

    Raises:
        SavedError: as `push`, or `out` is there already.
    """
    check_id(repo_id)
    folder = Path(out or Path("push-dry-run", repo_id.partition("/")[2])).expanduser()
    sources = [path, find(path).folder]
    check_free(folder, force, sources)
    with parcel(path, repo_id, base_id) as files, written(folder, force, sources) as made:
        for name, file in files.items():
            shutil.copy(file, made / name)
    return folder


def push(
    path: str | Path,
    repo_id: str,
    public: bool = False,
    revision: str = "main",
    message: str | None = None,
    base_id: str | None = None,
) -> dict[str, Any]:
    """Send an adapter or a whole model to the Hub, with its card, in one commit.

    Args:
        path: the adapter, run, checkpoint or model.
        repo_id: `OWNER/NAME`; made if it is not there.
        public: whether everybody may see it.
        revision: the branch; made if it is not there.
        message: of the commit.
        base_id: what the files shall call the base, where they name a folder of this machine.

    Returns:
        `url`, `commit`, `private`, and `files`, their sizes by name.

    Raises:
        SavedError: nothing is there that may be sent.
        HubError: no token is here, or the Hub refuses.
    """
    check_id(repo_id)
    if get_token() is None:
        text = "no token of the Hub is here: `hf auth login`, or HF_TOKEN in the environment"
        raise HubError(f"{text}; --dry-run needs none")
    with parcel(path, repo_id, base_id) as files, _answering(repo_id):
        sizes = {name: file.stat().st_size for name, file in files.items()}
        told = message or f"{repo_id.partition('/')[2]}, with lora-exp"
        return _send(files, repo_id, public, revision, told) | {"files": sizes}


def check_id(repo_id: str) -> None:
    """Refuse a name that the Hub would not take.

    Raises:
        SavedError: it says why.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise SavedError(str(error)) from error
    if "/" not in repo_id:
        raise SavedError(f"{repo_id!r} names no owner; give OWNER/NAME")


@contextmanager
def parcel(path: str | Path, repo_id: str, base_id: str | None = None) -> Iterator[dict[str, Path]]:
    """Give the files that are sent, by their names there: those of a list, and no others.

    Args:
        path: the adapter, run, checkpoint or model.
        repo_id: where they go; the card tells how to load them from there.
        base_id: what they shall call their base.

    Raises:
        SavedError: weights are missing or not finite, a text holds a secret, or the base is named
            by a folder of this machine.
    """
    saved = find(path)
    with TemporaryDirectory() as room:
        portable = saved.adapter is not None
        folder = save(path, Path(room) / "adapter") if portable else saved.folder
        found = (file for pattern in SENT for file in folder.glob(pattern) if file.is_file())
        files = {file.name: file for file in found}
        for name, text in _rewritten(saved, files, repo_id, base_id).items():
            files[name] = Path(room) / name
            files[name].write_text(text, encoding="utf-8")
        _check_weights(files, saved.folder)
        _check_secrets(files, saved.folder)
        yield dict(sorted(files.items()))


def _rewritten(
    saved: Saved, files: Mapping[str, Path], repo_id: str, base_id: str | None
) -> dict[str, str]:
    """Return the texts that name the base or this folder, as others shall read them."""
    bases = _bases(saved)
    if base_id is not None:
        check_id(base_id)
    elif bases and _is_folder(bases[0]):
        text = f"{saved.folder} names its base by a folder of this machine ({bases[0]})"
        raise SavedError(f"{text}; --base-id OWNER/NAME says where others find it")
    elif not bases and saved.adapter is not None:
        raise SavedError(f"{saved.folder} names no base; --base-id OWNER/NAME does")
    known = base_id or next(iter(bases), None)
    texts = {}
    if "adapter_config.json" in files:
        named = {"base_model_name_or_path": known}
        texts["adapter_config.json"] = _with(files["adapter_config.json"], named)
    if RECORD in files:
        merge = read_json(files[RECORD])
        texts[RECORD] = _with(files[RECORD], {"base": merge["base"] | {"path": known}})
    if "README.md" in files:
        card = files["README.md"].read_text(encoding="utf-8").replace(HERE, repo_id)
        for base in bases:
            pattern = rf"(?<![\w/.-]){re.escape(base)}(?![\w/-])"
            card = re.sub(pattern, lambda _: str(known), card)
        if base_id is not None:  # it lay in a package
            card = card.replace(f'asset("{known}")', f'"{known}"')
            card = card.replace("from lora_exp.config import asset\n", "")
        texts["README.md"] = _linked(card, known)
    return texts


def _bases(saved: Saved) -> list[str]:
    """Return what the files call the base; first what the run called it."""
    if saved.adapter is not None:
        names = [saved.base, saved.adapter["base_model_name_or_path"]]
    elif (saved.folder / RECORD).is_file():
        names = [read_json(saved.folder / RECORD)["base"]["path"]]
    else:
        names = [(saved.settings.get("model") or {}).get("path")]
    return [str(name) for name in names if name]


def _with(file: Path, values: dict[str, Any]) -> str:
    return json.dumps(read_json(file) | values, indent=2) + "\n"


def _is_folder(base: str) -> bool:
    """Tell a folder of this machine from what others have too: a hub id, or a package's file."""
    if base.startswith("pkg://"):
        return False
    try:
        validate_repo_id(base)
    except HFValidationError:
        return True
    return Path(base).exists()


def _linked(text: str, base: str | None) -> str:
    """Name the base in a card's metadata, where the Hub can link it, and nowhere else."""
    try:
        card = ModelCard(text)
    except (ValueError, YAMLError) as error:
        raise SavedError(f"README.md has no readable metadata: {error}") from error
    linked = base is not None and not base.startswith("pkg://")
    card.data.base_model = base if linked else None  # type: ignore[attr-defined]
    return str(card)


def _check_weights(files: Mapping[str, Path], folder: Path) -> None:
    names = [name for name in files if name.endswith(".safetensors")]
    if not names:
        raise SavedError(f"{folder} has no weights to send ({' or '.join(WEIGHTS)})")
    if INDEX in files:
        listed = json.loads(files[INDEX].read_text(encoding="utf-8"))["weight_map"].values()
        if lost := sorted(set(listed) - set(names)):
            raise SavedError(f"{folder} lacks {', '.join(lost)}, which {INDEX} names")
    for name in tracked(names, "weights"):
        try:
            with safe_open(str(files[name]), "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (a file, not a dict)
                    if not tensors.get_tensor(key).float().isfinite().all():
                        raise SavedError(f"{folder}: {key} in {name} is not finite; not sent")
        except (SafetensorError, OSError) as error:
            raise SavedError(f"{folder / name} is damaged: {error}") from error


def _check_secrets(files: Mapping[str, Path], folder: Path) -> None:
    for name, file in files.items():
        if file.suffix not in TEXTS or VOCABULARY.fullmatch(name):
            continue
        text = file.read_text(encoding="utf-8")
        if redact_text(text) != text:
            raise SavedError(f"{folder / name} holds what looks like a secret; take it out")


def _send(
    files: Mapping[str, Path], repo_id: str, public: bool, revision: str, message: str
) -> dict[str, Any]:
    if not console.is_terminal:
        disable_progress_bars()
    api = HfApi()
    api.create_repo(repo_id, private=not public, exist_ok=True)
    private = bool(api.repo_info(repo_id).private)
    if not private and not public:
        raise HubError(f"{repo_id} is there and public; --public sends to it all the same")
    if revision != constants.DEFAULT_REVISION:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    adds = [CommitOperationAdd(name, file) for name, file in files.items()]
    commit = api.create_commit(repo_id, adds, commit_message=message, revision=revision)
    return {"url": f"{api.endpoint}/{repo_id}", "commit": commit.oid, "private": private}


@contextmanager
def _answering(repo_id: str) -> Iterator[None]:
    """Say in a line what the Hub refuses, or that it cannot be reached."""
    try:
        yield
    except LoraExpError:  # also a ValueError
        raise
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(f"{repo_id} was not sent: {_told(error)}") from error


def _told(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is None:
        what = f"{constants.ENDPOINT} cannot be reached: " if isinstance(error, HTTPError) else ""
        return what + " ".join(str(error).split())
    status = response.status_code
    said = getattr(error, "server_message", None) or response.reason_phrase
    later = "; try again later" if status >= 500 or status == 429 else ""
    return f"the Hub answers {status} ({' '.join(said.split())}){CURES.get(status, later)}"
