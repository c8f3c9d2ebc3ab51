"""Counts what a training step asks of a device: operators that read or write memory, and the bytes of their tensors.

torch calls a dispatch mode for every operator, on any device. An operator counts as one launch, and its bytes as those
of all tensors that it reads and writes, each once. That is what a device without caches would move; an operator may
launch more than one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATES = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
NO_WORK = ("detach", "alias", "_record_function_enter_new", "_record_function_exit")


@dataclass(frozen=True)
class StepCounts:
    """What one step asks for.

    Attributes:
        launches: operators that read or write memory.
        bytes: bytes that they read and write.
    """

    launches: int
    bytes: int

    def bounds_img_s(self, images: int, bytes_per_s: float, launch_s: float) -> dict[str, float]:
        """img/s that memory traffic alone, and launches alone, would allow.

        Args:
            images: images of the step.
            bytes_per_s: memory traffic of the device.
            launch_s: seconds of the host for one launch.
        """
        return {"memory": images * bytes_per_s / self.bytes, "launches": images / (self.launches * launch_s)}


def count_step(step: Callable[[], object]) -> StepCounts:
    """Runs a step and counts its operators."""
    with _Counter() as counter:
        step()
    return StepCounts(counter.launches, counter.bytes)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operator and counts it."""
        result = func(*args, **(kwargs or {}))
        reads, writes = _tensors((args, kwargs)), _tensors(result)
        mutable = func._schema.is_mutable
        cuts = bool(writes) and not mutable and all(_shares(tensor, reads) for tensor in writes)
        if func.overloadpacket.__name__ in (*ALLOCATES, *NO_WORK) or cuts or not reads + writes:
            return result
        if mutable:  # it writes what it was given
            arguments = (*zip(func._schema.arguments, args, strict=False),)
            writes = [t for one, value in arguments if one.is_write for t in _tensors(value)] or writes
        self.launches += 1
        self.bytes += sum(t.numel() * t.element_size() for each in (reads, writes) for t in _once(each))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _once(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _shares(tensor: Tensor, others: list[Tensor]) -> bool:
    """Whether a tensor lies in the memory of one of the others."""
    return any(tensor.untyped_storage()._cdata == other.untyped_storage()._cdata for other in others)
