"""A real Ray cluster of two nodes on this machine, in a process of its own: `two_nodes`.

Run as a program it prints the address, and the process of the second node, and ends with its stdin.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT

SETTINGS = {
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
    "worker_niceness": 0,
}


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[str, int]]:
    """Run a cluster; yields its address, and the process of the second node.

    Args:
        folder: for its files, with a short name: there are sockets in it.
    """
    environment = os.environ | {"RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    with (folder / "out").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray_nodes"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    with process:
        assert process.stdout is not None
        words = next((line.split() for line in process.stdout if line.startswith("nodes ")), None)
        assert words, (folder / "out").read_text()
        yield words[1], int(words[2])
        process.communicate()


def main() -> None:
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": SETTINGS}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    raylet = node.all_processes["raylet"][0].process.pid
    print("nodes", cluster.address, raylet, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
