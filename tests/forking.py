"""The process that imports what commands need and forks for each; tests/warm.py starts it.

It only imports, so it has no threads (but jemalloc's, which are made to be forked) and no locks.
Where there is a GPU, which forked processes cannot share, commands start Python anew.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

IMPORTED = [] if Path("/dev/nvidiactl").exists() else [  # no `__main__`: those are run
    "lora_exp.experiment", "lora_exp.lockstep.seat", "lora_exp.after.merging", "lora_exp.cli",
    "trl.trainer.grpo_trainer", "trl.trainer.sft_trainer",
    "transformers.models.llama.modeling_llama",
]  # fmt: skip


def serve(requests: socket.socket) -> list[str]:
    """Fork for each request; returns in the forked process, with the arguments that it runs."""
    while True:
        message, streams, *_ = socket.recv_fds(requests, 2**20, 4)
        if not message:
            sys.exit()
        if os.fork() == 0:
            requests.close()
            return begin(streams, *json.loads(message))
        for stream in streams:
            os.close(stream)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def begin(
    streams: list[int], arguments: list[str], folder: str, env: dict[str, str], new_session: bool
) -> list[str]:
    """Fork once more: the parent waits for the exit code, which only a parent gets."""
    *standard, report = streams
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(report, f"{code}\n".encode())
        os._exit(0)
    for number, stream in enumerate(standard):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if new_session:
        os.setsid()
    os.write(report, f"{os.getpid()}\n".encode())
    os.closerange(3, max(streams) + 1)
    if not IMPORTED:
        os.execv(sys.executable, [sys.executable, *arguments])
    return arguments


def run(arguments: list[str]) -> None:
    """Do what `python ARGUMENTS` does."""
    first, *rest = arguments
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(rest[0], vars(main))
    elif first == "-m":
        sys.argv, sys.path[0] = rest, str(Path.cwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def main() -> None:
    """Import, then serve; each forked process comes back here and ends as a command does."""
    code: object = 1
    forking = os.getpid()

    def end() -> None:
        if os.getpid() != forking:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code if isinstance(code, int) else int(code is not None))

    for name in IMPORTED:
        importlib.import_module(name)
    # a command ends after its own exit handlers: the imports' would delete what others need,
    # and taking all modules apart takes 0.5 s
    atexit.register(end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # else collections in the forked processes would copy these objects' memory
    try:
        run(serve(socket.socket(fileno=os.dup(0))))
        code = 0
    except SystemExit as error:
        code = error.code
        raise


if __name__ == "__main__":
    main()
