"""Which jobs of a sweep train together, and why others do not.

Needs no torch: the plan is printed before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lora_exp.config.door import plain, sections
from lora_exp.config.frozen import frozen
from lora_exp.config.initialization import rewrites_base
from lora_exp.config.processes import process_count
from lora_exp.errors import ConfigError, LoraExpError
from lora_exp.files.redaction import redact_text
from lora_exp.record.contents import changed_files
from lora_exp.record.standing import FAILED, is_unproven, run_status

PROCESS = "sets what a process has only one of"
# arguments of trainers that change more than their own job, or the job's own modules
APART = {
    "neftune_noise_alpha": "NEFTune's noise is drawn in the base's embedding",
    "full_determinism": f"full_determinism {PROCESS}",
    "tf32": f"tf32 {PROCESS}",
    "accelerator_config": f"accelerator_config {PROCESS}",
    "log_level": f"log_level {PROCESS}",
    "torch_compile": "torch_compile makes kernels of its own",
    "torch_compile_backend": "torch_compile makes kernels of its own",
    "torch_compile_mode": "torch_compile makes kernels of its own",
    "use_liger_kernel": "Liger's kernels replace those of the base",
    "liger_kernel_config": "Liger's kernels replace those of the base",
    "cast_lm_head_to_fp32": "cast_lm_head_to_fp32 casts the base's head",
    "use_vllm": f"use_vllm {PROCESS}",
    "activation_checkpointing": "activation_checkpointing wraps the base's layers",
    "activation_checkpointing_kwargs": "activation_checkpointing wraps the base's layers",
    "gradient_checkpointing_kwargs": "gradient_checkpointing_kwargs are the base's layers' own",
    "auto_find_batch_size": "auto_find_batch_size begins again with another batch",
    "debug": "debug puts hooks on the base's modules",
    "optim_target_modules": "optim_target_modules steps inside the backward",
}


LABEL = 60  # characters


class Job:
    """One cell of a sweep; its configs are made when they are first asked for."""

    def __init__(
        self,
        number: int,
        config: DictConfig | Callable[[], DictConfig],
        settled: DictConfig | dict[str, Any] | None,
        directory: Path,
        overrides: tuple[str, ...] = (),
        error: LoraExpError | None = None,
        changes_process: bool = False,
        sweep_dir: str | None = None,
    ) -> None:
        """Create it.

        Args:
            number: in the sweep.
            config: as Hydra composed it, `hydra` included, or what composes it.
            settled: the run's config or its values; None: not a run of ours, or one that will be
                refused.
            directory: the run's.
            overrides: of the command line.
            error: why it will be refused, if it will.
            changes_process: whether Hydra gives it a directory or an environment of its own.
            sweep_dir: its `hydra.sweep.dir`, resolved; None: the parent of its directory.
        """
        self.number, self.directory, self.overrides = number, directory, overrides
        self.error, self.changes_process = error, changes_process
        self.sweep_dir = str(directory.parent) if sweep_dir is None else sweep_dir
        self._config, self._settled = config, settled

    @cached_property
    def config(self) -> DictConfig:
        """The config as Hydra composed it, `hydra` included."""
        return self._config if isinstance(self._config, DictConfig) else self._config()

    def forget_config(self) -> None:
        """Free the memory of a composed config; it is composed anew if it is asked for again."""
        if not isinstance(self._config, DictConfig):
            vars(self).pop("config", None)

    @cached_property
    def settled(self) -> DictConfig | None:
        """The run's config; None: not a run of ours, or one that will be refused."""
        return frozen(self._settled) if isinstance(self._settled, dict) else self._settled

    @cached_property
    def values(self) -> Any:
        """The values of the run's config as sections, or None; a plan needs no more."""
        is_config = isinstance(self._settled, DictConfig)
        return sections(plain(self._settled) if is_config else self._settled)  # type: ignore[arg-type]

    @property
    def status(self) -> str | None:
        """The status of the run in the directory; None: there is none.

        Raises:
            ConfigError: it is another run, or its record cannot be read.
        """
        has_run = self._settled is not None and (self.directory / "run.json").is_file()
        return run_status(self.directory, self.settled) if has_run else None  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        """Return what a worker gets: the configs themselves."""
        made = {"_config": self.config, "_settled": self.settled}
        state = {key: value for key, value in vars(self).items() if key != "values"}
        return state | made | {"config": self.config, "settled": self.settled}


@dataclass(frozen=True)
class Plan:
    """How each job will run."""

    without_training: tuple[tuple[Job, str], ...]  # with the reason
    packs: tuple[tuple[Job, ...], ...]
    alone: tuple[tuple[Job, str], ...]  # with the reason

    @property
    def training(self) -> list[int]:
        """The numbers of the jobs that train."""
        jobs = [*(job for pack in self.packs for job in pack), *(job for job, _ in self.alone)]
        return sorted(job.number for job in jobs)


