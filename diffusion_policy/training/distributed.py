"""Several processes that train one policy: started by torchrun or `accelerate launch`, which say in the environment who
is who (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

Knows torch.distributed. Knows no policy.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from diffusion_policy.datasets.windows import WHOLE, Shard

PATIENCE = timedelta(hours=6)
"""How long a process waits for the others: the main one validates and rolls out while they do."""


class Distributed:
    """This process among those that train together. Alone, it is the main one, and sums are what they are."""

    def __init__(self, shard: Shard = WHOLE) -> None:
        """`shard`: what of every batch this process computes."""
        self.shard = shard

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.shard.rank == 0

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        return self.shard.world_size

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes: the same bits in each of them."""
        if self.world_size == 1:
            return
        together = torch.cat([tensor.flatten().float() for tensor in tensors])
        dist.all_reduce(together)
        for tensor, total in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


@contextlib.contextmanager
def join_processes(device: str) -> Iterator[tuple[Distributed, str]]:
    """Join those that were started together, if any; yields them, and the device of this one: with several GPUs on a
    machine, each process has its own. Raises ValueError when there are more processes on a machine than GPUs."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Distributed(), device
        return
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"several processes take the device auto, cpu or cuda, a GPU for each; got {device!r}")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    device = "cuda" if on_gpu else "cpu"
    if on_gpu:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU of its own; here are {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield Distributed(Shard(dist.get_rank(), dist.get_world_size())), device
    finally:
        dist.destroy_process_group()
