"""The exception tree: each leaf is also the standard exception that fits it.

LoraExpError
├── ConfigError   (ValueError)       the config's faults, all at once
│   └── OccupiedError               a directory that holds another run
├── DataError     (ValueError)       a row, file or data set that cannot be used
├── AdapterError  (ValueError)       an adapter that does not fit the base
├── SavedError    (ValueError)       a saved folder: missing, damaged, or of another kind
├── HubError      (OSError)          the Hugging Face Hub refuses, or cannot be reached
├── RewardError   (ValueError)       a reward that fails or is not a number, by function and row
├── TargetError   (ValueError)       modules named for adaptation that the base does not have
├── ExtraError    (ImportError)      an extra of the package that is not installed
├── ServeError    (RuntimeError)     a server that cannot start here
├── CheckpointError (OSError)        a checkpoint that cannot be written, or used
└── DivergedError (ArithmeticError)  the loss or a gradient is not finite any more

Interrupted (KeyboardInterrupt)      not an error: the run was asked to stop, and can be resumed
└── Paused                           a job waits for others of its sweep; its launcher resumes it
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class LoraExpError(Exception):
    """Something the user can fix; the text describes what, where and how."""


class ConfigError(LoraExpError, ValueError):
    """All faults of a config, each as `(key, what is wrong and what would be right)`."""

    def __init__(self, faults: Iterable[tuple[str, str]]) -> None:
        self.faults = list(faults)
        lines = [f"{key}: {text}" for key, text in self.faults]
        listed = f"{len(lines)} faults" + "".join(f"\n  {line}" for line in lines)
        super().__init__(lines[0] if len(lines) == 1 else listed)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[tuple[str, str]]]]:
        return ConfigError, (self.faults,)  # a sweep's worker sends it to the launcher


class OccupiedError(ConfigError):
    """A job's directory holds another run."""

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[tuple[str, str]]]]:
        return OccupiedError, (self.faults,)


class DataError(LoraExpError, ValueError):
    """A row, file or data set that cannot be used, by file, line and field."""


class AdapterError(LoraExpError, ValueError):
    """An adapter that does not fit the base."""


class SavedError(LoraExpError, ValueError):
    """A saved folder that is missing, damaged, or not of the requested kind."""


class HubError(LoraExpError, OSError):
    """The Hugging Face Hub refuses what is sent, or cannot be reached."""


class RewardError(LoraExpError, ValueError):
    """A reward function fails, or returns something other than numbers."""


class TargetError(LoraExpError, ValueError):
    """Names of modules that the base does not have."""


class ExtraError(LoraExpError, ImportError):
    """A package that a command needs is missing; an extra of lora-exp installs it."""


class ServeError(LoraExpError, RuntimeError):
    """A server that cannot start here: its port is taken, or what it needs is not installed."""


class CheckpointError(LoraExpError, OSError):
    """A checkpoint or trained weights cannot be written, or cannot be used."""


class DivergedError(LoraExpError, ArithmeticError):
    """The loss or a gradient is not finite any more."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C asked a run to stop; its progress is saved as far as possible."""

    def __init__(self, *messages: str) -> None:
        super().__init__(*(messages or ("asked to stop",)))


class Paused(Interrupted):
    """A job has saved a checkpoint and waits for other jobs of its sweep; it will be resumed."""


def did_you_mean(wrong: str, known: Iterable[str], count: int = 3) -> str:
    """Return ` (did you mean a, b?)` with the nearest known names, or nothing."""
    near = get_close_matches(wrong, sorted(set(known)), n=count, cutoff=0.6)
    return f" (did you mean {', '.join(near)}?)" if near else ""
