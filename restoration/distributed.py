"""Several processes on one training run or one folder of pictures, as torchrun starts them; else a world of one."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from restoration.errors import LostPeerError, ReportedError, UserError
from restoration.process import is_one_of_several

Answer = TypeVar("Answer")
Item = TypeVar("Item")

# The longest that one process may work while the others wait: the first one decodes every painting before a run, and
# of a folder of large scans one share may take hours longer than another. A process that ends is noticed at once,
# whatever this is.
PATIENCE = timedelta(days=1)


class Mute:
    """Whatever is asked of it, it says and does nothing."""

    def __getattr__(self, name: str) -> Mute:
        return self

    def __call__(self, *arguments: object, **options: object) -> Mute:
        return self

    def __enter__(self) -> Mute:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@dataclass(frozen=True)
class World:
    """This process's number (rank) among all that work on the same job (size)."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one process that writes and talks."""
        return self.rank == 0

    def refuse(self, message: str) -> NoReturn:
        """UserError, reported once, on all processes: all must come here."""
        raise UserError(message) if self.first else ReportedError(message)

    def refuse_company(self, option: str) -> None:
        """UserError where there are other processes, for an option of a single one."""
        if self.size > 1:
            self.refuse(f"{option} takes one process, got {self.size}: leave torchrun out")

    def tell(self, text: str) -> None:
        """Prints, once."""
        if self.first:
            print(text)

    def speaker(self, make: Callable[[], Answer]) -> Answer | Mute:
        """What writes or talks: the real one on the first process, a mute one on the others."""
        return make() if self.first else Mute()

    def decide(self, question: Callable[[], Answer]) -> Answer:
        """The answer that the first process finds, on all processes; where it finds a UserError, all raise it."""
        if self.size == 1:
            return question()
        message = [None, None]
        if self.first:
            try:
                message[0] = question()
            except UserError as error:
                message[1] = error
        dist.broadcast_object_list(message, device=torch.device("cpu"))
        answer, error = message
        if error is not None:
            raise error if self.first else ReportedError(str(error))
        return answer

    def together(self, work: Callable[[], Answer]) -> Answer:
        """What this process's own work gives; where any process finds a UserError, all raise it, and one reports it."""
        answer, found = None, None
        try:
            answer = work()
        except UserError as error:
            found = error
        errors = self.gather(None if found is None else str(found))
        failed = next((rank for rank, error in enumerate(errors) if error is not None), None)
        if failed is not None:
            raise found if self.rank == failed else ReportedError(errors[failed])
        return answer

    def gather(self, item: Item) -> list[Item]:
        """What each process gives, in order of rank, on all processes."""
        if self.size == 1:
            return [item]
        items = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes give, on all processes. Cheap enough for every step."""
        if self.size == 1:
            return number
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of items: every size-th, so that neighbours, often of a kind, are spread."""
        return items[self.rank :: self.size]

    def batches(self, first_step: int, end_step: int, batch: int) -> Iterator[range]:
        """For each step this process's part of the samples' numbers: step k takes k·batch up to (k+1)·batch in all.

        The samples of a step thus do not depend on the number of processes. UserError where it does not divide batch.
        """
        if batch % self.size:
            raise UserError(f"--batch must be divisible by the number of processes, {self.size}, got {batch}")
        part = batch // self.size
        starts = (step * batch + self.rank * part for step in range(first_step, end_step))
        return (range(start, start + part) for start in starts)

    def averaging(self, module: nn.Module) -> nn.Module:
        """The module, its parameters those of the first process, its gradients after backward the mean over all.

        Backward must reach every parameter. Losses that are means over equal batches give the joined batch's gradient.
        """
        if self.size == 1:
            return module
        # The buffers are constants and need not be sent before every step. PyTorch 2.13 has renamed how to say so.
        names = inspect.signature(DistributedDataParallel).parameters
        constant = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        return DistributedDataParallel(module, gradient_as_bucket_view=True, **{constant: False})

    def own_device(self, device: torch.device) -> torch.device:
        """The same, or with CUDA and several processes the GPU that this one has to itself."""
        if self.size == 1 or device.type != "cuda":
            return device
        number = int(os.environ.get("LOCAL_RANK", "0"))
        if number >= torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node must be at most the number of GPUs here, {torch.cuda.device_count()}; "
                f"process {number} has none"
            )
        torch.cuda.set_device(number)
        return torch.device("cuda", number)


ALONE = World()


@contextmanager
def joined() -> Iterator[World]:
    """Joins the processes that torchrun started for this job, if it did.

    LostPeerError where another one of them ends before the job does: connections to it break, and nobody waits for it.
    After an error the group is left as it is, for cli.main: NCCL takes it down with all of its processes together, and
    some may be waiting for this one.
    """
    if not is_one_of_several():
        yield ALONE
        return
    # Decisions travel over gloo, whatever carries the gradients: a host need not wait for its GPU to talk.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), int(os.environ["WORLD_SIZE"]))
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            hours = PATIENCE / timedelta(hours=1)
            raise LostPeerError(
                f"another process of this job has ended, or has not answered for {hours:g} hours; "
                "its message or torchrun's says why"
            ) from error
        raise
    dist.destroy_process_group()
