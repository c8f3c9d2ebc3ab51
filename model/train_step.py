"""One training step: forward pass, loss, backward pass, optimizer. Nothing in it makes the host wait for the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.alexnet import AlexNet
from model.batch import Batch
from model.dropout import DropoutDraws
from model.optim import Momentum2012
from model.parallel.exchange import NO_EXCHANGE, TowerExchange
from model.precision import autocast


def train_step(
    model: AlexNet,
    optimizer: Momentum2012,
    batch: Batch,
    draws: DropoutDraws,
    precision: str = "float32",
    towers: TowerExchange = NO_EXCHANGE,
) -> tuple[Tensor, Tensor]:
    """One optimizer step.

    Args:
        model: the network, or the towers of this rank.
        optimizer: of the same parameters.
        batch: this rank's rows.
        draws: dropout masks of this step.
        precision: one of `model.recipe.PRECISIONS`.
        towers: communication with the other ranks.

    Returns:
        Mean loss, and share of right first guesses, of this rank's rows. They are tensors on the device, so the host
        does not wait. Both are 0 on a rank without tower 0, which has no logits.
    """
    model.train()
    with autocast(batch.images.device, precision, fixed_shapes=True):
        logits = model(batch.images, draws, towers)
    optimizer.zero_grad()
    if 0 in model.towers:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, batch.labels)
        share = loss / towers.ranks.place.data_ranks  # the parts' gradients are summed, and must give the batch's mean
        share.backward()  # type: ignore[no-untyped-call]
        correct = (logits.detach().argmax(dim=1) == batch.labels).float().mean()
    else:
        # The result is the empty tensor of the exchange before fc8. Backward from it receives the gradient of this
        # tower's activations from tower 0.
        logits.backward(torch.zeros_like(logits))  # type: ignore[no-untyped-call]
        loss = correct = torch.zeros((), device=batch.images.device)
    towers.finish_gradients()
    with towers.ranks.spans.span("optimizer"):
        optimizer.step()
    return loss.detach(), correct
