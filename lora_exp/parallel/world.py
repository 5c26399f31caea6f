"""This process among those of its run: alone, or one of several that compute together.

Every process of a run calls these functions at the same places, in the same order.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from lora_exp.files.whole import write_whole

T = TypeVar("T")
TICK = 0.05  # seconds between two looks
PATIENCE = timedelta(days=7)  # for each other; who started them sees when one has ended
REACHED = timedelta(minutes=5)  # within which the first process's node answers
SINGLE = {"num_processes": 1, "process_index": 0, "distributed_type": "NO"}


class World:
    """The processes of this process's run."""

    def __init__(self) -> None:
        self.rank, self.size, self.local_rank = 0, 1, 0  # local: on its machine
        self.in_step = False  # whether each pass through the model needs all processes

    @property
    def is_first(self) -> bool:
        """Return whether this process writes what the run writes."""
        return self.rank == 0

    def join(self, rank: int, size: int, meeting: Path, local_rank: int, nodes: int = 1) -> None:
        """Meet the other processes of the run.

        Args:
            rank: this one's number.
            size: how many there are.
            meeting: a file by which they find each other.
            local_rank: this one's number on its machine.
            nodes: how many machines they are on.
        """
        import torch
        from torch.distributed import FileStore  # type: ignore[attr-defined]

        self.rank, self.size, self.local_rank = rank, size, local_rank
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(local_rank)
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            # not init_method: of a path with # or ? it takes a part
            store=FileStore(str(meeting), size) if nodes == 1 else _store(rank, meeting),
            rank=rank, world_size=size, timeout=PATIENCE,
        )  # fmt: skip

    def leave(self) -> None:
        """Part from the others."""
        import torch

        torch.distributed.destroy_process_group()
        self.rank, self.size, self.local_rank = 0, 1, 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.gathered(None)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process do this before the others, which then read what it has stored."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def shared(self, value: T) -> T:
        """Return the first process's value, in all processes."""
        if self.size == 1:
            return value
        import torch

        values = [value if self.is_first else None]
        torch.distributed.broadcast_object_list(values, 0, device=torch.device("cpu"))
        return values[0]  # type: ignore[return-value]

    def gathered(self, value: T) -> list[T]:
        """Return every process's value, in the order of their ranks."""
        if self.size == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.size
        # on the CPU: a step must not wait for a GPU
        group = torch.distributed.group.WORLD
        torch.distributed.all_gather_object(values, value, group)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in any process."""
        if self.size == 1:
            return flag
        import torch

        flags = torch.tensor([float(flag)])
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return bool(flags.item())

    def total(self, tensor: Any) -> Any:
        """Return the sum of every process's tensor of this shape."""
        import torch

        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    def mean(self, number: float) -> float:
        """Return the mean of every process's number."""
        return sum(self.gathered(number)) / self.size

    def pooled(self, lists: Mapping[str, list[T]]) -> dict[str, list[T]]:
        """Return lists that have the elements of every process's."""
        pools = self.gathered(dict(lists))
        keys = dict.fromkeys(key for pool in pools for key in pool)
        return {key: [x for pool in pools for x in pool.get(key, ())] for key in keys}

    def average_gradients(self, parameters: Iterable[Any]) -> None:
        """Replace gradients by their mean over all processes; one that is missing counts as 0."""
        if self.size == 1:
            return
        import torch

        trained = [parameter for parameter in parameters if parameter.requires_grad]
        reached = torch.tensor([float(p.grad is not None) for p in trained])
        torch.distributed.all_reduce(reached, torch.distributed.ReduceOp.MAX)
        for parameter in (p for p, flag in zip(trained, reached.tolist(), strict=True) if flag):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= self.size

    def own(self, name: str) -> str:
        """Return the name of a file of which each process has its own; the first's is plain."""
        stem, dot, ending = name.partition(".")
        return name if self.is_first else f"{stem}-{self.rank}{dot}{ending}"

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let trainers compute in this process as if it were the only one."""
        if self.size == 1:
            yield
            return
        from accelerate.state import AcceleratorState, PartialState

        states = [PartialState._shared_state, AcceleratorState._shared_state]
        saved = [{key: state[key] for key in SINGLE if key in state} for state in states]
        single = SINGLE | {"distributed_type": _no_type()}
        try:
            for state in states:
                state.update({key: single[key] for key in single if key in state})
            yield
        finally:
            for state, values in zip(states, saved, strict=True):
                state.update(values)


def _store(rank: int, meeting: Path) -> Any:
    """Return a store on the first process's node: the locks of one in a file need one machine."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = None
    if rank == 0:
        host = socket.gethostname()
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
        write_whole(meeting, f"{host} {store.port}")
    while not meeting.exists():  # srun ends this process if the first one has failed
        time.sleep(TICK)
    host, port = meeting.read_text(encoding="utf-8").split()
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}  # accelerate asks for them
    if store is None:
        store = TCPStore(host, int(port), is_master=False, timeout=REACHED)
        store.set_timeout(PATIENCE)
    return store


def _no_type() -> Any:
    from accelerate.utils import DistributedType

    return DistributedType.NO


world = World()
