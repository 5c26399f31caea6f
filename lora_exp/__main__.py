"""The command line: `python run.py`, `python -m lora_exp` and `lora-exp` are this.

Torch is imported when a valid config is about to run, never before.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, read_write

from lora_exp.config.door import CONF
from lora_exp.config.mistakes import mistake
from lora_exp.config.overrides import parted
from lora_exp.config.resume import LONGER
from lora_exp.config.validation import settled
from lora_exp.errors import ConfigError, Interrupted, LoraExpError, RewardError
from lora_exp.files.redaction import redact_files, redact_text
from lora_exp.files.whole import refusal
from lora_exp.record.contents import CHANGED, changed
from lora_exp.record.standing import FAILED, failure, farthest, objective, set_aside, standing
from lora_exp.record.sweep import COMMAND, SweepTable, command, refresh
from lora_exp.training.interruption import EXIT_CODE, stop
from lora_exp.training.place import here

log = logging.getLogger("lora_exp")
ANEW = ("retry_failed", "lockstep.", *LONGER)  # what a sweep that goes on may be told
logging.raiseExceptions = False  # a log that cannot be written is no reason to print tracebacks


def job(cfg: DictConfig) -> float:
    """Run one composed config and return its objective."""
    about = HydraConfig.get()
    directory = Path(about.runtime.output_dir)
    redact_files(directory / str(about.output_subdir))
    redact_files(Path(about.sweep.dir))  # multirun.yaml
    in_sweep = about.mode == RunMode.MULTIRUN
    sweep = "/".join(Path(about.sweep.dir).parts[-2:]) if in_sweep else None
    try:
        master = SweepTable.current.master if in_sweep and SweepTable.current else None
        ready = settled(cfg, about, master)  # type: ignore[arg-type]
        status = standing(directory, ready) if in_sweep else None
        if status == "finished" and (names := changed(directory, ready)):
            aside = set_aside(directory, CHANGED)
            log.warning("trained again, since %s changed; %s keeps what it was", names, aside)
            status = None
        if status == "finished":
            log.info("finished before, not run again")
            return objective(directory)
        if status in FAILED and not ready.retry_failed:
            text = f"{status} before and not run again; retry_failed=true does"
            raise LoraExpError(f"{text} ({failure(directory)})")
        if status is not None:  # the same sweep again: what was begun goes on
            with read_write(ready):
                ready.resume = str(directory)
                ready.train.update(farthest(directory, ready))
        from lora_exp.experiment import run

        try:
            return run(ready, directory, sweep, here.get()).objective
        finally:
            if not in_sweep:
                refresh(directory)
    except KeyboardInterrupt:
        if not in_sweep and (directory / "run.json").is_file():
            print(f"resume={about.runtime.output_dir} goes on", file=sys.stderr)
        raise
    except SystemExit as error:  # it would end the sweep, and as if all were well
        raise LoraExpError(f"the job called sys.exit({error.code})") from error
    except Exception as error:
        known = isinstance(error, LoraExpError)
        told = known and not isinstance(error, RewardError)  # the user's own code: where it failed
        log.info("%s", redact_text(str(error) if told else traceback.format_exc()))  # to run.log
        if known and not in_sweep:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            raise SystemExit(1) from None  # Hydra would print its own line before ours
        traceback.clear_frames(error.__traceback__)  # they would hold the job's tensors
        raise


def main() -> None:
    """Run the command line; errors that the user can mend are told without a traceback."""
    if "LOCAL_RANK" not in os.environ:  # a run takes one GPU; trainers refuse to see several
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us, not to Hydra's printer
    _raise_file_limit()
    try:
        _check_alone()
        sys.argv[1:] = _of_the_sweep(sys.argv[1:])
        _check_free(sys.argv[1:])
        with stop.listening():
            hydra.main(str(CONF), "config", "1.3")(job)()
    except Exception as error:
        told = mistake(error) or refusal(error, Path.cwd())
        if told is None:
            raise
        print(f"{type(told).__name__}: {told}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        if SweepTable.current is not None and SweepTable.current.folder is not None:
            folder = SweepTable.current.folder
            kept = (folder / COMMAND).is_file()
            how = f"resume={folder}" if kept else f"the same command with hydra.sweep.dir={folder}"
            print(f"{how} goes on", file=sys.stderr)
        sys.exit(EXIT_CODE if isinstance(error, Interrupted) else 130)
    finally:
        if SweepTable.current is not None:
            SweepTable.current.gather()
            if SweepTable.current.rows:
                SweepTable.current.show()
                _report_trial(SweepTable.current)


def _report_trial(table: SweepTable) -> None:
    """Give a W&B sweep whose trial is itself a sweep the mean of its runs."""
    values = [row["objective"] for row in table.rows if row["objective"] is not None]
    if "WANDB_SWEEP_ID" in table.trial and values:
        from lora_exp.tracking.wandb import report_trial

        report_trial(table.trial, table.rows[0]["judged_by"], values)


def _check_alone() -> None:
    """Refuse to be one of several processes, each of which would train and write a whole run.

    Raises:
        ConfigError: torchrun, accelerate launch or the like has started several.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1":
        text = f"{count}: a run trains in one process, on one device; start it without torchrun"
        raise ConfigError([("WORLD_SIZE", f"{text} or accelerate launch (or unset WORLD_SIZE)")])


def _raise_file_limit() -> None:
    """Allow as many open files as this process may: W&B loses files at a low limit, silently."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _of_the_sweep(arguments: list[str]) -> list[str]:
    """Return the command that a sweep was launched with, where `resume` names a sweep."""
    named = _given("resume", arguments)
    if named is None or not (Path(named) / COMMAND).is_file():
        return arguments
    rest = [a for a in arguments if not a.startswith("resume=") and a not in ("-m", "--multirun")]
    if other := [a for a in rest if not a.startswith(ANEW)]:
        text = f"a sweep goes on as it was launched; only {', '.join(ANEW)} may be given anew"
        raise ConfigError([(a.partition("=")[0], text) for a in other])
    launched, anew = command(Path(named)), {parted(a)[0] for a in rest}
    for word in launched:
        key, value = parted(word)
        if key in anew & set(LONGER) and "," in value:
            raise ConfigError([(key, f"the sweep has jobs of several ({value}); resume one alone")])
    return [*(word for word in launched if parted(word)[0] not in anew), *rest]


def _check_free(arguments: list[str]) -> None:
    """Refuse the directory of another run before Hydra writes into it.

    Raises:
        ConfigError: a run lies there.
    """
    named = _given("hydra.run.dir", arguments)
    if named is None or _given("resume", arguments) is not None:
        return
    if (Path(named) / "run.json").is_file():
        text = f"{named} holds a run already; resume={named}, or another directory"
        raise ConfigError([("hydra.run.dir", text)])


def _given(key: str, arguments: list[str]) -> str | None:
    """Return the value that a command line gives a key last."""
    said = [a.partition("=")[2].strip("'\"") for a in arguments if a.startswith(f"{key}=")]
    return said[-1] if said else None


if __name__ == "__main__":
    from lora_exp.__main__ import main as importable  # other launchers' processes import the job

    importable()
