"""Which rank is which, and what ranks say to one another. All that calls torch.distributed is here.

A job has R ranks. With one rank both towers live together. With more there is a mesh (data, tower): the two ranks of a
pair, which stand next to each other, hold a tower each, and the pairs share the rows of every global batch. RankLayout
"data" has both towers on every rank instead. Tensors go by the device's own backend (NCCL between GPUs, gloo between
CPUs); flags, counters and checkpoints go by gloo always, so that asking for them does not wait for a GPU.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from model.parallel.mesh import Place, RankLayout
from model.shapes import towers_of


class Spans:
    """Seconds by name that the training stream spent in something: by events on a GPU, else by the host's clock.

    Event pairs are kept until `fold`, which is cheap once the device has passed them.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Times what happens inside."""
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()  # type: ignore[no-untyped-call]
            yield
            end.record()  # type: ignore[no-untyped-call]
            self._pending.append((name, start, end))
        else:
            started_s = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - started_s

    def fold(self) -> None:
        """Adds up the spans so far; waits for the device where it has not passed them."""
        for _ in range(len(self._pending)):
            name, start, end = self._pending.popleft()
            end.synchronize()  # type: ignore[no-untyped-call]
            self.seconds[name] += start.elapsed_time(end) / 1000  # type: ignore[no-untyped-call]

    def take(self) -> dict[str, float]:
        """The seconds so far by name; the next ones count from 0."""
        self.fold()
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


class AsyncHandle:
    """Bytes on their way. After `wait` the arrived tensors may be read (on a GPU: in the order of the stream)."""

    def __init__(self, works: Sequence[dist.Work], kept: Sequence[Tensor], landings: Sequence[tuple[Tensor, Tensor]]):
        self._works, self._kept, self._landings = works, kept, landings

    def wait(self) -> None:
        """Waits, and gives up the tensors that were sent."""
        for work in self._works:
            work.wait()
        for tensor, staged in self._landings:
            tensor.copy_(staged)
        self._works, self._kept, self._landings = (), (), ()


def no_mark(where: str, step: int | None = None) -> None:
    """Where nobody watches."""


class Ranks:
    """This rank among the others, with its process groups. `Ranks()` is a rank alone, which says nothing to anybody.

    Attributes:
        place: its coordinates.
        device: where its tensors live.
        backend: of tensors: "nccl", "gloo", or "none" where there is one rank.
        shared_gpu: whether ranks of this machine have to share a GPU; then a run shows correctness, not speed.
        sent: bytes sent so far by kind; what is summed up counts once, as the bytes that go in.
        spans: time spent waiting for others, by kind.
        mark: told where this rank is; a watch listens.
    """

    def __init__(self, place: Place | None = None, device: torch.device | None = None) -> None:
        self.place, self.device = place or Place(), device or torch.device("cpu")
        self.backend, self.shared_gpu = "none", False
        self.sent: Counter[str] = Counter()
        self.spans = Spans(self.device)
        self.mark: Callable[..., None] = no_mark
        self.store: Store | None = None
        self._maps_group: dist.ProcessGroup | None = None
        self._images_group: dist.ProcessGroup | None = None
        self._data_group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this rank prints and writes."""
        return self.place.rank == 0

    @property
    def _staged(self) -> bool:
        """Whether tensors go through host memory: gloo moves no GPU's."""
        return self.backend == "gloo" and self.device.type == "cuda"

    def join(self, timeout_s: float) -> None:
        """Meets the other ranks and builds the groups. `torchrun` says in the environment where."""
        place = self.place
        found, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        store = PrefixStore(f"attempt {restarts()}", found)  # words of a start before this one are stale
        assert (rank, world) == (place.rank, place.world)
        nccl = self.device.type == "cuda" and not self.shared_gpu
        self.backend = "nccl" if nccl else "gloo"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            store=PrefixStore("groups", store),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
        )
        self.store = store
        shape = (place.data_ranks, place.tower_ranks)
        mesh = init_device_mesh("cuda" if nccl else "cpu", shape, mesh_dim_names=("data", "tower"))
        self._data_group, self._maps_group = mesh.get_group("data"), mesh.get_group("tower")
        if place.is_pair:  # groups of their own for images: maps need not queue behind them
            pairs = [[rank, rank + 1] for rank in range(0, place.world, place.tower_ranks)]
            self._images_group, _ = dist.new_subgroups_by_enumeration(pairs)  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """Parts from the others, when all have got here."""
        if self.place.world > 1:
            self.any(False)
            dist.destroy_process_group()

    # ---- tensors between devices ----------------------------------------------------------------------------------

    def swap(self, out: Tensor | None, into: Tensor | None, kind: str) -> AsyncHandle:
        """Starts to send `out` to the other tower's rank and to receive `into` (contiguous) from there; None for
        nothing. The other rank must do the counterpart, in the same order among the swaps of its kind."""
        group = self._images_group if kind == "images" else self._maps_group
        operations, kept, landings = [], [], []
        if out is not None and out.numel():
            self.sent[kind] += out.numel() * out.element_size()
            kept.append(out.cpu() if self._staged else out.contiguous())
            operations.append(dist.P2POp(dist.isend, kept[-1], self.place.peer, group=group))
        if into is not None and into.numel():
            room = torch.empty_like(into, device="cpu") if self._staged else into
            if self._staged:
                landings.append((into, room))
            kept.append(room)
            operations.append(dist.P2POp(dist.irecv, room, self.place.peer, group=group))
        return AsyncHandle(dist.batch_isend_irecv(operations) if operations else [], kept, landings)

    def add_up(self, tensor: Tensor) -> AsyncHandle:
        """Starts to replace `tensor` by its sum over the parts of the batch."""
        self.sent["sums"] += tensor.numel() * tensor.element_size()
        summed = tensor.cpu() if self._staged else tensor
        work = dist.all_reduce(summed, group=self._data_group, async_op=True)
        assert work is not None
        return AsyncHandle([work], [summed], [(tensor, summed)] if self._staged else [])

    # ---- words between hosts --------------------------------------------------------------------------------------

    def total(self, values: Tensor) -> Tensor:
        """Sum over all ranks of `values`, which is on the CPU."""
        if self.place.world > 1:
            self.mark("adding up over the ranks")
            values = values.clone()
            dist.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """The largest of all ranks' values."""
        if self.place.world == 1:
            return value
        self.mark("agreeing with the other ranks")
        word = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(word, op=dist.ReduceOp.MAX)
        return int(word.item())

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return bool(self.largest(int(flag)))

    def peer_rows(self, rows: int) -> int:
        """Tells the other rank of the pair a number of rows, and returns its."""
        mine, others = torch.tensor([rows]), torch.empty(1, dtype=torch.int64)
        sending = dist.isend(mine, self.place.peer)
        dist.recv(others, self.place.peer)
        assert sending is not None
        sending.wait()
        return int(others.item())

    def collect(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Whole tensors on the CPU, by name, on the first rank; None on all others. Every rank must call it."""
        place = self.place
        if place.data_rank:
            return None
        here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if not place.is_pair:
            return here
        if not self.first:
            for tensor in here.values():
                dist.send(tensor, place.peer)
            return None
        return {name: self._joined(name, tensor) for name, tensor in here.items()}

    def _joined(self, name: str, tensor: Tensor) -> Tensor:
        if towers_of(name) == self.place.towers:
            return tensor
        rows = len(tensor)
        whole = torch.empty(2 * rows, *tensor.shape[1:], dtype=tensor.dtype)
        whole[:rows] = tensor
        dist.recv(whole[rows:], self.place.peer)
        return whole


SINGLE_RANK = Ranks()


def start(layout: RankLayout, device: str, timeout_s: float) -> Ranks:
    """The ranks that `torchrun` started, or this process alone where it did not; `device` is "cpu" or "cuda".

    On CUDA every rank takes the GPU of its number on its machine. Where there are fewer GPUs than ranks they share
    them, by gloo through host memory. ValueError where the ranks are no pairs.
    """
    place = Place.of(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), layout)
    if device == "cuda" and torch.cuda.is_available():  # where it is not, the feed says so
        gpus = torch.cuda.device_count()
        here = int(os.environ.get("LOCAL_RANK", 0)) % gpus
        torch.cuda.set_device(here)
        ranks = Ranks(place, torch.device("cuda", here))
        ranks.shared_gpu = ranks_here() > gpus
    else:
        ranks = Ranks(place, torch.device("cpu"))
        share_cores()
    if place.world > 1:
        ranks.join(timeout_s)
    return ranks


def restarts() -> int:
    """How often torchrun has started the ranks again after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def ranks_here() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def cores_here() -> int:
    """Cores of this machine for each of its ranks, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_here())


def share_cores() -> None:
    """Gives torch this rank's share of the cores, unless OMP_NUM_THREADS says otherwise. Its value 1 says nothing:
    torchrun sets it where nobody did."""
    if ranks_here() > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(cores_here())
