"""A real Slurm of two nodes on this machine: its daemons run from a folder, and end with the tests.

It has no database, cgroups or accounting, so it runs in a container; but it needs root, as each
job is started as its user.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
START_S = 60.0  # on a busy machine; else it takes one
CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]},{ports[2]}] CPUs=1
PartitionName=main Nodes=ALL Default=YES
"""


def obstacle() -> str | None:
    """Return why there can be no cluster here, if so."""
    if missing := [name for name in DAEMONS if shutil.which(name) is None]:
        return f"Slurm is not installed ({', '.join(missing)}): apt install slurmctld slurmd munge"
    return "Slurm's daemons need root" if os.getuid() != 0 else None


@contextmanager
def cluster(folder: Path) -> Iterator[Path]:
    """Run a cluster; yields its configuration, the value for SLURM_CONF.

    Raises:
        RuntimeError: it did not start; with the last lines of the daemons' logs.
    """
    config, key = folder / "slurm.conf", folder / "key"
    (folder / "state").mkdir()
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    config.write_text(CONFIG.format(host=socket.gethostname(), folder=folder, ports=_free_ports(3)))
    files = {"socket": "munge.socket", "key-file": "key", "pid-file": "munged.pid"}
    files |= {"log-file": "munged.log", "seed-file": "seed"}
    munged = ["munged", "--foreground", "--force"]
    munged += [f"--{option}={folder / name}" for option, name in files.items()]
    environment = os.environ | {"SLURM_CONF": str(config)}
    daemons = [munged, ["slurmctld", "-D", "-f", str(config)]]
    daemons += [["slurmd", "-D", "-N", name, "-f", str(config)] for name in ("n1", "n2")]
    # each begins when it can reach the one before: else it tries again only after some seconds
    answers = [["test", "-S", str(folder / "munge.socket")], ["sinfo"], ["true"], ["true"]]
    with ExitStack() as stack:
        for daemon, answer in zip(daemons, answers, strict=True):
            stack.callback(_end, _started(daemon, folder, environment))
            _wait(answer, "", folder, environment)
        _wait(["sinfo", "-h", "-N", "-o", "%T"], "idle\nidle\n", folder, environment)
        yield config
        subprocess.run(["scancel", "--user=root"], env=environment, check=False)


def kill(configuration: Path, node: str, whole: bool) -> None:
    """Kill a node's daemon; of the whole node what runs on it, too."""
    victims = [int((configuration.parent / f"{node}.pid").read_text())]
    for environment in Path("/proc").glob("[0-9]*/environ") if whole else ():
        with suppress(OSError):  # it has just ended
            values = environment.read_bytes().split(b"\0")
            wanted = (f"SLURMD_NODENAME={node}", f"SLURM_CONF={configuration}")
            if all(value.encode() in values for value in wanted):  # not of another cluster here
                victims.append(int(environment.parent.name))
    for victim in reversed(victims):
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)


def revive(configuration: Path, node: str) -> subprocess.Popen[bytes]:
    """Start a node's daemon again."""
    command = ["slurmd", "-D", "-N", node, "-f", str(configuration)]
    environment = os.environ | {"SLURM_CONF": str(configuration)}
    return _started(command, configuration.parent, environment)


def _started(
    command: list[str], folder: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    log = folder / f"{command[0]}-{len(list(folder.glob('*.out')))}.out"
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait(command: list[str], output: str, folder: Path, environment: dict[str, str]) -> None:
    """Wait until a command succeeds, and prints a text."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.startswith(output):
            return
        time.sleep(0.1)
    logs = (path.read_text(errors="replace").splitlines()[-1:] for path in folder.glob("*.out"))
    raise RuntimeError(f"Slurm did not start: {[line for lines in logs for line in lines]}")


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody uses now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
