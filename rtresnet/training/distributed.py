"""One of several processes, as torchrun starts them; alone, everything here is the identity.

    torchrun --nproc-per-node 8 -m rtresnet train ...

torchrun's environment variables say which process this is. Each holds the whole net, takes its
part of every batch, and the gradients are averaged (torch's DistributedDataParallel).
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import torch
from torch import distributed, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from rtresnet.core.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Which process this is, of how many.

    Attributes:
        rank: From 0; rank 0 writes the files and the lines.
        size: Processes.
        restarts: How often torchrun has restarted this group.
        launch: torchrun's name for all of it, the same after a restart.
    """

    rank: int = 0
    size: int = 1
    restarts: int = 0
    launch: str = ""

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def shard(self, indices: np.ndarray) -> np.ndarray:
        """This process's part of the images, each in exactly one: no padding to equal lengths."""
        return indices[self.rank :: self.size]

    def sums(self, values: np.ndarray, device: str) -> np.ndarray:
        """The element-wise sum over all processes of float64 numbers."""
        if self.size == 1:
            return values
        total = torch.from_numpy(np.asarray(values, np.float64)).to(device)
        distributed.all_reduce(total)
        return total.cpu().numpy()

    def broadcast(self, value: T) -> T:
        """Rank 0's value."""
        if self.size == 1:
            return value
        held = [value]
        distributed.broadcast_object_list(held, 0)
        return held[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        distributed.all_gather_object(values, value)
        return cast(list[T], values)

    def barrier(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            distributed.barrier()

    def align_buffers(self, net: nn.Module) -> None:
        """Gives every process rank 0's batch norm statistics."""
        if self.size > 1:
            for buffer in net.buffers():
                distributed.broadcast(buffer, 0)

    def wrap(self, net: nn.Module, device: str) -> nn.Module:
        """The net with averaged gradients."""
        if self.size == 1:
            return net
        ids = [torch.device(device).index] if device.startswith("cuda") else None
        return nn.parallel.DistributedDataParallel(net, device_ids=ids)

    def part(self, batch: int, accumulate: int, micro: int) -> slice:
        """Where in a batch this process's `micro`-th part lies."""
        length = batch // (self.size * accumulate)
        start = (micro * self.size + self.rank) * length
        return slice(start, start + length)


ALONE = World()


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE"} <= os.environ.keys()


@contextlib.contextmanager
def world(device: str) -> Iterator[tuple[World, str]]:
    """Joins the group that torchrun made, if it did.

    Yields:
        The world, and this process's device ("cuda" becomes its own "cuda:N").
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if not launched() or os.environ.get("WORLD_SIZE") == "1":
        yield World(restarts=restarts, launch=launch), device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    # torchrun keeps its store over a restart, and torch 2.13 no longer tells the attempts apart in
    # it: a process would connect to the address of one that is gone.
    store = PrefixStore(f"attempt {restarts}", store)
    distributed.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo", store=store, rank=rank, world_size=size
    )
    try:
        yield World(rank=rank, size=size, restarts=restarts, launch=launch), device
        if not device.startswith("cuda"):
            _leave_together()
    finally:
        distributed.destroy_process_group()


def _leave_together() -> None:
    """Returns when every process is here and gloo has let go of what it was given.

    Its threads drop a collective's tensors a moment after it is done, for which they need Python's
    lock. One that asks for it while Python ends aborts the process (torch 2.13), and torchrun then
    ends the others, wherever they are.
    """
    for _ in range(2):  # gloo has two threads
        last = torch.zeros(1)
        distributed.all_reduce(last)
        held = weakref.ref(last)
        del last
        while held() is not None:
            time.sleep(0.001)


def check_batch(batch: int, accumulate: int, world: World) -> None:
    """Refuses a batch that cannot be shared out evenly.

    Raises:
        InputError: It cannot; names the nearest that can.
    """
    parts = world.size * accumulate
    if batch % parts:
        nearest = max(1, round(batch / parts)) * parts
        raise InputError(
            f"a batch of {batch} cannot be shared by {world.size} processes in {accumulate} parts",
            fix=f"--batch {nearest}",
        )
