"""The runner behind `python run.py`, `python -m lora_exp` and `lora-exp run`.

Torch is not imported before a valid config is about to run.
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.types import RunMode
from omegaconf import DictConfig, read_write

from lora_exp import libraries
from lora_exp.config.door import CONF
from lora_exp.config.mistakes import translate_error
from lora_exp.config.overrides import split_override
from lora_exp.config.processes import process_count
from lora_exp.config.resume import LIMITS
from lora_exp.config.validation import job_config
from lora_exp.errors import ConfigError, Interrupted, LoraExpError, RewardError
from lora_exp.files.paths import is_scratch
from lora_exp.files.redaction import redact_files, redact_text
from lora_exp.files.whole import refusal
from lora_exp.lockstep import devices
from lora_exp.parallel.launch import check_single_process
from lora_exp.record.contents import CHANGED, changed_files
from lora_exp.record.ranking import judgement, judgements
from lora_exp.record.standing import (
    FAILED,
    error_text,
    farthest_limits,
    objective_value,
    run_status,
    set_aside,
)
from lora_exp.record.sweep import COMMAND, MULTIRUN, SweepTable, refresh_row, saved_command
from lora_exp.training.interruption import EXIT_CODE, stop
from lora_exp.training.place import here
from lora_exp.training.processes import train_in_processes

log = logging.getLogger("lora_exp")
# overrides when a sweep is resumed
MAY_CHANGE = (
    "retry_failed", "report", "lockstep.", "early_stopping", "hydra.sweeper.trials",
    "hydra.launcher.", *LIMITS,
)  # fmt: skip
logging.raiseExceptions = False  # no tracebacks for a log that cannot be written


def job(cfg: DictConfig) -> float:
    """Run one composed config and return its objective."""
    hydra_config = HydraConfig.get()
    directory = Path(hydra_config.runtime.output_dir)
    redact_files(directory / str(hydra_config.output_subdir))
    redact_files(Path(hydra_config.sweep.dir), MULTIRUN)
    in_sweep = hydra_config.mode == RunMode.MULTIRUN
    sweep = "/".join(Path(hydra_config.sweep.dir).parts[-2:]) if in_sweep else None
    try:
        master = SweepTable.current.master if in_sweep and SweepTable.current else None
        settled = here.get().settled  # the launcher has the same
        if settled is None:
            settled = job_config(cfg, hydra_config, master)  # type: ignore[arg-type]
        status = run_status(directory, settled) if in_sweep else None
        if status == "finished" and (names := changed_files(directory, settled)):
            _set_aside_changed(directory, names)
            status = None
        if status == "finished":
            log.info("finished before, not run again")
            return objective_value(directory)
        if status in FAILED and not settled.retry_failed:
            text = f"{status} before and not run again; retry_failed=true does"
            raise LoraExpError(f"{text} ({error_text(directory)})")
        if status is not None:  # the same sweep again: an unfinished job is resumed
            with read_write(settled):
                settled.resume = str(directory)
                settled.train.update(farthest_limits(directory, settled))
        executor = hydra_config.launcher.get("executor")  # of our launcher
        is_there = executor == "slurm" and "SLURM_JOB_ID" in os.environ
        if not in_sweep and executor not in (None, "local") and not is_there:
            log.warning("hydra.launcher.executor=%s is for sweeps (-m): this trains here", executor)
        try:
            return _train(settled, directory, sweep)
        finally:
            if not in_sweep:
                refresh_row(directory)
    except KeyboardInterrupt:
        if not in_sweep and (directory / "run.json").is_file():
            print(f"resume={hydra_config.runtime.output_dir} goes on", file=sys.stderr)
        raise
    except SystemExit as error:  # it would end the sweep as if it had succeeded
        raise LoraExpError(f"the job called sys.exit({error.code})") from error
    except Exception as error:
        is_ours = isinstance(error, LoraExpError)
        # a reward is the user's code, so its traceback is needed
        brief = is_ours and not isinstance(error, RewardError)
        log.info("%s", redact_text(str(error) if brief else traceback.format_exc()))  # to run.log
        if is_ours and not in_sweep:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            raise SystemExit(1) from None  # Hydra would print its own line before ours
        traceback.clear_frames(error.__traceback__)  # they would hold the job's tensors
        raise


def _train(settled: DictConfig, directory: Path, sweep: str | None) -> float:
    """Train a settled config, and return its objective."""
    if process_count(settled) > 1:  # this process does not train, so needs no torch
        return float(train_in_processes(settled, directory, sweep)["objective"])
    libraries.load(freeze=True)
    from lora_exp.experiment import run

    return run(settled, directory, sweep, here.get()).objective


def _set_aside_changed(directory: Path, names: list[str]) -> None:
    """Set aside a finished run whose files have changed, with what Hydra needs to train it anew.

    Launchers other than ours have let Hydra write its files and open run.log there already.
    """
    hydra_config: Any = HydraConfig.get()
    aside, written = set_aside(directory, CHANGED), str(hydra_config.output_subdir)
    directory.mkdir()
    if (aside / written).is_dir():
        shutil.copytree(aside / written, directory / ".hydra")
    configure_log(hydra_config.job_logging, hydra_config.verbose)  # opens the new run.log
    text = "trained again, since %s changed; the earlier run is now %s"
    log.warning(text, ", ".join(names), aside)


def main() -> None:
    """Run the command line; errors that the user can fix are printed without a traceback."""
    devices.keep_one()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us, not to Hydra's printer
    raise_file_limit()
    try:
        check_single_process()
        sys.argv[1:] = _sweep_command(sys.argv[1:])
        _check_directory(sys.argv[1:])
        with stop.listening():
            try:
                hydra.main(str(CONF), "config", "1.3")(job)()
            finally:
                if SweepTable.current is not None:
                    SweepTable.current.on_launch_end()
    except Exception as error:
        translated = translate_error(error) or refusal(error, Path.cwd())
        if translated is None:
            raise
        print(_failure_text(translated), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        if SweepTable.current is not None and not is_scratch(SweepTable.current.folder):
            folder = SweepTable.current.folder
            saved = (folder / COMMAND).is_file()
            how = f"resume={folder}" if saved else f"the same command with hydra.sweep.dir={folder}"
            print(f"{how} goes on", file=sys.stderr)
        sys.exit(EXIT_CODE if isinstance(error, Interrupted) else 130)
    finally:
        if SweepTable.current is not None and SweepTable.current.rows:
            SweepTable.current.print_table()
            _write_report(SweepTable.current)
            _report_trial(SweepTable.current)


def _failure_text(error: LoraExpError) -> str:
    """Return an error in one line; errors of a sweep's jobs are below its table already."""
    rows = SweepTable.current.rows if SweepTable.current is not None else []
    failed = sum(row["error"] is not None for row in rows)
    if failed:
        return f"{failed} of {len(rows)} jobs failed; the table of jobs has the errors"
    return f"{type(error).__name__}: {error}"


