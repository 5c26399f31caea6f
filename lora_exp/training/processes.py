"""A run that trains in several processes, seen from the one that starts them. Needs no torch."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lora_exp.errors import LoraExpError
from lora_exp.parallel.launch import started
from lora_exp.parallel.nodes import processes_of
from lora_exp.record.standing import how_ended, write_status
from lora_exp.training.interruption import stop


def train_in_processes(
    cfg: DictConfig, directory: Path, sweep: str | None = None, day: date | None = None
) -> dict[str, Any]:
    """Train a run in the processes that its config asks for; arguments as of `experiment.run`.

    Returns:
        The fields of its result.

    Raises:
        LoraExpError: what one of them has raised, or that it was killed: the others end, too.
        Interrupted: they were asked to stop; `resume` continues the run.
    """
    with started(cfg, directory, sweep, day, processes_of) as processes:
        stop.forward = processes.ask_to_stop
        try:
            processes.wait()
        except (KeyboardInterrupt, LoraExpError) as error:
            processes.kill()
            if processes.first_was_lost and how_ended(directory)[0] in ("running", "failed"):
                status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                write_status(directory, status, str(error))
            raise
        finally:
            stop.forward = None
        result = processes.result(0)
    saved, code = result.pop("saved"), result.pop("code")
    assert code == 0, code
    return result | {"directory": directory, "saved": Path(saved) if saved else None}
