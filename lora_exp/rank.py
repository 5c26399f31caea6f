"""python -m lora_exp.rank FOLDER: one of a run's processes, started by parallel/launch.py."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from datetime import date
from pathlib import Path
from typing import Any

from hydra.core.utils import configure_log
from omegaconf import OmegaConf

from lora_exp.child import end_with_parent
from lora_exp.config.frozen import frozen
from lora_exp.errors import ConfigError, Interrupted, LoraExpError, RewardError
from lora_exp.files.redaction import redact_text
from lora_exp.files.whole import write_whole
from lora_exp.parallel.launch import JOB, LOST, MEETING, RESULT
from lora_exp.parallel.world import world
from lora_exp.training.interruption import EXIT_CODE, stop


def main() -> None:
    """Train as one of the processes of a run, and report how it ended."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    if job["nodes"] == 1:
        end_with_parent(job["launcher"])
    else:
        _take_slurms_numbers()
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    stop.silent, stop.agree = True, world.any
    stop.training += 1  # a signal takes effect where all processes agree on it
    try:
        _log(rank, job["logging"])
        with stop.listening():
            result, code = _trained(job, folder, rank, count), 0
    except Interrupted:
        result, code = {}, EXIT_CODE
    except (Exception, SystemExit) as error:  # a reward's sys.exit(0) is no success
        result, code = _report(error), 1
    write_whole(folder / RESULT.format(rank), json.dumps(result | {"code": code}))
    logging.shutdown()
    sys.stdout.flush()
    if rank and code == EXIT_CODE and job["nodes"] > 1:
        code = 0  # for srun, which ends the others where one has failed: the first may still upload
    os._exit(code)  # the others may have ended: nothing waits for them any more


def _take_slurms_numbers() -> None:
    """Take the process's numbers from Slurm, which has started it; only the first one prints."""
    os.environ |= {"RANK": os.environ["SLURM_PROCID"], "LOCAL_RANK": os.environ["SLURM_LOCALID"]}
    if os.environ["RANK"] != "0":
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)


def _trained(job: dict[str, Any], folder: Path, rank: int, count: int) -> dict[str, Any]:
    """Train, and return the fields of the result."""
    from lora_exp.experiment import run

    world.join(rank, count, folder / MEETING, int(os.environ["LOCAL_RANK"]), job["nodes"])
    day = date.fromisoformat(job["day"]) if job["day"] else None
    result = run(frozen(job["config"]), job["directory"], job["sweep"], day=day)
    world.wait()
    saved = str(result.saved) if result.saved else None
    return {"objective": result.objective, "metrics": result.metrics, "saved": saved}


def _log(rank: int, settings: Any) -> None:
    """Let the first process log as its launcher does, and the others not at all."""
    if rank:
        logging.disable(logging.CRITICAL)
    elif settings is not None:
        logged = OmegaConf.create(settings)
        configure_log(logged.job_logging, logged.verbose)


def _report(error: Exception | SystemExit) -> dict[str, Any]:
    """Return an error for the launcher, with its traceback if it is not ours, nor a consequence.

    Only the launcher logs it: the first process may not be the one that knows.
    """
    text, kind = redact_text(str(error)), type(error).__name__
    if isinstance(error, ConfigError):
        return {"kind": kind, "faults": error.faults}
    if isinstance(error, LoraExpError) and not isinstance(error, RewardError):
        return {"kind": kind, "text": text}
    if is_lost(error):
        return {"kind": LOST, "text": text}
    trace = redact_text("".join(traceback.format_exception(error)))
    # a reward is the user's code, so its traceback is needed
    known = {"kind": kind, "text": text} if isinstance(error, RewardError) else {}
    return {"text": f"{kind}: {text}"} | known | {"traceback": trace}


def is_lost(error: BaseException) -> bool:
    """Return whether an error says that another process of the run has ended."""
    from torch.distributed import DistError

    words = ("[gloo/", "/gloo/", "Connection closed by peer")  # of a RuntimeError without a class
    is_gloos = type(error) is RuntimeError and any(word in str(error) for word in words)
    return is_gloos or isinstance(error, DistError)


if __name__ == "__main__":
    main()
