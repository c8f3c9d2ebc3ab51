"""The precision of products (convolutions and matrix products): the only place that sets torch's switches for it.

    float32     IEEE products on every device
    tf32        float32 tensors, products on CUDA's tensor cores: 8 bits of exponent, 10 of mantissa
    bfloat16    bfloat16 activations and products; weights and their gradients stay float32, and LRN (local response
                normalisation) and the loss are computed in float32

torch's own defaults mix the first two: TF32 in convolutions, IEEE in matrix products.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

Products = Literal["ieee", "tf32"]


def set_products(products: Products, fixed_shapes: bool) -> None:
    """Sets torch's switches for products of float32 tensors on CUDA.

    torch has an older and a newer interface, and each raises an error when it reads what the other one set. So both are
    set, the newer one last.

    Args:
        products: for convolutions and for matrix products.
        fixed_shapes: whether the same shapes come again and again. cuDNN then measures its algorithms for each shape
            and keeps the fastest.
    """
    tf32 = products == "tf32"
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    switches: tuple[Any, ...] = (cudnn.conv, cudnn.rnn, matmul)  # type: ignore[attr-defined]  # torch's types lack them
    for switch in switches:
        switch.fp32_precision = products
    cudnn.benchmark = fixed_shapes


def autocast(device: torch.device, precision: str, fixed_shapes: bool = False) -> AbstractContextManager[Any]:
    """Sets torch's switches for `precision`, and returns the context to compute a forward pass in.

    The switches also hold for the backward pass, which must run outside the context. They change nothing on the CPU.

    Args:
        device: where products are computed.
        precision: one of `model.recipe.PRECISIONS`.
        fixed_shapes: as for `set_products`.
    """
    if device.type == "cuda":
        set_products("tf32" if precision == "tf32" else "ieee", fixed_shapes)
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


def prepare(model: nn.Module, device: str, precision: str) -> None:
    """Arranges the weights in memory as the products need them; call it before the optimizer is made.

    Tensor cores read activations with the channels last, and cuDNN would otherwise rearrange every tensor in every
    step. Weights with this layout are enough: convolutions then give activations in it.
    """
    if device == "cuda" and precision != "float32":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
