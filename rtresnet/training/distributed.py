"""Training in several processes; with a single process every function is the identity.

    torchrun --nproc-per-node 8 -m rtresnet train ...

torchrun's environment variables identify the process. Each process has the whole net and computes
its part of every batch; torch's DistributedDataParallel averages the gradients.
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
    """This process of a training group.

    Attributes:
        rank: From 0; rank 0 is the main process, which writes files and messages.
        size: Number of processes.
        restarts: Number of restarts of the group by torchrun.
        launch: torchrun's identifier of the launch, the same after a restart.
    """

    rank: int = 0
    size: int = 1
    restarts: int = 0
    launch: str = ""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def shard(self, indices: np.ndarray) -> np.ndarray:
        """Return this process's part of the images; each image is in exactly one part."""
        return indices[self.rank :: self.size]

    def sums(self, values: np.ndarray, device: str) -> np.ndarray:
        """Sum float64 numbers element by element over all processes."""
        if self.size == 1:
            return values
        total = torch.from_numpy(np.asarray(values, np.float64)).to(device)
        distributed.all_reduce(total)
        return total.cpu().numpy()

    def broadcast(self, value: T) -> T:
        """Return the main process's value in every process."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, 0)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        distributed.all_gather_object(values, value)
        return cast(list[T], values)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            distributed.barrier()

    def align_buffers(self, net: nn.Module) -> None:
        """Copy the main process's batch norm statistics to every process."""
        if self.size > 1:
            for buffer in net.buffers():
                distributed.broadcast(buffer, 0)

    def wrap(self, net: nn.Module, device: str, *, some_unused: bool = False) -> nn.Module:
        """Wrap a net so that its gradients are averaged over the processes.

        Args:
            net: The net, on the device.
            device: Device of this process.
            some_unused: Whether a step may not use some parameters.
        """
        if self.size == 1:
            return net
        ids = [torch.device(device).index] if device.startswith("cuda") else None
        return nn.parallel.DistributedDataParallel(
            net, device_ids=ids, find_unused_parameters=some_unused
        )

    def part(self, batch: int, accumulate: int, micro: int) -> slice:
        """Return the slice of a batch that is this process's `micro`-th part."""
        length = batch // (self.size * accumulate)
        start = (micro * self.size + self.rank) * length
        return slice(start, start + length)


ALONE = World()


@contextlib.contextmanager
def world(device: str) -> Iterator[tuple[World, str]]:
    """Join torchrun's process group, if there is one.

    Yields:
        The world, and this process's device ("cuda" becomes "cuda:N").
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
    started = launch or {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    if not started or os.environ.get("WORLD_SIZE") == "1":
        yield World(restarts=restarts, launch=launch), device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    # torchrun keeps its store across restarts, and torch 2.13 no longer separates the attempts in
    # it: a process would connect to the address of a terminated one.
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
    """Wait for all processes, and until gloo has released its tensors.

    gloo's threads release a collective's tensors shortly after it is done, and need the GIL for
    it. A thread that requests the GIL while Python exits aborts the process (torch 2.13), and
    torchrun then terminates the others.
    """
    for _ in range(2):  # gloo has two threads
        last = torch.zeros(1)
        distributed.all_reduce(last)
        alive = weakref.ref(last)
        del last
        while alive() is not None:
            time.sleep(0.001)


def check_batch(batch: int, accumulate: int, world: World) -> None:
    """Check that a batch can be divided evenly.

    Raises:
        InputError: It cannot; the message names the nearest batch that can.
    """
    parts = world.size * accumulate
    if batch % parts:
        nearest = max(1, round(batch / parts)) * parts
        raise InputError(
            f"a batch of {batch} cannot be divided: {world.size} processes x {accumulate} parts",
            fix=f"use --batch {nearest}",
        )
