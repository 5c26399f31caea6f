"""Upload of an adapter or a model to the Hugging Face Hub, and a dry run of it."""

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

from lora_exp.after.output import check_free, output_folder
from lora_exp.after.saved import MERGE_RECORD, Saved, find, read_json
from lora_exp.after.saving import TOKENIZER, save
from lora_exp.errors import HubError, LoraExpError, SavedError
from lora_exp.files.redaction import redact_text
from lora_exp.record.card import HERE
from lora_exp.record.console import console, tracked

INDEX = "model.safetensors.index.json"
WEIGHTS = ("adapter_model.safetensors", "model*.safetensors")
CONFIGS = ("adapter_config.json", "config.json", "generation_config.json", MERGE_RECORD, INDEX)
UPLOADED = (*WEIGHTS, *CONFIGS, *TOKENIZER, "README.md")
TEXTS = (".json", ".md", ".jinja", ".txt")
# not searched for secrets: `password:` may be a token
VOCABULARY = re.compile(r"tokenizer\.json|vocab\..*|merges\.txt")
CURES = {
    401: "; the token is not accepted: set another with `hf auth login`",
    403: "; the token may not write there: set one that may with `hf auth login`",
}


def dry_run(
    path: str | Path,
    repo_id: str,
    out: str | Path | None = None,
    base_id: str | None = None,
    force: bool = False,
) -> Path:
    """Write the files that `push` would upload to a folder, without token and network.

    Args:
        path: as for `push`.
        repo_id: as for `push`.
        out: the folder to make; None: push-dry-run/NAME.
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
    with parcel(path, repo_id, base_id) as files, output_folder(folder, force, sources) as staging:
        for name, file in files.items():
            shutil.copy(file, staging / name)
    return folder


def push(
    path: str | Path,
    repo_id: str,
    public: bool = False,
    revision: str = "main",
    message: str | None = None,
    base_id: str | None = None,
) -> dict[str, Any]:
    """Upload an adapter or a whole model with its card to the Hub, in one commit.

    Args:
        path: the adapter, run, checkpoint or model.
        repo_id: `OWNER/NAME`; made if it does not exist.
        public: whether everybody may see it.
        revision: the branch; made if it does not exist.
        message: of the commit.
        base_id: the base's hub id, which replaces a folder of this machine in the files.

    Returns:
        `url`, `commit`, `private`, and `files`, their sizes by name.

    Raises:
        SavedError: there is nothing to upload, or it must not be uploaded; see `parcel`.
        HubError: there is no token, or the Hub refuses.
    """
    check_id(repo_id)
    if get_token() is None:
        text = "no token for the Hub: run `hf auth login`, or set HF_TOKEN"
        raise HubError(f"{text}; --dry-run needs no token")
    with parcel(path, repo_id, base_id) as files, _hub_errors(repo_id):
        sizes = {name: file.stat().st_size for name, file in files.items()}
        message = message or f"{repo_id.partition('/')[2]}, with lora-exp"
        return _upload(files, repo_id, public, revision, message) | {"files": sizes}


def check_id(repo_id: str) -> None:
    """Refuse a name that the Hub would not take.

    Raises:
        SavedError: the name is not valid.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise SavedError(str(error)) from error
    if "/" not in repo_id:
        raise SavedError(f"{repo_id!r} has no owner; give OWNER/NAME")


@contextmanager
def parcel(path: str | Path, repo_id: str, base_id: str | None = None) -> Iterator[dict[str, Path]]:
    """Yield the files to upload, by name: those of known patterns, and no others.

    Args:
        path: the adapter, run, checkpoint or model.
        repo_id: where they go; the card shows how to load them from there.
        base_id: as for `push`.

    Raises:
        SavedError: weights are missing or not finite, a text holds a secret, or the base is a
            folder of this machine.
    """
    saved = find(path)
    with TemporaryDirectory() as temporary:
        is_adapter = saved.adapter is not None
        folder = save(path, Path(temporary) / "adapter") if is_adapter else saved.folder
        matches = (file for pattern in UPLOADED for file in folder.glob(pattern) if file.is_file())
        files = {file.name: file for file in matches}
        for name, text in _rewritten(saved, files, repo_id, base_id).items():
            files[name] = Path(temporary) / name
            files[name].write_text(text, encoding="utf-8")
        _check_weights(files, saved.folder)
        _check_secrets(files, saved.folder)
        yield dict(sorted(files.items()))


