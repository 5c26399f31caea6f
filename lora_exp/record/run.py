"""A run's directory: `config.yaml`, `run.json`, `metrics.jsonl`.

A file is written completely or not at all; only metrics.jsonl is appended to.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_exp.config.door import plain, renamed
from lora_exp.config.keep import goal_of
from lora_exp.config.resume import LIMITS, changes
from lora_exp.config.settled import SWITCHES, fingerprint
from lora_exp.errors import ConfigError, DivergedError, LoraExpError, Paused
from lora_exp.files.lock import Lock
from lora_exp.files.redaction import redact, redact_text
from lora_exp.files.strict import dumps
from lora_exp.files.whole import refusal, write_whole
from lora_exp.files.yaml_text import to_yaml
from lora_exp.record.conditions import condition_changes, conditions

log = logging.getLogger("lora_exp")
UNKNOWN = "an unknown commit"  # the hub did not answer
NOT_COMPARED = ("resume", "retry_failed", "report", "strict", "host")
FACTS = (
    "place", "fingerprint", "precision", "attention", "saved_as", "quantised_share", "versions",
    "base", "data", "adapters",
)  # fmt: skip


class Record:
    """A run's record, written to disk after every change."""

    def __init__(self, directory: Path, cfg: DictConfig, day: date | None = None) -> None:
        """Start a new record, or load that of the run to resume.

        Args:
            directory: the run's.
            cfg: the run's config.
            day: the date of a new run, which its chat template may write; None: today.

        Raises:
            ConfigError: the directory holds another run, is not that to resume, or is in use.
        """
        self.directory, self.ends_as = directory, "finished"  # or pruned
        path = directory / "run.json"
        resumes = cfg.resume is not None and Path(cfg.resume).resolve() == directory.resolve()
        if cfg.resume is not None and not resumes:
            raise ConfigError([("resume", f"{cfg.resume} goes on in place, not in {directory}")])
        self._check_free(path, resumes)
        self.begun = False
        self.lock = Lock(directory, "resume" if resumes else "hydra.run.dir")
        try:
            self._check_free(path, resumes)  # another launch may have been first
            self.values = _read(path)
            self._config, self._fingerprint = redact(plain(cfg)), fingerprint(cfg)
            if self.values:
                self.values.setdefault("date", date.today().isoformat())
                self._check_changes()
            else:
                self.values = {
                    "name": cfg.name,
                    # a run that a W&B agent started keeps the agent's id
                    "tracking_id": os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4),
                    "date": (day or date.today()).isoformat(),  # chat templates may contain it
                    "choices": plain(cfg.choices),
                    "metrics": {},
                    "resumed": [],
                    "rungs": [],  # where it is compared with other jobs
                }
                self.begin()
        except BaseException as error:
            if self.begun and path.is_file():
                self._fail(error)
            self.lock.release()
            raise

    def _check_free(self, path: Path, resumes: bool) -> None:
        if path.is_file() and not resumes:
            text = f"{path.parent} holds a run already; resume={path.parent}, or another directory"
            raise ConfigError([("hydra.run.dir", text)])

    def _check_changes(self) -> None:
        """Note the changes of a resumed run's config; a finished run needs a higher limit."""
        saved = OmegaConf.to_container(OmegaConf.load(self.directory / "config.yaml"))
        changed = changes(SWITCHES | renamed(saved), self._config)
        changed = {key: pair for key, pair in changed.items() if key not in NOT_COMPARED}
        if self.values.get("lockstep", {}).get("proven") is False and (
            self._config["lockstep"]["on_difference"] == "retrain"
        ):
            text = f"passes of {self.directory} differed from the run alone: start it anew, or"
            advice = "go on nevertheless with lockstep.on_difference=keep"
            raise ConfigError([("resume", f"{text} {advice}")])
        limit = LIMITS[0] if self._config["train"]["max_steps"] > 0 else LIMITS[1]
        if self.values["status"] == "finished" and limit not in changed:
            text = f"{self.directory} is finished; to go on, give a higher {limit}"
            raise ConfigError([("resume", text)])
        self._resume_entry = {"status": self.values["status"], "changes": changed}

    def check_unchanged(self, key: str, current: Any) -> None:
        """Check on resume that data, base or adapters are those of the run's start.

        Raises:
            ConfigError: one of them has changed.
        """
        recorded = self.values.get(key, current)
        are_mappings = isinstance(recorded, dict) and isinstance(current, dict)
        pairs = changes(recorded, current) if are_mappings else {key: [recorded, current]}
        texts = [
            f"{name}: {after}, was {before}"
            for name, (before, after) in pairs.items()
            if before != after and UNKNOWN not in f"{before} {after}"
        ]
        if texts:
            text = f"the run was started with another {key}: {'; '.join(texts)}"
            raise ConfigError([("resume", text)])

    def begin(self) -> None:
        """Record that the run starts or resumes; a run refused before this is left unchanged."""
        if self.begun:
            return
        self.begun = True
        current = conditions()
        if "versions" in self.values:
            self.values["resumed"].append(self._resume_entry | {"started": _now(), "ended": None})
            if changed := condition_changes(self.values, current):
                text = "resume: other conditions than at the run's start, so bits may differ: %s"
                log.warning(text, ", ".join(changed))
            if set(LIMITS) & self._resume_entry["changes"].keys():
                # rungs are shares of the training; written before the config that says its length
                self.update(rungs=[])
        write_whole(self.directory / "config.yaml", to_yaml(self._config))
        self.values.setdefault("started", _now())
        self.values |= {"fingerprint": self._fingerprint, **current}
        if self._config["host"]:
            self.values["host"] = platform.node()
        self.update(status="running", error=None, stopped=None, ended=None)

    def update(self, **values: Any) -> None:
        """Set fields and write the file; `metrics` are merged, and `proven: false` stays."""
        metrics = self.values["metrics"] | values.pop("metrics", {})
        unproven = self.values.get("lockstep", {}).get("proven") is False
        self.values |= {**values, "metrics": metrics}
        if unproven:
            self.values["lockstep"]["proven"] = False
        write_whole(self.directory / "run.json", dumps(redact(self.values), indent=1) + "\n")

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append one line to metrics.jsonl."""
        with (self.directory / "metrics.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(dumps({"step": step, **metrics}) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the lines of metrics.jsonl after the step that training resumes from."""
        if self.values["resumed"]:
            self.values["resumed"][-1]["step"] = step
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

    def write_samples(self, samples: list[dict[str, Any]]) -> None:
        """Write samples.jsonl: prompts, expected answers, answers before and after training."""
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
        write_whole(self.directory / "samples.jsonl", "".join(lines))

    def samples(self) -> list[dict[str, Any]]:
        """Read samples.jsonl."""
        path = self.directory / "samples.jsonl"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return [json.loads(line) for line in text.split("\n") if line]

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write a file of values beside run.json, which is read for every run that is listed."""
        write_whole(self.directory / name, dumps(values) + "\n")

    def facts(self) -> dict[str, Any]:
        """Return what trackers show of a run beside its config."""
        return {key: self.values[key] for key in FACTS if key in self.values}

    def summary(self) -> dict[str, Any]:
        """Return the numbers that trackers show for the whole run.

        Metrics, each with the best that was logged (`eval/loss_min`, `eval/reward_max`), counts,
        the objective and the last rung. Memory of a pack is named the pack's.
        """
        metrics, bests = dict(self.values["metrics"]), self._bests()
        if str(self.values.get("place")).startswith("lockstep") and "peak_bytes" in metrics:
            metrics["pack_peak_bytes"] = metrics.pop("peak_bytes")
        numbers = {**metrics, **bests, **self.values.get("counts", {})}
        if self.values.get("objective") in metrics:
            numbers["objective"] = metrics[self.values["objective"]]
        if rungs := self.values.get("rungs"):
            numbers["rung"] = rungs[-1]["rung"]
        return numbers | ({"steps": self.values["steps"]} if "steps" in self.values else {})

    def _bests(self) -> dict[str, float]:
        """Return the best value of each metric whose goal is known, by a name like `loss_min`."""
        words: dict[str | None, tuple[str, Callable[..., float]]] = {
            "minimize": ("min", min), "maximize": ("max", max),
        }  # fmt: skip
        logged: defaultdict[str, list[float]] = defaultdict(list)
        for line in self._lines():
            for name, value in line.items():
                if line["step"] and name != "step" and value is not None:
                    logged[name].append(value)
        goals = {name: goal_of(name) for name in logged}
        return {
            f"{name}_{words[goals[name]][0]}": words[goals[name]][1](values)
            for name, values in logged.items()
            if goals[name] in words
        }

    @contextmanager
    def outcome(self) -> Iterator[None]:
        """Record how the run ended, also after an error or a signal."""
        try:
            yield
        except BaseException as error:
            if not self.begun:  # refused: the record stays as it was
                raise
            self._fail(error)
            is_ours = isinstance(error, LoraExpError)
            if not is_ours and (refused := refusal(error, self.directory)):
                raise refused from error
            raise
        else:
            self._end(status=self.ends_as)
        finally:
            self.lock.release()

    def _end(self, **values: Any) -> None:
        """Set fields at the end of the run, or of this resume of it, and when that was."""
        ended = _now()
        if self.values["resumed"]:
            self.values["resumed"][-1]["ended"] = ended
        self.update(**values, ended=ended)

    def _fail(self, error: BaseException) -> None:
        """Record the error that ended the run."""
        status = status_after(error)
        is_ours = isinstance(error, LoraExpError)
        text = str(error) if is_ours else f"{type(error).__name__}: {error}"
        try:
            self._end(status=status, error=redact_text(text))
        except OSError as disk:
            log.error("%s: its status %s cannot be written: %s", self.directory, status, disk)


def status_after(error: BaseException) -> str:
    """Return the status of a run that an error has ended."""
    kinds = {DivergedError: "diverged", Paused: "paused", KeyboardInterrupt: "interrupted"}
    return next((status for kind, status in kinds.items() if isinstance(error, kind)), "failed")


def _now() -> str:
    """Return the time in UTC, as ISO 8601 writes it, in whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read(path: Path) -> dict[str, Any]:
    """Return a run's record; empty: there is none yet."""
    try:
        values = dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        metrics = {k: math.nan if v is None else v for k, v in values.get("metrics", {}).items()}
        return values | ({"metrics": metrics} if values else {})
    except (OSError, ValueError) as error:
        text = f"{path} cannot be read ({error}); without it the run cannot go on"
        raise ConfigError([("resume", text)]) from error
