"""Exchange of activations and their gradients between the two towers of a pair, overlapped with computation.

Before conv3, fc6, fc7 and fc8 each tower sends its activations to the other (layer.cu:78-108 of the released source).
In the backward pass it sends back the gradient of what it received, and the owner adds that to its own
(layer.cu:170-255). Each transfer starts as early as possible, and its result is waited for as late as the graph allows.
Before conv3, where three quarters of the bytes cross:

    forward    send activations | products with own activations | wait, products with the other's activations
    backward   gradient of the other's activations, send it | gradients of own activations and weights | wait, add

fc8 is on tower 0 only (layers-145.cfg), so only tower 0 has logits and a loss; logits never cross.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model.alexnet import PendingActivations
from model.parallel.gradient_sums import GradientSums
from model.parallel.mesh import Place
from model.parallel.ranks import SINGLE_RANK, AsyncHandle, Ranks
from model.recipe import SOURCE2012, Recipe
from model.shapes import IMAGE_CHANNELS, IMAGE_SIDE, TOWERS, NetSpec, layer_table

BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2}  # of one activation, by precision
LABEL_BYTES = 8
ROW_BYTES = 20  # of an image that is swapped as a uint8 crop: five float32, see `half_batches.CropBatch`


def crossing_numbers(spec: NetSpec, recipe: Recipe = SOURCE2012) -> tuple[int, int]:
    """How many activations towers 0 and 1 send for one image in the forward pass.

    In the backward pass each tower sends as many gradients as it received activations. At width 1 the numbers are
    28,288 and 30,336: tower 1 sends more, because only tower 0, which has fc8, reads fc7's units of the other.
    """
    sent = [0, 0]
    for shape in layer_table(spec, recipe):
        for tower in TOWERS:
            if shape.reads_both and 1 - tower in shape.towers:
                sent[tower] += shape.in_channels // len(TOWERS) * shape.in_side**2
    return sent[0], sent[1]


def step_bytes(
    place: Place, spec: NetSpec, recipe: Recipe, batch: int, precision: str = "float32", crops: bool = False
) -> dict[str, int]:
    """The bytes that a rank sends in one training step, by calculation; `Ranks.sent` counts them.

    Args:
        place: the rank.
        spec: size of the network.
        recipe: says which layers are pooled.
        batch: images of the global batch.
        precision: one of `model.recipe.PRECISIONS`.
        crops: whether uint8 crops are swapped, not float32 images (`half_batches.swaps_crops`).

    Returns:
        Bytes by kind: "maps" (activations, forward), "gradients" (of activations, backward) and "images" (with labels,
        of the half that the rank decoded) on a tower pair; "sums" (of parameter gradients) if the batch has parts. A
        kind of which the rank sends nothing is left out.
    """
    found: dict[str, int] = {}
    rows = batch // place.data_ranks
    if place.is_pair:
        (tower,) = place.towers
        numbers = crossing_numbers(spec, recipe)
        found["maps"], found["gradients"] = (rows * numbers[t] * BYTES[precision] for t in (tower, 1 - tower))
        image_bytes = IMAGE_CHANNELS * IMAGE_SIDE**2 * (1 if crops else BYTES["float32"]) + ROW_BYTES * crops
        found["images"] = batch // place.world * (image_bytes + LABEL_BYTES)
    if place.data_ranks > 1:
        held = [s for s in layer_table(spec, recipe) for tower in s.towers if tower in place.towers]
        found["sums"] = BYTES["float32"] * sum((s.weights + s.biases) // len(s.towers) for s in held)
    return {kind: count for kind, count in found.items() if count}


class _Crossing:
    """The transfers of one exchange in one step: activations in the forward pass, their gradients in the backward pass.

    A tower sends activations only if the other tower has the layer, and receives only if it has the layer itself:
    before fc8 tower 1 only sends, and tower 0 only receives.
    """

    def __init__(self, ranks: Ranks, layer: str) -> None:
        (tower,) = ranks.place.towers
        readers = TOWERS[:1] if layer == "fc8" else TOWERS
        self.sends, self.receives = 1 - tower in readers, tower in readers
        self.ranks, self.layer = ranks, layer
        self._forward: AsyncHandle | None = None
        self._backward: AsyncHandle | None = None
        self._own_gradient: Tensor | None = None

    def start(self, own: Tensor) -> Tensor:
        """Starts to send this tower's activations. Returns the buffer for the other tower's, which is empty if this
        tower receives none."""
        self.ranks.mark(f"exchanging activations before {self.layer}")
        self._own_like = (own.shape, own.dtype, own.device)
        received = torch.empty_like(own, memory_format=torch.contiguous_format) if self.receives else own.new_empty(0)
        self._forward = self.ranks.start_swap(own if self.sends else None, received if self.receives else None, "maps")
        return received

    def wait(self) -> None:
        """Waits until the other tower's activations are here and this tower's are sent."""
        self._wait(self._forward)
        self._forward = None

    def start_backward(self, gradient: Tensor | None) -> None:
        """Starts to send the gradient of the received activations (None if there were none) and to receive that of the
        sent ones."""
        self.ranks.mark(f"exchanging gradients before {self.layer}")
        shape, dtype, device = self._own_like
        self._own_gradient = torch.empty(shape, dtype=dtype, device=device) if self.sends else None
        self._backward = self.ranks.start_swap(gradient, self._own_gradient, "gradients")

    def wait_backward(self) -> Tensor | None:
        """The gradient of this tower's activations that comes from the other tower; None if none were sent."""
        if self._backward is None:  # this tower received no activations, so `_WaitForActivations` never ran
            self.start_backward(None)
        self._wait(self._forward)  # pending if this tower only sent
        self._wait(self._backward)
        return self._own_gradient

    def _wait(self, handle: AsyncHandle | None) -> None:
        if handle is not None:
            with self.ranks.spans.span("exchange"):
                handle.wait()


