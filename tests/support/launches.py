"""Counts operators and bytes of work on a device that is not there: tensors on torch's device "meta" have no data.

An operator that reads or writes memory counts as one launch; operators that only cut or allocate count as none. An
operator that would need data on the host (`item`, `nonzero`, a copy to the CPU) raises an error, because there is none.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
UNCOUNTED = (
    "alias",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_record_function_enter_new",
    "_record_function_exit",
)
ONLY_WRITES = ("copy_", "fill_", "zero_", "new_full", "ones_like", "zeros_like")  # their first argument is not read


class Launches(TorchDispatchMode):
    """Counts while it is active.

    Attributes:
        operators: launches by name of the operator.
        bytes: bytes that the operators read and write, each tensor once for each operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.bytes = 0

    @property
    def count(self) -> int:
        """All launches."""
        return sum(self.operators.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts an operator, then calls it."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        inputs = tensors((args, {key: value for key, value in kwargs.items() if key != "out"}))  # `out` is not read
        if name == "_fused_sgd_":  # torch cannot run it on "meta"; it changes its first and third list in place
            self._add(name, inputs, [*args[0], *args[2]])
            return None
        result = func(*args, **kwargs)
        outputs = tensors(result)
        cuts = not func._schema.is_mutable and all(shares(output, inputs) for output in outputs)
        if name in UNCOUNTED or cuts:
            return result
        self._add(name, inputs[1:] if name in ONLY_WRITES else inputs, outputs)
        return result

    def _add(self, name: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        self.operators[name] += 1
        self.bytes += sum(tensor.numel() * tensor.element_size() for each in (reads, writes) for tensor in unique(each))


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def unique(found: list[Tensor]) -> list[Tensor]:
    """Each tensor once."""
    return list({id(tensor): tensor for tensor in found}.values())


def shares(tensor: Tensor, others: list[Tensor]) -> bool:
    """Whether a tensor lies in the memory of one of the others."""
    return any(tensor.untyped_storage()._cdata == other.untyped_storage()._cdata for other in others)
