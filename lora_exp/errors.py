"""The exception tree: each leaf is also the standard exception that a caller would expect.

LoraExpError
├── ConfigError   (ValueError)       the config's faults, all at once
│   └── OccupiedError               a directory that holds another run
├── DataError     (ValueError)       a row, file or data set that cannot be used
├── AdapterError  (ValueError)       an adapter that cannot stand where it is put
├── SavedError    (ValueError)       what was saved: missing, damaged, or not what was asked for
├── HubError      (OSError)          the Hugging Face Hub that refuses, or cannot be reached
├── RewardError   (ValueError)       a reward that fails or is no number, by function and row
├── TargetError   (ValueError)       modules named for adaptation that the base does not have
├── ExtraError    (ImportError)      an extra of the package that is not installed
├── ServeError    (RuntimeError)     a server that cannot start here
├── CheckpointError (OSError)        a checkpoint that cannot be written, or used
└── DivergedError (ArithmeticError)  the loss or a gradient stopped being finite

Interrupted (KeyboardInterrupt)      no error: the run was asked to stop, and can go on
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class LoraExpError(Exception):
    """Something the user can mend; its text says what, where and how."""


class ConfigError(LoraExpError, ValueError):
    """Every fault of a config, each a `(key, what is wrong and what would be right)`."""

    def __init__(self, faults: Iterable[tuple[str, str]]) -> None:
        self.faults = list(faults)
        told = [f"{key}: {text}" for key, text in self.faults]
        several = f"{len(told)} faults" + "".join(f"\n  {line}" for line in told)
        super().__init__(told[0] if len(told) == 1 else several)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[tuple[str, str]]]]:
        return ConfigError, (self.faults,)  # a sweep's worker sends it to the launcher


class OccupiedError(ConfigError):
    """A job's directory holds another run."""

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[tuple[str, str]]]]:
        return OccupiedError, (self.faults,)


class DataError(LoraExpError, ValueError):
    """A row, file or data set that cannot be used, by file, line and field."""


class AdapterError(LoraExpError, ValueError):
    """An adapter that cannot stand on the base it is put on."""


class SavedError(LoraExpError, ValueError):
    """A folder that holds nothing of the kind that was asked for, or only parts of it."""


class HubError(LoraExpError, OSError):
    """The Hugging Face Hub refuses what is sent, or cannot be reached."""


class RewardError(LoraExpError, ValueError):
    """A reward function that fails, or returns what is no reward."""


class TargetError(LoraExpError, ValueError):
    """Names of modules that the base does not have."""


class ExtraError(LoraExpError, ImportError):
    """What a command needs and a plain installation does not bring."""


class ServeError(LoraExpError, RuntimeError):
    """A server that cannot start here: its port is taken, or what it needs is not installed."""


class CheckpointError(LoraExpError, OSError):
    """A checkpoint, or what was trained, that cannot be written, or not be used."""


class DivergedError(LoraExpError, ArithmeticError):
    """The loss or a gradient stopped being finite."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C asked a run to stop; what it has done is saved as far as it can be."""

    def __init__(self, *words: str) -> None:
        super().__init__(*(words or ("asked to stop",)))


def did_you_mean(wrong: str, known: Iterable[str], count: int = 3) -> str:
    """Return ` (did you mean a, b?)` with the nearest known names, or nothing."""
    near = get_close_matches(wrong, sorted(set(known)), n=count, cutoff=0.6)
    return f" (did you mean {', '.join(near)}?)" if near else ""