class _SendActivations(torch.autograd.Function):
    """Forward: starts the transfer; returns the receive buffer, which is filled later. Backward: waits for the gradient
    from the other tower.

    Two autograd functions make one exchange, because the forward and the backward transfer each have a start and a
    wait. This one starts the forward transfer and waits for the backward one; `_WaitForActivations` does the opposite.
    Whatever autograd runs between the two overlaps with the transfer.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, crossing: _Crossing) -> Tensor:
        ctx.crossing = crossing
        return crossing.start(own)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.crossing.wait_backward(), None


class _WaitForActivations(torch.autograd.Function):
    """Forward: waits for the other tower's activations. Backward: starts to send their gradient.

    A layer calls it after the products with its own activations. Among the nodes that are ready, autograd runs those
    first that were created last. So in the backward pass the gradient of the other tower's activations is computed and
    sent first, and the gradients of this tower's own activations and weights are computed while it is pending.
    """

    @staticmethod
    def forward(ctx: Any, received: Tensor, crossing: _Crossing) -> Tensor:
        ctx.crossing = crossing
        crossing.wait()
        return received.detach()  # autograd treats a returned input as a special case; this is a new tensor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.crossing.start_backward(grads[0])
        return grads[0], None  # keeps the graph connected: `_SendActivations.backward` ignores the value


class TowerExchange:
    """What a network on several ranks needs of the others: the `Exchange` of `AlexNet.forward`, and gradient sums.

    Args:
        ranks: this rank among the others.
        model: the network whose gradients are summed if the batch has parts.

    Attributes:
        ranks: as given.
    """

    def __init__(self, ranks: Ranks = SINGLE_RANK, model: nn.Module | None = None) -> None:
        self.ranks = ranks
        self._sums = GradientSums(ranks, model) if model is not None and ranks.place.data_ranks > 1 else None

    def __call__(self, own: Tensor, layer: str) -> Tensor | PendingActivations:
        """Starts the exchange before `layer`.

        Args:
            own: activations of this rank's tower or towers, (N, T*C, ...).
            layer: name of the layer that reads both towers.

        Returns:
            `own` if this rank holds both towers, otherwise the pending activations of both. On tower 1 before fc8 an
            empty tensor; backward from it brings the gradient of `own`.
        """
        ranks = self.ranks
        if not ranks.place.is_pair:
            return own
        crossing = _Crossing(ranks, layer)
        received: Tensor = _SendActivations.apply(own, crossing)  # type: ignore[no-untyped-call]
        if crossing.receives:
            (tower,) = ranks.place.towers

            def wait_other() -> Tensor:
                waited: Tensor = _WaitForActivations.apply(received, crossing)  # type: ignore[no-untyped-call]
                return waited

            return PendingActivations(own, tower, wait_other)
        if not own.requires_grad:  # no backward pass will wait for the send
            crossing.wait()
        return received

    def finish_gradients(self) -> None:
        """Waits until every gradient is that of the global batch."""
        if self._sums is not None:
            self._sums.finish()


NO_EXCHANGE = TowerExchange()  # of a single rank, which holds both towers and all rows
