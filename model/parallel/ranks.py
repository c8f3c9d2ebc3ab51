"""Communication between ranks. Every call of torch.distributed is in this module, in `meeting` or in `watchdog`.

A job has one or more ranks. A single rank holds both towers. Otherwise `model.parallel.mesh` places the ranks in a mesh
(data, tower). Two kinds of messages cross:

    tensors of a step     by NCCL between GPUs, by gloo between CPUs: activations, images, gradients
    numbers of the host   always by gloo: flags, counters, checkpoints. Exchanging them does not wait for a GPU.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from model.parallel.meeting import Meeting, meet
from model.parallel.mesh import Place, RankLayout
from model.parallel.stream_timer import StreamTimer
from model.shapes import towers_of


class AsyncHandle:
    """A pending transfer. After `wait` the received tensors may be read (on a GPU: by later work of the stream).

    Args:
        works: the pending operations.
        kept: tensors that must not be freed or reused before the operations have finished.
        copies: pairs (target, staging buffer). After the wait each buffer is copied to its target.
    """

    def __init__(
        self, works: Sequence[dist.Work], kept: Sequence[Tensor], copies: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        self._works, self._kept, self._copies = works, kept, copies

    def wait(self) -> None:
        """Waits, and releases the tensors that were sent. With NCCL only the current stream waits, not the host."""
        for work in self._works:
            work.wait()
        for target, staging in self._copies:
            target.copy_(staging)
        self._works, self._kept, self._copies = (), (), ()


def no_mark(where: str, step: int | None = None) -> None:
    """`Ranks.mark` without a watchdog: does nothing."""


class Ranks:
    """This rank among the others, with its process groups. `Ranks()` is a single rank that communicates with no other.

    Attributes:
        place: coordinates of this rank.
        device: device of its tensors.
        backend: how tensors cross: "nccl", "gloo", or "none" for a single rank.
        shared_gpu: whether ranks of this machine share a GPU. Such a run checks correctness; its speed means nothing.
        sent: bytes sent so far, by kind: "maps" (activations), "gradients" (of activations), "images", "sums". A tensor
            that is summed counts once, with its own size.
        spans: time that the training stream spent waiting for other ranks, by kind.
        mark: called with the current activity, and at each new step with its number; a watchdog may listen.
        meeting: exchanges texts with the other ranks, without a time limit.
        store: key-value store of the job; None for a single rank.
    """

    def __init__(self, place: Place | None = None, device: torch.device | None = None) -> None:
        self.place, self.device = place or Place(), device or torch.device("cpu")
        self.backend, self.shared_gpu = "none", False
        self.sent: Counter[str] = Counter()
        self.spans = StreamTimer(self.device)
        self.mark: Callable[..., None] = no_mark
        self.meeting = Meeting()
        self.store: Store | None = None
        self._activations_group: dist.ProcessGroup | None = None
        self._images_group: dist.ProcessGroup | None = None
        self._data_group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.place.rank == 0

    @property
    def _staged(self) -> bool:
        """Whether tensors pass through host memory, because gloo does not move GPU tensors."""
        return self.backend == "gloo" and self.device.type == "cuda"

    def join(self, meeting: Meeting, timeout_s: float) -> None:
        """Builds the process groups with the ranks of `meeting`."""
        place, store = self.place, meeting.store
        assert store is not None and (meeting.rank, meeting.world) == (place.rank, place.world)
        nccl = self.device.type == "cuda" and not self.shared_gpu  # NCCL refuses two ranks on one GPU
        self.backend = "nccl" if nccl else "gloo"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            store=PrefixStore("groups", store),
            rank=place.rank,
            world_size=place.world,
            timeout=timedelta(seconds=timeout_s),
        )
        self.meeting, self.store = meeting, store
        pairs = [list(range(first, first + place.tower_ranks)) for first in range(0, place.world, place.tower_ranks)]
        parts = [list(range(tower, place.world, place.tower_ranks)) for tower in range(place.tower_ranks)]
        self._data_group, self._activations_group = _own_group(parts, timeout_s), _own_group(pairs, timeout_s)
        if place.is_pair:
            # Operations of one group run in order. Images have groups of their own, so that activations, which the step
            # waits for, do not queue behind the images of the next batch. Every rank must create every group.
            self._images_group = _own_group(pairs, timeout_s)

    def leave(self) -> None:
        """Disconnects once every rank has called it."""
        if self.place.world > 1:
            self.any(False)
            dist.destroy_process_group()

    # ---- tensors of a step ----------------------------------------------------------------------------------------

    def start_swap(self, out: Tensor | None, into: Tensor | None, kind: str) -> AsyncHandle:
        """Starts to send a tensor to the partner rank and to receive one from it.

        The partner must make the matching call, in the same order among its swaps of this kind.

        Args:
            out: tensor to send; None for nothing.
            into: contiguous tensor to receive into; None for nothing.
            kind: key in `sent`; "images" use their own process group.
        """
        group = self._images_group if kind == "images" else self._activations_group
        operations, kept, copies = [], [], []
        if out is not None and out.numel():
            self.sent[kind] += out.numel() * out.element_size()
            rows = out.contiguous()  # the channels may be last, and the partner receives in the usual order
            kept.append(rows.cpu() if self._staged else rows)
            operations.append(dist.P2POp(dist.isend, kept[-1], self.place.partner, group=group))
        if into is not None and into.numel():
            buffer = torch.empty_like(into, device="cpu") if self._staged else into
            if self._staged:
                copies.append((into, buffer))
            kept.append(buffer)
            operations.append(dist.P2POp(dist.irecv, buffer, self.place.partner, group=group))
        # One batch: NCCL could deadlock if both ranks queued their send before their receive as separate operations.
        return AsyncHandle(dist.batch_isend_irecv(operations) if operations else [], kept, copies)

    def start_sum(self, tensor: Tensor) -> AsyncHandle:
        """Starts to replace `tensor` by its sum over the parts of the batch."""
        self.sent["sums"] += tensor.numel() * tensor.element_size()
        summed = tensor.cpu() if self._staged else tensor
        work = dist.all_reduce(summed, group=self._data_group, async_op=True)
        assert work is not None
        return AsyncHandle([work], [summed], [(tensor, summed)] if self._staged else [])

    # ---- numbers of the host --------------------------------------------------------------------------------------

    def total(self, values: Tensor) -> Tensor:
        """Sum over all ranks of `values`, which is on the CPU."""
        if self.place.world > 1:
            self.mark("summing over the ranks")
            values = values.clone()
            dist.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """The largest of all ranks' values."""
        if self.place.world == 1:
            return value
        self.mark("agreeing with the other ranks")
        message = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(message, op=dist.ReduceOp.MAX)
        return int(message.item())

    def any(self, flag: bool) -> bool:
        """Whether the flag is True on any rank."""
        return bool(self.largest(int(flag)))

    def from_first(self, data: bytes) -> bytes:
        """The first rank's `data`, on all ranks."""
        if self.place.world == 1:
            return data
        message = torch.zeros(self.largest(len(data) if self.first else 0), dtype=torch.uint8)
        if self.first and data:
            message = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if len(message):
            dist.broadcast(message, src=0)
        return message.numpy().tobytes()

    def swap_row_counts(self, rows: int) -> int:
        """Sends a number of rows to the partner rank and returns the partner's number."""
        own, partners = torch.tensor([rows]), torch.empty(1, dtype=torch.int64)
        sending = dist.isend(own, self.place.partner)
        dist.recv(partners, self.place.partner)
        assert sending is not None
        sending.wait()
        return int(partners.item())

    def gather_towers(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Gathers parameters (or velocities) of both towers. Every rank must call it.

        Returns:
            On rank 0 the whole tensors by name, on the CPU; None on all other ranks.
        """
        place = self.place
        if place.data_rank:
            return None
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if not place.is_pair:
            return own
        if not self.first:
            for tensor in own.values():
                dist.send(tensor, place.partner)
            return None
        return {name: self._with_partners_rows(name, tensor) for name, tensor in own.items()}

    def _with_partners_rows(self, name: str, tensor: Tensor) -> Tensor:
        if towers_of(name) == self.place.towers:
            return tensor
        rows = len(tensor)
        whole = torch.empty(2 * rows, *tensor.shape[1:], dtype=tensor.dtype)
        whole[:rows] = tensor
        dist.recv(whole[rows:], self.place.partner)
        return whole


def _own_group(members: list[list[int]], timeout_s: float) -> dist.ProcessGroup:
    """Creates the groups `members` and returns the one of this rank.

    A group does not inherit the timeout of the job; torch's default is longer than the watchdog assumes.
    """
    timeout = timedelta(seconds=timeout_s)
    group, _ = dist.new_subgroups_by_enumeration(members, timeout=timeout)  # type: ignore[no-untyped-call]
    assert isinstance(group, dist.ProcessGroup)
    return group


SINGLE_RANK = Ranks()


def start(
    layout: RankLayout, device: str, timeout_s: float, meeting: Meeting | None = None, cores: int | None = None
) -> Ranks:
    """Connects the ranks that torchrun started; without torchrun, this process is a single rank.

    On CUDA every rank takes the GPU with its local number. If a machine has fewer GPUs than ranks, the ranks share them
    and communicate by gloo through host memory.

    Args:
        layout: how ranks divide towers and batch.
        device: "cpu" or "cuda". Without a CUDA device "cuda" gives a CPU rank; the data loader's settings reject it.
        timeout_s: how long a rank waits for another in an operation.
        meeting: the ranks that have met already.
        cores: cores of this machine that the job may use. CPU ranks share them; None leaves torch's threads alone.

    Raises:
        ValueError: if the ranks cannot form tower pairs.
    """
    meeting = meeting or meet(timeout_s)
    place = Place.of(meeting.rank, meeting.world, layout)
    if device == "cuda" and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        local_gpu = int(os.environ.get("LOCAL_RANK", 0)) % gpus
        torch.cuda.set_device(local_gpu)
        ranks = Ranks(place, torch.device("cuda", local_gpu))
        ranks.shared_gpu = ranks_here() > gpus
    else:
        ranks = Ranks(place, torch.device("cpu"))
        share_cores(cores)
    if place.world > 1:
        ranks.join(meeting, timeout_s)
    return ranks


def ranks_here() -> int:
    """Number of ranks on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def first_here() -> bool:
    """Whether this is the first rank on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def cores_of_rank(cores: int) -> int:
    """Of `cores` of this machine, those for each of its ranks, at least 1."""
    return max(1, cores // ranks_here())


def share_cores(cores: int | None) -> None:
    """Gives torch this rank's share of `cores`, unless OMP_NUM_THREADS is set to more than 1. torchrun sets 1 if the
    user has set nothing, so 1 says nothing about the user's wish. One rank gets no more threads than torch chooses."""
    if cores is None or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return
    share = cores_of_rank(cores)
    if ranks_here() > 1 or torch.get_num_threads() > share:
        torch.set_num_threads(share)