def plan(jobs: Iterable[Job], stopped: Container[int] = ()) -> Plan:
    """Group jobs with the same base into packs; a job that would change its base runs alone.

    Args:
        jobs: of a sweep.
        stopped: numbers of those that an earlier launch has stopped, and that stay stopped.
    """
    without_training: list[tuple[Job, str]] = []
    packs: dict[str, list[Job]] = {}
    alone: list[tuple[Job, str]] = []
    for job in jobs:
        status = None
        try:
            status = job.status
        except ConfigError as error:
            job.error = job.error or error
        cfg = job.values
        if job.error or cfg is None:
            without_training.append((job, "refused, not run"))
        elif is_unproven(job.directory) and cfg.lockstep.on_difference == "retrain":
            alone.append((job, "not proven equal before, trained again"))
        elif status == "finished" and not changed_files(job.directory, job.settled):  # type: ignore[arg-type]
            without_training.append((job, "finished before, not run again"))
        elif job.number in stopped:
            without_training.append((job, "stopped early before, not run again"))
        elif status in FAILED and not cfg.retry_failed:
            text = f"{status} before, not run again; retry_failed=true does"
            without_training.append((job, text))
        elif why := solitary(job):
            alone.append((job, why))
        else:
            packs.setdefault(_base_key(cfg), []).append(job)
    for key, members in list(packs.items()):
        if len(members) == 1:
            alone.append((packs.pop(key)[0], "no other job to train with it"))
    alone.sort(key=lambda pair: pair[0].number)
    return Plan(tuple(without_training), tuple(map(tuple, packs.values())), tuple(alone))


def solitary(job: Job) -> str | None:
    """Return why a job that trains needs a base to itself; None if it can share one."""
    cfg = job.values
    peft = cfg.peft
    if (count := process_count(cfg)) > 1:
        return f"parallel={cfg.choices.parallel} trains it in {count} processes of its own"
    if peft is None:
        return "full fine-tuning changes the base"
    if peft._target_ != "peft.LoraConfig":
        return f"{cfg.choices.peft} is not LoRA"
    if start := rewrites_base(peft):
        return f"{start} starts from weights of its own"
    if cfg.model.get("add_tokens"):
        return "model.add_tokens trains new rows of the embedding"
    obstacles = {
        "use_dora": "DoRA needs the norm of the weights that it changes",
        "modules_to_save": "modules_to_save trains modules of the base",
        "layer_replication": "layer_replication changes the base",
        "target_parameters": "target_parameters adapts what is no layer",
        "trainable_token_indices": "trainable_token_indices trains the embedding",
    }
    for key, why in obstacles.items():
        if peft.get(key):
            return why
    if peft.get("bias", "none") != "none":
        return "bias trains the base's own biases"
    for key, why in APART.items():
        if cfg.train.get(key) or cfg.algorithm.args.get(key):
            return why
    if not cfg.deterministic:
        return "deterministic=false lets equal runs differ, so none can be proven equal"
    if cfg.model.random_weights:
        return "random_weights makes a base of its own"
    if cfg.lockstep.max_jobs == 1:
        return "lockstep.max_jobs=1"
    if job.changes_process:
        return "hydra.job.chdir and env_set change what a process has only one of"
    return None


def _base_key(values: dict[str, Any]) -> str:
    """Return a hash of what jobs of a pack have in common: base, head, settings of lockstep."""
    task_type = values["algorithm"]["task_type"]
    shaping = [values[key] for key in ("model", "quant", "lockstep", "batch_invariant")]
    return hashlib.sha256(json.dumps([*shaping, task_type], sort_keys=True).encode()).hexdigest()


def labels(jobs: Iterable[Job]) -> dict[int, str]:
    """Return each job's label: the overrides that not all jobs have."""
    jobs = list(jobs)
    common = set.intersection(*(set(job.overrides) for job in jobs)) if jobs else set()
    distinguishing = {job.number: [o for o in job.overrides if o not in common] for job in jobs}
    return {n: _short(redact_text(" ".join(parts))) for n, parts in distinguishing.items()}


def _short(label: str) -> str:
    """Leave out the middle of what is wider than a column."""
    return label if len(label) <= LABEL else f"{label[: LABEL // 2]}…{label[-LABEL // 2 + 1 :]}"


def show(planned: Plan, remarks: Iterable[tuple[list[int], str]] = ()) -> None:
    """Print the plan: job numbers and how they run, then remarks about some of them."""
    from rich.text import Text

    from lora_exp.record.console import console

    lines = list(_by_reason(planned.without_training).items())
    for pack in planned.packs:
        first = pack[0].values
        where = f"{first.model.path}, {first.choices.quant}".removesuffix(", none")
        lines.append((f"in lockstep ({first.lockstep.mode}) on {where}", list(pack)))
    lines += [(f"alone: {why}", jobs) for why, jobs in _by_reason(planned.alone).items()]
    console.print(Text("     jobs", style="dim"))
    numbered = [([job.number for job in jobs], text) for text, jobs in lines]
    for numbers, text in (*numbered, *remarks):
        console.print(Text.assemble((f"{ranges(numbers):>9}  ", "bold"), text))
    if planned.packs or planned.alone:  # else the sweep's table follows at once, with the errors
        refused = ((job, str(job.error)) for job, _ in planned.without_training if job.error)
        for text, jobs in _by_reason(refused).items():
            which = ranges([job.number for job in jobs])
            console.print(Text(f"job{'s' * (len(jobs) > 1)} {which}: {text}"))


def _by_reason(pairs: Iterable[tuple[Job, str]]) -> dict[str, list[Job]]:
    reasons: dict[str, list[Job]] = {}
    for job, why in pairs:
        reasons.setdefault(why, []).append(job)
    return reasons


def ranges(numbers: list[int]) -> str:
    """Write 0, 1, 2, 5 as 0-2, 5."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
