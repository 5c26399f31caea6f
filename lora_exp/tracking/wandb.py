"""Send metrics, samples and the adapter to Weights & Biases."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, ClassVar, Literal
from urllib.error import HTTPError
from urllib.request import urlopen

from lora_exp.errors import ConfigError
from lora_exp.tracking.flat import COLUMNS
from lora_exp.tracking.tracker import RunInfo

log = logging.getLogger("lora_exp")
PROJECT, GROUP_LENGTH, TAG_LENGTH, TIMEOUT = "lora-exp", 128, 64, 10
STEP = "train/global_step"
HEADER_BYTES = 7  # of a file in which W&B has written nothing
MEMORY = 2**20  # for what a run has sent, in bytes; the rest is in a temporary file
EXIT_CODES = {"failed": 1, "diverged": 1, "interrupted": 255}  # 255: W&B shows `killed`
_REFUSED: list[bool] = []  # not empty: a server has refused a run of this process


class Wandb:
    """One W&B run; in mode `auto` online if there is a key and a network, else offline.

    Console output, argv, code, git state, host name and hardware are not sent. What was sent is
    kept: W&B's own process may be ended by a signal to all processes of a job, before it has
    written anything, and then the run is begun again.
    """

    label: ClassVar[str] = "W&B"
    live: ClassVar[int] = 0  # number of unfinished runs in this process
    losses: ClassVar[int] = 0  # of W&B's own process

    def __init__(
        self,
        project: str | None,
        entity: str | None,
        mode: Literal["auto", "online", "offline"],
        group: str | None,
        log_adapter: bool,
        tags: list[str | int] | None = None,
        name: str | None = None,
        system: bool = False,
        *,
        run: RunInfo,
    ) -> None:
        import wandb

        env = os.environ.get
        self.wandb, self.log_adapter = wandb, log_adapter
        self.directory, self.data_dir = run.directory, run.directory / "wandb"
        self.data_dir.mkdir(parents=True, exist_ok=True)
        all_tags = [str(tag).strip() for tag in (*(tags or ()), *env("WANDB_TAGS", "").split(","))]
        self.options: dict[str, Any] = {
            "project": project or env("WANDB_PROJECT") or PROJECT,
            "entity": entity,
            "dir": str(run.directory),
            "id": run.id,
            "resume": "allow",
            "name": name or env("WANDB_NAME") or run.name,
            "group": _shortened(group or env("WANDB_RUN_GROUP") or run.sweep, GROUP_LENGTH),
            "job_type": run.algorithm,
            "tags": list({_shortened(t, TAG_LENGTH): 0 for t in (*all_tags, *run.choices) if t}),
            "config": run.config,
            "reinit": "create_new",
        }
        self.settings = mode, system
        self.sent = SpooledTemporaryFile(MEMORY)  # noqa: SIM115  (closed by `finish`)
        self._begin()
        Wandb.live += 1
        if self.mode == "offline":
            self.place = f"offline; to send it: lora-exp sync {run.directory}"
        else:  # W&B warns if an offline run is asked for its URL
            self.place = "none" if self.mode == "disabled" else str(self.run.url)

    def _begin(self) -> None:
        mode, system = self.settings
        self.run, self.mode = _init_run(mode, dict(self.options), system)
        self.loss = Wandb.losses
        for pattern in ("train/*", "eval/*"):
            self.run.define_metric(pattern, step_metric=STEP)
        self.run.define_metric("before/*", hidden=True)  # one point, which is in the summary

    def _send(self, send: Callable[..., None], *values: Any) -> None:
        """Send something; if W&B's process is gone, start another and send all of it again."""
        pickle.dump((send.__name__, values), self.sent)
        try:
            send(*values)
        except ConnectionError as error:
            if self.loss == Wandb.losses:  # else another run of this process has noticed it
                log.warning("W&B's process has ended (%s); its runs are logged anew", error)
                Wandb.losses += 1
                with suppress(ConnectionError):
                    self.wandb.teardown()
            self._remove_empty_part()
            self._begin()
            self.sent.seek(0)
            with suppress(EOFError):
                while True:
                    name, values = pickle.load(self.sent)
                    getattr(self, name)(*values)

    def _remove_empty_part(self) -> None:
        part = Path(self.run.dir).parent
        files = [*part.glob("*.wandb")] if part.name.startswith("offline-run-") else []
        if files and all(file.stat().st_size <= HEADER_BYTES for file in files):
            shutil.rmtree(part)

    def describe(self, facts: dict[str, Any]) -> None:
        """Send what is known before training, as `run` of the config."""
        self._send(self._describe, facts)

    def _describe(self, facts: dict[str, Any]) -> None:
        self.run.config.update({"run": facts}, allow_val_change=True)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Send the metrics of a step."""
        self._send(self._log, metrics, step)

    def _log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def samples(self, samples: list[dict[str, Any]], step: int) -> None:
        """Send the answers before and after training as a table."""
        self._send(self._samples, samples, step)

    def _samples(self, samples: list[dict[str, Any]], step: int) -> None:
        table = self.wandb.Table(columns=list(COLUMNS))
        for sample in samples:
            table.add_data(*(sample.get(column) for column in COLUMNS))
        self.run.log({"samples": table}, step=step)

    def finish(self, summary: dict[str, Any], saved: Path | None, ended: str) -> None:
        """Send the summary and the adapter, and close the run; a pruned one gets a tag."""
        self._send(self._finish, summary, saved, ended)
        self.sent.close()
        Wandb.live -= 1
        written = self.data_dir.glob("offline-run-*/*.wandb")
        if self.mode == "offline" and not any(file.stat().st_size for file in written):
            log.error("W&B wrote nothing to %s (too few open files? ulimit -n)", self.data_dir)

    def _finish(self, summary: dict[str, Any], saved: Path | None, ended: str) -> None:
        if ended == "pruned":
            self.run.tags = (*(self.run.tags or ()), ended)
        self.run.summary.update(summary)
        # artifacts are staged in the run's directory, so that it can be synced from elsewhere
        with _environment("WANDB_DATA_DIR", str(self.data_dir)):
            sends = self.log_adapter and self.mode != "disabled"
            if saved is not None and saved.name == "adapter" and sends:
                artifact = self.wandb.Artifact(f"{saved.name}-{self.run.id}", type="model")
                for path in sorted(saved.iterdir()):  # add_dir would print
                    artifact.add_file(str(path))
                self.run.log_artifact(artifact)
            self.run.finish(exit_code=EXIT_CODES.get(ended, 0))


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def report_trial(variables: dict[str, str], objective: str, values: list[float]) -> None:
    """Log the mean objective of a W&B sweep's trial that trained several runs.

    Args:
        variables: environment variables that the agent had set for the trial.
        objective: the name of the sweep's metric.
        values: one for each finished run.
    """
    os.environ.update(variables)
    run, _ = _init_run("auto", {})
    run.log({objective: sum(values) / len(values), "runs": len(values)})
    run.finish()


def _init_run(mode: str, options: dict[str, Any], system: bool = False) -> tuple[Any, str]:
    """Start a run; if the server refuses it, it and all later ones are offline.

    Returns:
        The run and its mode.

    Raises:
        ConfigError: there is no key, or W&B does not accept its form.
    """
    import wandb

    options |= {"settings": _settings(system)}
    try:
        actual = _mode(mode)
        return wandb.init(mode=actual, **options), str(actual)
    except wandb.errors.CommError as error:
        log.warning("W&B cannot be reached (%s); runs are logged offline", error)
    except (wandb.errors.Error, ValueError) as error:
        text = f"W&B: {' '.join(str(error).split())}; or give tracking.mode=offline"
        raise ConfigError([("tracking", text)]) from error
    _REFUSED.append(True)
    if Wandb.live:  # their connection stays open, and it blocks the id of the refused run
        options |= {"id": f"{options['id']}-offline"}
    else:
        wandb.teardown()
    return wandb.init(mode="offline", **options), "offline"


def _settings(system: bool) -> Any:
    import wandb

    return wandb.Settings(
        console="off",
        silent=True,
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        label_disable=True,  # it would look for labels in the main script
        host="",
        program="",
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=not system,
        x_save_requirements=False,
    )


def _shortened(text: str | None, length: int) -> str | None:
    """Shorten a text to the length that W&B accepts, with a hash to keep it unique."""
    if text is None or len(text) <= length:
        return text
    return f"{text[: length - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _mode(mode: str) -> Any:  # a Literal of wandb
    """Return a mode in which wandb.init neither prompts nor waits minutes for a network."""
    import wandb

    if mode == "auto":
        env_mode = os.environ.get("WANDB_MODE", "").replace("dryrun", "offline")
        if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
            env_mode = "disabled"
        has_key = env_mode or wandb.login(prompt=False, verify=False)
        mode = env_mode or ("online" if has_key else "offline")
    if mode == "online" and (_REFUSED or not _reachable(wandb.setup().settings.base_url)):
        return "offline"
    return mode


@cache
def _reachable(url: str) -> bool:
    """Return whether a server answers, asked once a process, through the environment's proxies."""
    try:
        urlopen(url, timeout=TIMEOUT).close()
    except HTTPError:
        return True  # it answers
    except (OSError, ValueError) as error:
        if "CERTIFICATE" in str(error).upper():  # W&B has certificates of its own
            return True
        log.warning("W&B cannot be reached at %s (%s); runs are logged offline", url, error)
        return False
    return True
