"""Writes the report of a comparison, and of a sweep as soon as it has ended.

`python -m lora_exp.comparison.report FOLDER NAME` writes that of a sweep.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from lora_exp.comparison.value import Comparison, comparison
from lora_exp.files.whole import write_whole
from lora_exp.runs.gather import read_runs

log = logging.getLogger(__name__)


def write_report(compared: Comparison, path: Path) -> None:
    """Write the report of a comparison as one file of HTML.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(path, compared.to_html(title_of(compared)))


def title_of(compared: Comparison) -> str:
    """Return the names of the folders that the runs are in, of the first two."""
    folders = dict.fromkeys((run.sweep or run.directory).absolute() for run in compared.runs)
    names = ["/".join(folder.parts[-2:]) for folder in folders]
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def report_sweep(folder: Path, name: str | None) -> Path | None:
    """Write the report of a sweep into its folder and return its path; None: there is none.

    No sweep fails since its report cannot be written: a warning says why.
    """
    if name is None:
        return None
    try:
        write_report(comparison(read_runs([folder])), folder / name)
    except Exception as error:  # whatever it is, the runs are complete
        log.warning("no report of %s: %s: %s", folder, type(error).__name__, error)
        return None
    return folder / name


if __name__ == "__main__":
    report_sweep(Path(sys.argv[1]), sys.argv[2])
