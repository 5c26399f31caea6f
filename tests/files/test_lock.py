"""One process at a time uses a directory; a process that has ended holds no lock."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from lora_exp.errors import ConfigError
from lora_exp.files.lock import Lock

HOLD = "import sys; from pathlib import Path; from lora_exp.files.lock import Lock\n"
HOLD += "lock = Lock(Path(sys.argv[1]), 'resume'); print('held', flush=True); sys.stdin.read()"


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ConfigError, match=rf"resume: .* is in use by process {holder.pid} on "):
        Lock(tmp_path, "resume")
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    Lock(tmp_path, "resume").release()


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = Lock(tmp_path, "resume")
    fork = multiprocessing.get_context("fork")
    started, ready = fork.Event(), fork.Event()
    child = fork.Process(target=lambda: (started.set(), ready.wait()))
    child.start()
    started.wait()
    with pytest.raises(ConfigError, match="is in use"):
        Lock(tmp_path, "resume")
    lock.release()
    Lock(tmp_path, "resume").release()
    ready.set()
    child.join()
