"""The guard that all operations share: they compute no gradients."""

import torch
from torch import Tensor


def refuse_gradients(who: str, **tensors: Tensor | None) -> None:
    """Raises where autograd would expect a gradient that the kernels do not give.

    Raises:
        ValueError: gradients are being recorded and a tensor requires one.

    >>> refuse_gradients("example", x=torch.zeros(1))
    """
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(
                f"{who}: {name} must not require a gradient, since this is inference only, got requires_grad=True; "
                "call under torch.no_grad() or pass a detached tensor"
            )
