"""What crosses between ranks in one training step: maps between towers, halves of images, sums of gradients.

Before conv3, fc6, fc7 and fc8 each tower sends its maps to the other (layer.cu:78-108), and in the backward pass the
gradient of what it got goes back to its owner, who adds it (layer.cu:170-255). Everything starts as soon as it is
there and is waited for as late as the graph allows. Before conv3, where three quarters of the bytes cross:

    forward    send maps | responses to the own maps | wait, responses to the other's maps
    backward   gradient of the other's maps, send it | gradients of own maps and of weights | wait, add what came back

Halves of images cross during the step before. A gradient's sum over the parts of the batch starts when backward has
made it, and the update waits for it.

fc8 lives on tower 0 alone (layers-145.cfg), so only there are logits and a loss; logits never cross.
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
from model.shapes import TOWERS, NetSpec, layer_table


def crossing_numbers(spec: NetSpec, recipe: Recipe = SOURCE2012) -> tuple[int, int]:
    """Numbers for one image that towers 0 and 1 send in the forward pass; in the backward pass each sends as many as it
    got. Width 1: 28,288 and 30,336, since fc7's units go to fc8's tower only."""
    sent = [0, 0]
    for shape in layer_table(spec, recipe):
        for tower in TOWERS:
            if shape.reads_both and 1 - tower in shape.towers:
                sent[tower] += shape.in_maps // len(TOWERS) * shape.in_side**2
    return sent[0], sent[1]


def step_bytes(place: Place, spec: NetSpec, recipe: Recipe, batch: int, precision: str = "float32") -> dict[str, int]:
    """The bytes that the rank at `place` sends in a step on a global batch of `batch`; `Ranks.sent` counts them.

    `maps` forward, `gradients` back, `images` (and labels) of the half that it decoded, `sums` over the data parts.
    """
    found: dict[str, int] = {}
    rows = batch // place.data_ranks
    if place.is_pair:
        (tower,) = place.towers
        numbers = crossing_numbers(spec, recipe)
        width = 4 if precision == "float32" else 2
        found["maps"], found["gradients"] = (rows * numbers[t] * width for t in (tower, 1 - tower))
        found["images"] = batch // place.world * (3 * 224 * 224 * 4 + 8)
    if place.data_ranks > 1:
        held = [s for s in layer_table(spec, recipe) for tower in s.towers if tower in place.towers]
        found["sums"] = 4 * sum((s.weights + s.biases) // len(s.towers) for s in held)
    return found


class _Crossing:
    """One exchange of one step: this tower's maps out, the other's in, and their gradients the other way."""

    def __init__(self, ranks: Ranks, name: str) -> None:
        (tower,) = ranks.place.towers
        readers = TOWERS[:1] if name == "fc8" else TOWERS
        self.sends, self.receives = 1 - tower in readers, tower in readers
        self.ranks, self.name = ranks, name
        self._flight: AsyncHandle | None = None
        self._back: AsyncHandle | None = None
        self._returned: Tensor | None = None

    def start(self, maps: Tensor) -> Tensor:
        """Sends; gives the room where the other's maps will be, empty where none come."""
        self.ranks.mark(f"the exchange before {self.name}")
        self._maps = (maps.shape, maps.dtype, maps.device)
        room = torch.empty_like(maps, memory_format=torch.contiguous_format) if self.receives else maps.new_empty(0)
        self._flight = self.ranks.swap(maps if self.sends else None, room if self.receives else None, "maps")
        return room

    def land(self) -> None:
        """Waits for the other's maps, and until this tower's have gone."""
        self._wait(self._flight)
        self._flight = None

    def start_back(self, gradient: Tensor | None) -> None:
        """Sends the gradient of the other's maps, None where none had come, and makes room for that of this tower's."""
        self.ranks.mark(f"the exchange back before {self.name}")
        shape, dtype, device = self._maps
        self._returned = torch.empty(shape, dtype=dtype, device=device) if self.sends else None
        self._back = self.ranks.swap(gradient, self._returned, "gradients")

    def land_back(self) -> Tensor | None:
        """The gradient that this tower's maps got from the other, None where they did not go there."""
        if self._back is None:  # nothing had come, so nothing was sent back
            self.start_back(None)
        self._wait(self._flight)  # of maps that went one way
        self._wait(self._back)
        return self._returned

    def _wait(self, flight: AsyncHandle | None) -> None:
        if flight is not None:
            with self.ranks.spans.span("exchange"):
                flight.wait()


class _Depart(torch.autograd.Function):
    """This tower's maps in; the room for the other's out, which `_Arrive` fills."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, crossing: _Crossing) -> Tensor:
        ctx.crossing = crossing
        return crossing.start(maps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.crossing.land_back(), None


class _Arrive(torch.autograd.Function):
    """Where a layer makes it after the responses to its own maps, their gradient is worked out while that of the
    other's is under way: autograd goes first through what was made last."""

    @staticmethod
    def forward(ctx: Any, room: Tensor, crossing: _Crossing) -> Tensor:
        ctx.crossing = crossing
        crossing.land()
        return room.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.crossing.start_back(grads[0])
        return grads[0], None


class TowerExchange:
    """What a network on `ranks` needs of the others: the `Exchange` of `AlexNet.forward`, and the sums of gradients."""

    def __init__(self, ranks: Ranks = SINGLE_RANK, model: nn.Module | None = None) -> None:
        self.ranks = ranks
        self._sums = GradientSums(ranks, model) if model is not None and ranks.place.data_ranks > 1 else None

    def __call__(self, maps: Tensor, name: str) -> Tensor | PendingActivations:
        """Both towers' maps; on tower 1 before fc8 an empty tensor, whose gradient brings back that of `maps`."""
        ranks = self.ranks
        if not ranks.place.is_pair:
            return maps
        crossing = _Crossing(ranks, name)
        room: Tensor = _Depart.apply(maps, crossing)  # type: ignore[no-untyped-call]
        if crossing.receives:
            (tower,) = ranks.place.towers
            return PendingActivations(maps, tower, lambda: _Arrive.apply(room, crossing))  # type: ignore[no-untyped-call]
        if not maps.requires_grad:
            crossing.land()
        return room

    def finish_gradients(self) -> None:
        """Waits until every gradient is the whole batch's."""
        if self._sums is not None:
            self._sums.finish()
