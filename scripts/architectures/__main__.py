"""Try our commands on tiny models of many kinds, and write the table of docs/models.md.

    python scripts/architectures [--kinds a,b] [--checks x,y] [--work DIR] [--write]

Each cell is a fork of one warm process, since importing torch takes longer than most cells. Results
are kept in the folder; a cell that is there is not tried again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

from scripts.architectures.checks import NAMES, Checks, write_rows  # noqa: E402
from scripts.architectures.models import KINDS, make  # noqa: E402

SECONDS = 300  # that a cell may take
BEGIN, END = "<!-- scripts/architectures begins -->", "<!-- scripts/architectures ends -->"
Cell = dict[str, str]  # `word` for the table; `why` for its notes


def warm() -> None:
    """Import what the cells need, once."""
    import trl

    import lora_exp

    for module in pkgutil.walk_packages(lora_exp.__path__, "lora_exp."):
        importlib.import_module(module.name)
    importlib.import_module("tests.lockstep.runs")
    for name in ("SFTTrainer", "DPOTrainer", "GRPOTrainer", "RewardTrainer"):
        getattr(trl, name)  # imported when it is first used


def tried(work: Path, kind: str, check: str) -> Cell:
    """Return the result of a check, tried in a fork."""
    result, log = work / "cell.json", work / "cell.log"
    result.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            _answer(work, kind, check, result, log)
        finally:
            os._exit(0)
    deadline = time.monotonic() + SECONDS
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            return {"word": "**hangs**", "why": f"it takes more than {SECONDS} s"}
        time.sleep(0.05)
    if not result.is_file():
        return {"word": "**dies**", "why": f"the process died; {log} has its last words"}
    cell: Cell = json.loads(result.read_text())
    return cell


def _answer(work: Path, kind: str, check: str, result: Path, log: Path) -> None:
    """Try a check in this process, and write its result."""
    from lora_exp.errors import LoraExpError

    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    checks = Checks(work, kind)
    cell: Cell
    try:
        make(kind, checks.model)
        cell = {"word": getattr(checks, check)(), "why": ""}
    except LoraExpError as error:
        cell = {"word": "refused", "why": " ".join(str(error).split())}
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        cell = {"word": "**fails**", "why": f"{type(error).__name__}: {error}"[:300]}
    for path, name in ((checks.model, "<model>"), (checks.runs, "<runs>"), (work, "<work>")):
        cell["why"] = cell["why"].replace(str(path), name)
    result.write_text(json.dumps(cell))


def table(results: dict[str, dict[str, Cell]]) -> str:
    """Return the table, and a note for each kind of refusal or failure."""
    notes: dict[str, str] = {}
    lines = ["| kind | " + " | ".join(NAMES) + " |", "|---" * (len(NAMES) + 1) + "|"]
    for kind in KINDS:
        cells = results.get(kind, {})
        words = [_word(cells[name], notes) if name in cells else "" for name in NAMES]
        if any(words):
            lines.append(f"| {kind} | " + " | ".join(words) + " |")
    return "\n".join([*lines, "", *(f"{mark}. {why}" for why, mark in notes.items()), ""])


def _word(cell: Cell, notes: dict[str, str]) -> str:
    if not cell["why"]:
        return cell["word"]
    mark = notes.setdefault(cell["why"].replace("|", "/"), str(len(notes) + 1))
    return f"{cell['word']} ({mark})"


def write(text: str) -> None:
    """Put a table between the two marks of docs/models.md."""
    page = ROOT / "docs" / "models.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Try the cells that are asked for, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kinds", default=";".join(KINDS), help="names of models.py, with ;")
    parser.add_argument("--checks", default=",".join(NAMES), help="names of checks.py, with commas")
    parser.add_argument("--work", type=Path, help="a folder to keep; default: a temporary one")
    parser.add_argument("--again", action="store_true", help="try again what is there")
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    options = parser.parse_args()
    work = (options.work or Path(tempfile.mkdtemp(prefix="architectures-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("LORA_EXP_CACHE", str(work / "cache"))
    write_rows(work)
    file = work / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    warm()
    for kind in options.kinds.split(";"):
        cells = results.setdefault(kind, {})
        for check in options.checks.split(","):
            if options.again or check not in cells:
                started = time.monotonic()
                cells[check] = cell = tried(work, kind, check)
                seconds = time.monotonic() - started
                file.write_text(json.dumps(results, indent=1))
                line = f"{kind:20} {check:8} {cell['word']:10} {seconds:5.1f} s  {cell['why']}"
                print(line[:300], flush=True)
    write(table(results)) if options.write else print(table(results))


if __name__ == "__main__":
    main()