def _write_report(table: SweepTable) -> None:
    """Write the sweep's report beside its summary, and print where it is."""
    from lora_exp.comparison.report import report_sweep

    if path := report_sweep(table.folder, table.report):
        from rich.text import Text

        from lora_exp.record.console import console

        console.print(Text(f"report: {path}"))


def _report_trial(table: SweepTable) -> None:
    """Log the mean objective to W&B, if this sweep is one trial of a W&B sweep."""
    judged = judgements(table.rows)[:1]  # the mean of several would mean nothing
    rows = (row for row in table.rows if [judgement(row)] == judged)
    values = [row["objective"] for row in rows if row["objective"] is not None]
    if "WANDB_SWEEP_ID" in table.trial and judged:
        from lora_exp.tracking.wandb import report_trial

        report_trial(table.trial, table.rows[0]["judged_by"], values)


def raise_file_limit() -> None:
    """Raise the limit of open files: at a low limit W&B loses files without an error."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))


def _sweep_command(arguments: list[str]) -> list[str]:
    """Return the command that a sweep was launched with, if `resume` names a sweep."""
    sweep = _last_value("resume", arguments)
    if sweep is None or not (Path(sweep) / COMMAND).is_file():
        return arguments
    rest = [a for a in arguments if not a.startswith("resume=") and a not in ("-m", "--multirun")]
    if refused := [a for a in rest if not a.startswith(MAY_CHANGE)]:
        text = f"a sweep is resumed as it was launched; only {', '.join(MAY_CHANGE)} may change"
        raise ConfigError([(a.partition("=")[0], text) for a in refused])
    launched, changed = saved_command(Path(sweep)), {split_override(a)[0] for a in rest}
    for word in launched:
        key, value = split_override(word)
        if key in changed & set(LIMITS) and "," in value:
            text = f"the sweep has jobs with several ({value}); resume one alone"
            raise ConfigError([(key, text)])
    # another option of a group replaces that option's values, too
    keys = {word: split_override(word)[0] for word in launched}
    kept = [w for w, key in keys.items() if not {key, key.partition(".")[0]} & changed]
    return [*kept, *rest]


def _check_directory(arguments: list[str]) -> None:
    """Refuse the directory of another run before Hydra writes into it.

    Raises:
        ConfigError: the directory holds a run.
    """
    directory = _last_value("hydra.run.dir", arguments)
    if directory is None or _last_value("resume", arguments) is not None:
        return
    if (Path(directory) / "run.json").is_file():
        text = f"{directory} holds a run already; resume={directory}, or another directory"
        raise ConfigError([("hydra.run.dir", text)])


def _last_value(key: str, arguments: list[str]) -> str | None:
    """Return the last value of a key in a command line."""
    values = [a.partition("=")[2].strip("'\"") for a in arguments if a.startswith(f"{key}=")]
    return values[-1] if values else None


if __name__ == "__main__":
    # processes of other launchers import `job`, which they cannot from a script
    from lora_exp.__main__ import main as importable

    importable()