def _rewritten(
    saved: Saved, files: Mapping[str, Path], repo_id: str, base_id: str | None
) -> dict[str, str]:
    """Return the files that name the base or this folder, with names that work for others."""
    bases = _bases(saved)
    if base_id is not None:
        check_id(base_id)
    elif bases and _is_folder(bases[0]):
        text = f"the base of {saved.folder} is a folder of this machine ({bases[0]})"
        raise SavedError(f"{text}; give its hub id: --base-id OWNER/NAME")
    elif not bases and saved.adapter is not None:
        raise SavedError(f"{saved.folder} names no base; give --base-id OWNER/NAME")
    hub_base = base_id or next(iter(bases), None)
    texts = {}
    if "adapter_config.json" in files:
        config = {"base_model_name_or_path": hub_base}
        texts["adapter_config.json"] = _with(files["adapter_config.json"], config)
    if MERGE_RECORD in files:
        record = read_json(files[MERGE_RECORD])
        base = record["base"] | {"path": hub_base}
        texts[MERGE_RECORD] = _with(files[MERGE_RECORD], {"base": base})
    if "README.md" in files:
        card = files["README.md"].read_text(encoding="utf-8").replace(HERE, repo_id)
        for name in bases:
            pattern = rf"(?<![\w/.-]){re.escape(name)}(?![\w/-])"
            card = re.sub(pattern, lambda _: str(hub_base), card)
        if base_id is not None:  # the base may have been a file of a package
            card = card.replace(f'asset("{hub_base}")', f'"{hub_base}"')
            card = card.replace("from lora_exp.config import asset\n", "")
        texts["README.md"] = _linked(card, hub_base)
    return texts


def _bases(saved: Saved) -> list[str]:
    """Return the names of the base in the files; first the one of the run."""
    if saved.adapter is not None:
        names = [saved.base, saved.adapter["base_model_name_or_path"]]
    elif (saved.folder / MERGE_RECORD).is_file():
        names = [read_json(saved.folder / MERGE_RECORD)["base"]["path"]]
    else:
        names = [(saved.settings.get("model") or {}).get("path")]
    return [str(name) for name in names if name]


def _with(file: Path, values: dict[str, Any]) -> str:
    return json.dumps(read_json(file) | values, indent=2) + "\n"


def _is_folder(base: str) -> bool:
    """Return whether a base is a folder of this machine, not a hub id or a file of a package."""
    if base.startswith("pkg://"):
        return False
    try:
        validate_repo_id(base)
    except HFValidationError:
        return True
    return Path(base).exists()


def _linked(text: str, base: str | None) -> str:
    """Set the base in a card's metadata if the Hub can link it; else remove it."""
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
        raise SavedError(f"{folder} has no weights to upload ({' or '.join(WEIGHTS)})")
    if INDEX in files:
        listed = json.loads(files[INDEX].read_text(encoding="utf-8"))["weight_map"].values()
        if missing := sorted(set(listed) - set(names)):
            raise SavedError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names")
    for name in tracked(names, "weights"):
        try:
            with safe_open(str(files[name]), "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (a file, not a dict)
                    if not tensors.get_tensor(key).float().isfinite().all():
                        raise SavedError(f"{folder}: {key} in {name} is not finite; not uploaded")
        except (SafetensorError, OSError) as error:
            raise SavedError(f"{folder / name} is damaged: {error}") from error


def _check_secrets(files: Mapping[str, Path], folder: Path) -> None:
    for name, file in files.items():
        if file.suffix not in TEXTS or VOCABULARY.fullmatch(name):
            continue
        text = file.read_text(encoding="utf-8")
        if redact_text(text) != text:
            raise SavedError(f"{folder / name} holds what looks like a secret; remove it")


def _upload(
    files: Mapping[str, Path], repo_id: str, public: bool, revision: str, message: str
) -> dict[str, Any]:
    if not console.is_terminal:
        disable_progress_bars()
    api = HfApi()
    api.create_repo(repo_id, private=not public, exist_ok=True)
    private = bool(api.repo_info(repo_id).private)
    if not private and not public:
        raise HubError(f"{repo_id} exists and is public; give --public to upload to it")
    if revision != constants.DEFAULT_REVISION:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    adds = [CommitOperationAdd(name, file) for name, file in files.items()]
    commit = api.create_commit(repo_id, adds, commit_message=message, revision=revision)
    return {"url": f"{api.endpoint}/{repo_id}", "commit": commit.oid, "private": private}


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turn errors of the Hub or the network into a HubError of one line."""
    try:
        yield
    except LoraExpError:  # also a ValueError
        raise
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(f"{repo_id} was not uploaded: {_message(error)}") from error


def _message(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is None:
        reason = f"{constants.ENDPOINT} cannot be reached: " if isinstance(error, HTTPError) else ""
        return reason + " ".join(str(error).split())
    status = response.status_code
    reason = getattr(error, "server_message", None) or response.reason_phrase
    retry = "; try again later" if status >= 500 or status == 429 else ""
    return f"the Hub answers {status} ({' '.join(reason.split())}){CURES.get(status, retry)}"
