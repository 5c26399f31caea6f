"""A run's directory: `config.yaml`, `run.json`, `metrics.jsonl`. Written whole or not at all."""

from __future__ import annotations

import json
import logging
import platform
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_exp.config import fingerprint, plain
from lora_exp.disk import refusal
from lora_exp.errors import ConfigError, DivergedError, LoraExpError
from lora_exp.lock import Lock
from lora_exp.redaction import redact, redact_text
from lora_exp.resume import LONGER, changes

log = logging.getLogger("lora_exp")
FAILED = ("failed", "diverged")
ITSELF = ("resume", "retry_failed")
VERSIONED = ("lora-exp", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step: a reader, or a crash, sees the old text or the new."""
    staged = path.with_name(path.name + ".staged")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)


def standing(directory: Path, cfg: DictConfig) -> str | None:
    """Return the status of the same run in a directory, or None.

    Raises:
        ConfigError: the directory holds another run.
    """
    path = directory / "run.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = values["fingerprint"], str(values["status"]), values["name"]
    except (ValueError, KeyError) as error:
        text = f"{path} cannot be read ({error}); move {directory} away to run the job anew"
        raise ConfigError([("hydra.sweep.dir", text)]) from error
    if known[0] != fingerprint(cfg):
        text = f"{directory} holds another run ({known[2]}); take another directory"
        raise ConfigError([("hydra.sweep.dir", text)])
    return known[1]


def objective(directory: Path) -> float:
    """Return what a finished run is judged by."""
    values = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    return float(values["metrics"][values["objective"]])


def failure(directory: Path) -> str:
    """Return why a run failed."""
    return str(json.loads((directory / "run.json").read_text(encoding="utf-8"))["error"])


def mark(directory: Path, status: str, error: str) -> None:
    """Write how a run ended that could not do so itself; one that finished stays finished."""
    path = directory / "run.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if values and values["status"] != "finished":
        write_whole(path, json.dumps(values | {"status": status, "error": error}, indent=1) + "\n")


class Record:
    """What is known of a run so far, on disk after every change."""

    def __init__(self, directory: Path, cfg: DictConfig) -> None:
        """Begin a run's record, or take up that of the run that goes on.

        Raises:
            ConfigError: the directory holds another run, or not the one to resume, or is in use.
        """
        self.directory = directory
        path = directory / "run.json"
        goes_on = cfg.resume is not None and Path(cfg.resume).resolve() == directory.resolve()
        if cfg.resume is not None and not goes_on:
            raise ConfigError([("resume", f"{cfg.resume} goes on in place, not in {directory}")])
        self._check_free(path, goes_on)
        self.lock = Lock(directory, "resume" if goes_on else "hydra.run.dir")
        try:
            self._check_free(path, goes_on)  # another launch may have been first
            self.values: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
            self._begin(cfg)
        except BaseException:
            self.lock.release()
            raise

    def _check_free(self, path: Path, goes_on: bool) -> None:
        if path.is_file() and not goes_on:
            text = f"{path.parent} holds a run already; resume={path.parent}, or another directory"
            raise ConfigError([("hydra.run.dir", text)])

    def _begin(self, cfg: DictConfig) -> None:
        config = redact(plain(cfg))
        if not self.values:
            self.values = {
                "name": cfg.name,
                "tracking_id": secrets.token_hex(4),
                "choices": plain(cfg.choices),
                "metrics": {},
                "resumed": [],
            }
        else:
            saved = OmegaConf.to_container(OmegaConf.load(self.directory / "config.yaml"))
            told = changes(saved, config)  # type: ignore[arg-type]
            told = {key: pair for key, pair in told.items() if key not in ITSELF}
            if self.values["status"] == "finished" and not any(key in LONGER for key in told):
                text = f"{self.directory} is finished; a higher train.max_steps would go on"
                raise ConfigError([("resume", text)])
            self.values["resumed"].append({"status": self.values["status"], "changes": told})
            self._compare_versions()
        write_whole(self.directory / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
        self.values |= {"fingerprint": fingerprint(cfg), "versions": versions()}
        self.update(status="running", error=None)

    def _compare_versions(self) -> None:
        now, then = versions(), self.values["versions"]
        other = [
            f"{name} {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name]
        ]
        if other:
            log.warning("resume: other versions than the run began with: %s", ", ".join(other))

    def same(self, key: str, found: Any) -> None:
        """Hold what a run stands on against what it stood on before.

        Raises:
            ConfigError: it goes on, and something else is there now.
        """
        known = self.values.get(key, found)
        if known != found:
            told = [
                f"{name}: {now}, was {was}" for name, (was, now) in _pairs(known, found).items()
            ]
            text = f"the run was started with another {key}: {'; '.join(told)}"
            raise ConfigError([("resume", text)])

    def update(self, **values: Any) -> None:
        """Set fields and write the file; `metrics` are merged."""
        metrics = self.values["metrics"] | values.pop("metrics", {})
        self.values |= {**values, "metrics": metrics}
        write_whole(self.directory / "run.json", json.dumps(redact(self.values), indent=1) + "\n")

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append one line to metrics.jsonl."""
        with (self.directory / "metrics.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **metrics}) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the lines of metrics.jsonl after a step that training goes back to."""
        kept = [json.dumps(line) + "\n" for line in self._lines() if line["step"] <= step]
        write_whole(self.directory / "metrics.jsonl", "".join(kept))

    def _lines(self) -> Iterator[dict[str, Any]]:
        path = self.directory / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for line in text.splitlines():
            with suppress(ValueError):  # cut off while it was written
                yield json.loads(line)

    def losses(self) -> list[float]:
        """Return the training losses logged so far, the parts before a resume included."""
        return [line["train/loss"] for line in self._lines() if "train/loss" in line]

    def keep_samples(self, samples: list[dict[str, Any]]) -> None:
        """Write samples.jsonl: prompts, known answers, answers before and after."""
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
        write_whole(self.directory / "samples.jsonl", "".join(lines))

    def samples(self) -> list[dict[str, Any]]:
        """Read samples.jsonl."""
        path = self.directory / "samples.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines]

    def summary(self) -> dict[str, Any]:
        """Return the numbers that tracking shows for the whole run."""
        return {**self.values["metrics"], **self.values.get("counts", {})}

    @contextmanager
    def outcome(self) -> Iterator[None]:
        """Record how the run ended, whatever ended it."""
        try:
            yield
        except BaseException as error:
            status = "diverged" if isinstance(error, DivergedError) else "failed"
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else status
            text = (
                str(error)
                if isinstance(error, LoraExpError)
                else f"{type(error).__name__}: {error}"
            )
            try:
                self.update(status=status, error=redact_text(text))
            except OSError as full:
                log.error("%s: its status %s cannot be written: %s", self.directory, status, full)
            if not isinstance(error, LoraExpError) and (told := refusal(error, self.directory)):
                raise told from error
            raise
        else:
            self.update(status="finished")
        finally:
            self.lock.release()


def versions() -> dict[str, str]:
    """Return those of the packages that shape a result."""
    return {name: version(name) for name in VERSIONED} | {"python": platform.python_version()}


def _pairs(known: Any, found: Any) -> dict[str, Any]:
    both = isinstance(known, dict) and isinstance(found, dict)
    return changes(known, found) if both else {"it": (known, found)}
