"""Training in several processes: every optimizer step's rows are shared out, and gradients are
added up.

Started by `torchrun` or `accelerate launch`, which say in the environment who each process is. The
sums are those of one process over the same rows, so the loss and the gradient are too. One process
leads: it alone validates, prints and writes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edgetune.core.errors import TrainingError

T = TypeVar("T")
PATIENCE = timedelta(hours=12)  # the others wait while the leader validates
BUCKET = 8_000_000  # gradient values that travel together, 32 MB in fp32
# How launchers tell a process its rank, the number of processes, and its rank on this machine.
ENVIRONMENTS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
)


@dataclass(frozen=True)
class Group:
    """The processes that train together; by default this one alone, for which every method does
    nothing.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process validates, prints and writes."""
        return self.rank == 0

    def share(self, rows: Sequence[int]) -> Sequence[int]:
        """This process's part of a step's rows; they come sorted by length, so all parts have about
        as many tokens.
        """
        return rows if self.size == 1 else rows[self.rank :: self.size]

    def total(self, values: Sequence[T]) -> Sequence[T]:
        """The sums over all processes."""
        if self.size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return [type(value)(number) for value, number in zip(values, sums.tolist(), strict=True)]  # type: ignore[call-arg]

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Every gradient becomes the sum over all processes; one that no process has stays None."""
        if self.size == 1:
            return
        present = self.total([int(parameter.grad is not None) for parameter in parameters])
        gradients = []
        for parameter, count in zip(parameters, present, strict=True):
            if count:
                parameter.grad = (
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                )
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            together = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(together)
            for gradient, summed in zip(
                bucket, together.split([g.numel() for g in bucket]), strict=True
            ):
                gradient.copy_(summed.view_as(gradient))

    def copy_weights(self, parameters: Sequence[Tensor]) -> None:
        """Every process starts from the leader's weights."""
        if self.size > 1:
            with torch.no_grad():
                for parameter in parameters:
                    dist.broadcast(parameter.data, src=0)

    def from_leader(self, value: T) -> T:
        """The leader's value, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one number format, in runs of about BUCKET values."""
    for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
        bucket: list[Tensor] = []
        for gradient in gradients:
            if gradient.dtype == dtype:
                bucket.append(gradient)
                if sum(g.numel() for g in bucket) >= BUCKET:
                    yield bucket
                    bucket = []
        if bucket:
            yield bucket


def launched() -> Group:
    """Who this process is, as the launcher says; alone without one."""
    for names in ENVIRONMENTS:
        rank, size, local_rank = (int(os.environ.get(name) or 0) for name in names)
        if size > 1:
            return Group(rank, size, local_rank)
    return Group()


@contextlib.contextmanager
def process_group() -> Iterator[Group]:
    """Join the processes that the launcher started."""
    group = launched()
    if group.size == 1:
        yield group
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, rank=group.rank, world_size=group.size, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise TrainingError(
            "the processes cannot find each other",
            expected=(
                "MASTER_ADDR and MASTER_PORT of the first one, as torchrun and accelerate launch"
                " set them"
            ),
            got=str(error).strip().splitlines()[0],
        ) from error
    try:
        yield group
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise TrainingError(
            f"process {group.rank} of {group.size} lost the others",
            fix="The one that stopped first says why.",
        ) from error
    finally:
        dist.destroy_process_group()
