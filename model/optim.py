"""Stochastic gradient descent with momentum as in 2012, with a learning rate for each layer.

    v <- momentum * v - lr * gradient - lr * decay * w
    w <- w + v                                              (paper section 5; weights.cu:146-197 of the released source)

The gradient is the mean over the minibatch. The learning rate is inside v, so what v already holds keeps the learning
rate of its own step. `torch.optim.SGD` multiplies all of v by the current learning rate instead; the two rules differ
whenever a learning rate changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from model.recipe import LayerLearningRates, Recipe


class Momentum2012:
    """The optimizer of 2012, with the interface of a `torch.optim.Optimizer` as far as training needs it.

    It is no subclass, because `torch.optim.Optimizer.__init__` imports torch._dynamo. That takes 2 seconds in every
    process, and nothing here is compiled.

    Args:
        named_parameters: `AlexNet.named_parameters()`; names end in ".weight" or ".bias".
        recipe: gives momentum and decays.
        layer_learning_rates: the learning rates to start with, by layer name.

    Attributes:
        param_groups: a group for every parameter, with `params` (the parameter alone), `name` ("conv1.weight"), `lr`,
            `momentum` and `weight_decay`.
        state: for every parameter its `velocity`.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        recipe: Recipe,
        layer_learning_rates: Mapping[str, LayerLearningRates],
    ) -> None:
        decays = {"weight": recipe.weight_decay, "bias": recipe.bias_decay}
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        for name, parameter in named_parameters:
            decay = decays[name.rpartition(".")[2]]
            group = {"params": [parameter], "name": name, "momentum": recipe.momentum, "weight_decay": decay}
            self.param_groups.append(group)
            self.state[parameter] = {"velocity": torch.zeros_like(parameter, requires_grad=False)}
        set_learning_rates(self, layer_learning_rates)

    def zero_grad(self) -> None:
        """Drops all gradients; the backward pass then creates new ones instead of adding to the old ones."""
        for group in self.param_groups:
            group["params"][0].grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Changes every parameter by its gradient. Parameters whose learning rate is 0 keep value and velocity."""
        with record_function("Optimizer.step"):  # as torch's optimizers; `model.step_profile` looks for it
            alike: dict[tuple[float, float, float], list[nn.Parameter]] = {}
            for group in self.param_groups:
                parameter, learning_rate = group["params"][0], group["lr"]
                if learning_rate == 0:
                    continue
                assert parameter.grad is not None, f"{group['name']} has a learning rate but no gradient"
                rule = (learning_rate, group["momentum"], group["weight_decay"])
                if parameter.device.type == "cpu":
                    self._step(parameter, *rule)
                else:
                    alike.setdefault(rule, []).append(parameter)
            for rule, parameters in alike.items():
                fused_step(parameters, [self.state[each]["velocity"] for each in parameters], *rule)

    def _step(self, parameter: nn.Parameter, learning_rate: float, momentum: float, decay: float) -> None:
        assert parameter.grad is not None
        velocity = self.state[parameter]["velocity"]
        velocity.mul_(momentum).sub_(parameter.grad, alpha=learning_rate)
        if decay:
            velocity.sub_(parameter, alpha=learning_rate * decay)
        parameter.add_(velocity)

    def velocities(self) -> dict[str, Tensor]:
        """The velocities by parameter name; the tensors themselves, no copies."""
        return {group["name"]: self.state[group["params"][0]]["velocity"] for group in self.param_groups}


def fused_step(
    parameters: Sequence[nn.Parameter], velocities: list[Tensor], learning_rate: float, momentum: float, decay: float
) -> None:
    """One step of the rule for parameters with the same settings, in one pass over memory.

    torch's fused kernel of `torch.optim.SGD(fused=True)` computes, with its own names lr and dampening:

        v <- momentum * v + (1 - dampening) * (gradient + decay * w)
        w <- w - lr * v

    With dampening 1 + learning_rate and lr -1 this is the rule of 2012, and v keeps its own unit, so nothing is
    rescaled when a learning rate changes. Separate operators would take 11 passes over memory, this kernel 5.
    """
    torch._fused_sgd_(
        list[Tensor](parameters),
        [each.grad for each in parameters],  # type: ignore[misc]
        velocities,
        weight_decay=decay,
        momentum=momentum,
        lr=-1.0,
        dampening=1.0 + learning_rate,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def set_learning_rates(optimizer: Momentum2012, layer_learning_rates: Mapping[str, LayerLearningRates]) -> None:
    """Sets the learning rate of every parameter from those of its layer, by kind ("weight" or "bias")."""
    for group in optimizer.param_groups:
        layer, _, kind = group["name"].rpartition(".")
        group["lr"] = getattr(layer_learning_rates[layer], kind)
