"""A run's directory: `config.yaml`, `run.json`, `metrics.jsonl`.

A file is written completely or not at all; only metrics.jsonl is appended to.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lora_exp.config.door import plain, renamed
from lora_exp.config.resume import LONGER, changes
from lora_exp.config.settled import fingerprint
from lora_exp.errors import ConfigError, DivergedError, LoraExpError
from lora_exp.files.lock import Lock
from lora_exp.files.paths import is_path
from lora_exp.files.redaction import redact, redact_text
from lora_exp.files.strict import dumps
from lora_exp.files.whole import refusal, sha256, write_whole

if TYPE_CHECKING:
    from lora_exp.data.rows import Rows
    from lora_exp.model.loading import Base

log = logging.getLogger("lora_exp")
UNKNOWN = "an unknown commit"  # the hub did not answer
ITSELF = ("resume", "retry_failed", "strict")
VERSIONED = ("lora-exp", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


class Record:
    """A run's record, written to disk after every change."""

    def __init__(self, directory: Path, cfg: DictConfig) -> None:
        """Start a new record, or load that of the run to resume.

        Raises:
            ConfigError: the directory holds another run, or not the one to resume, or is in use.
        """
        self.directory = directory
        path = directory / "run.json"
        goes_on = cfg.resume is not None and Path(cfg.resume).resolve() == directory.resolve()
        if cfg.resume is not None and not goes_on:
            raise ConfigError([("resume", f"{cfg.resume} goes on in place, not in {directory}")])
        self._check_free(path, goes_on)
        self.begun = False
        self.lock = Lock(directory, "resume" if goes_on else "hydra.run.dir")
        try:
            self._check_free(path, goes_on)  # another launch may have been first
            self.values = _read(path)
            self._config, self._fingerprint = redact(plain(cfg)), fingerprint(cfg)
            if self.values:
                self.values.setdefault("date", date.today().isoformat())
                self._check_changes()
            else:
                self.values = {
                    "name": cfg.name,
                    # an agent's run is this run, everywhere
                    "tracking_id": os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4),
                    "date": date.today().isoformat(),  # what chat templates that write it get
                    "choices": plain(cfg.choices),
                    "metrics": {},
                    "resumed": [],
                }
                self.begin()
        except BaseException as error:
            if self.begun and path.is_file():
                self._fail(error)
            self.lock.release()
            raise

    def _check_free(self, path: Path, goes_on: bool) -> None:
        if path.is_file() and not goes_on:
            text = f"{path.parent} holds a run already; resume={path.parent}, or another directory"
            raise ConfigError([("hydra.run.dir", text)])

    def _check_changes(self) -> None:
        """Note what a run that goes on is told anew; a finished one needs more steps."""
        saved = OmegaConf.to_container(OmegaConf.load(self.directory / "config.yaml"))
        told = changes(renamed(saved), self._config)
        told = {key: pair for key, pair in told.items() if key not in ITSELF}
        if not self.values.get("lockstep", {}).get("proven", True) and (
            self._config["lockstep"]["on_difference"] == "retrain"
        ):
            text = f"passes of {self.directory} were not the run alone: start it anew, or go on"
            raise ConfigError([("resume", f"{text} all the same with lockstep.on_difference=keep")])
        limit = LONGER[0] if self._config["train"]["max_steps"] > 0 else LONGER[1]
        if self.values["status"] == "finished" and limit not in told:
            text = f"{self.directory} is finished; a higher {limit} would go on"
            raise ConfigError([("resume", text)])
        self._told = {"status": self.values["status"], "changes": told}

    def same(self, key: str, found: Any) -> None:
        """Check on resume that data, base or adapters are those that the run started with.

        Raises:
            ConfigError: one of them has changed.
        """
        known = self.values.get(key, found)
        both = isinstance(known, dict) and isinstance(found, dict)
        pairs = changes(known, found) if both else {key: [known, found]}
        told = [
            f"{name}: {now}, was {was}"
            for name, (was, now) in pairs.items()
            if was != now and UNKNOWN not in f"{was} {now}"
        ]
        if told:
            text = f"the run was started with another {key}: {'; '.join(told)}"
            raise ConfigError([("resume", text)])

    def begin(self) -> None:
        """Write that the run starts or resumes; a run refused before this is left unchanged."""
        if self.begun:
            return
        self.begun = True
        if "versions" in self.values:
            self.values["resumed"].append(self._told)
            self._compare_versions()
        write_whole(self.directory / "config.yaml", OmegaConf.to_yaml(self._config))
        self.values |= {"fingerprint": self._fingerprint, "versions": versions()}
        self.update(status="running", error=None)

    def _compare_versions(self) -> None:
        now, then = versions(), self.values["versions"]
        others = [name for name in now if then.get(name) != now[name]]
        if others:
            told = ", ".join(f"{name} {then.get(name)} -> {now[name]}" for name in others)
            log.warning("resume: other versions than the run began with: %s", told)

    def update(self, **values: Any) -> None:
        """Set fields and write the file; `metrics` are merged, and a doubt stays."""
        metrics = self.values["metrics"] | values.pop("metrics", {})
        doubtful = not self.values.get("lockstep", {}).get("proven", True)
        self.values |= {**values, "metrics": metrics}
        if doubtful:
            self.values["lockstep"]["proven"] = False
        write_whole(self.directory / "run.json", dumps(redact(self.values), indent=1) + "\n")

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append one line to metrics.jsonl."""
        with (self.directory / "metrics.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(dumps({"step": step, **metrics}) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the lines of metrics.jsonl after the step that training resumes from."""
        kept = [dumps(line) + "\n" for line in self._lines() if line["step"] <= step]
        write_whole(self.directory / "metrics.jsonl", "".join(kept))

    def _lines(self) -> Iterator[dict[str, Any]]:
        path = self.directory / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for line in text.split("\n"):
            with suppress(ValueError):  # cut off while it was written
                yield json.loads(line)

    def losses(self) -> list[float]:
        """Return the training losses logged so far, also those before a resume."""
        return [line["train/loss"] for line in self._lines() if line.get("train/loss") is not None]

    def keep_samples(self, samples: list[dict[str, Any]]) -> None:
        """Write samples.jsonl: prompts, expected answers, answers before and after training."""
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
        write_whole(self.directory / "samples.jsonl", "".join(lines))

    def samples(self) -> list[dict[str, Any]]:
        """Read samples.jsonl."""
        path = self.directory / "samples.jsonl"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return [json.loads(line) for line in text.split("\n") if line]

    def summary(self) -> dict[str, Any]:
        """Return the metrics and counts that the tracker shows for the whole run."""
        return {**self.values["metrics"], **self.values.get("counts", {})}

    @contextmanager
    def outcome(self) -> Iterator[None]:
        """Record how the run ended, also after an error or a signal."""
        try:
            yield
        except BaseException as error:
            if not self.begun:  # refused: the record is that of the last time
                raise
            self._fail(error)
            if not isinstance(error, LoraExpError) and (told := refusal(error, self.directory)):
                raise told from error
            raise
        else:
            self.update(status="finished")
        finally:
            self.lock.release()

    def _fail(self, error: BaseException) -> None:
        """Write what ended the run."""
        status = "diverged" if isinstance(error, DivergedError) else "failed"
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else status
        known = isinstance(error, LoraExpError)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        try:
            self.update(status=status, error=redact_text(text))
        except OSError as full:
            log.error("%s: its status %s cannot be written: %s", self.directory, status, full)


