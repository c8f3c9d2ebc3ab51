"""The update rule of 2012, and its rates by layer. Takes named parameters, a recipe and rates; changes the parameters.

v <- momentum * v - rate * gradient - rate * decay * w;  w <- w + v  (P 5; weights.cu:146-197), where the gradient is
the mean over the minibatch. The rate stands inside v, so what v already holds keeps the rate it was made with; the SGD
of torch multiplies all of v by the rate of the day, which is another rule wherever a rate changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from model.recipe import LayerLearningRates, Recipe


class Momentum2012(torch.optim.Optimizer):
    """One group per parameter, called like it ("conv1.weight"), with its `lr` and `weight_decay`.

    Args:
        named_parameters: what `AlexNet.named_parameters` gives; names end in ".weight" or ".bias".
        recipe: momentum and decays.
        rates: the learning rates to start with, by layer.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        recipe: Recipe,
        rates: Mapping[str, LayerLearningRates],
    ) -> None:
        decays = {"weight": recipe.weight_decay, "bias": recipe.bias_decay}
        groups = [
            {"params": [parameter], "name": name, "weight_decay": decays[name.rpartition(".")[2]]}
            for name, parameter in named_parameters
        ]
        super().__init__(groups, {"lr": 0.0, "momentum": recipe.momentum})
        for group in self.param_groups:
            (parameter,) = group["params"]
            self.state[parameter]["velocity"] = torch.zeros_like(parameter)
        set_learning_rates(self, rates)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter from its gradient; those whose rate is 0 stay as they are, with their velocity."""
        for group in self.param_groups:
            rate, (parameter,) = group["lr"], group["params"]
            if rate == 0:
                continue
            assert parameter.grad is not None, f"{group['name']} has a rate but no gradient"
            velocity = self.state[parameter]["velocity"]
            velocity.mul_(group["momentum"]).sub_(parameter.grad, alpha=rate)
            if group["weight_decay"]:
                velocity.sub_(parameter, alpha=rate * group["weight_decay"])
            parameter.add_(velocity)

    def velocities(self) -> dict[str, Tensor]:
        """The velocities themselves (no copies), by the name of their parameter."""
        return {group["name"]: self.state[group["params"][0]]["velocity"] for group in self.param_groups}


def set_learning_rates(optimizer: Momentum2012, rates: Mapping[str, LayerLearningRates]) -> None:
    """Gives every parameter the rate of its layer and kind."""
    for group in optimizer.param_groups:
        layer, _, kind = group["name"].rpartition(".")
        group["lr"] = getattr(rates[layer], kind)