def stands_on(cfg: DictConfig, rows: Rows, base: Base) -> dict[str, Any]:
    """Return commits and hashes of data, base and adapters, which must not change on resume."""
    data = dict(rows.source)
    if rows.chat_template is not None:
        template = hashlib.sha256(rows.chat_template.encode()).hexdigest()
        data["chat_template"] = f"sha256:{template}"
    named = [cfg.adapter, *(cfg.algorithm.rewards if "rewards" in cfg.algorithm else ())]
    folders = [Path(n).expanduser() for n in named if isinstance(n, str) and is_path(n)]
    files = [path for folder in folders for path in folder.glob("adapter_model.*")]
    adapters = {str(path.parent): f"sha256:{sha256(path)}" for path in files}
    return {"data": data, "base": base.revision, "adapters": adapters}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect a result."""
    return {name: version(name) for name in VERSIONED} | {"python": platform.python_version()}


def _read(path: Path) -> dict[str, Any]:
    """Return a run's record, nothing where there is none yet."""
    try:
        values = dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        metrics = {k: math.nan if v is None else v for k, v in values.get("metrics", {}).items()}
        return values | ({"metrics": metrics} if values else {})
    except (OSError, ValueError) as error:
        text = f"{path} cannot be read ({error}); without it the run cannot go on"
        raise ConfigError([("resume", text)]) from error
