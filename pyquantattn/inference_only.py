"""The guard that all operations share: they compute no gradients."""

import torch
from torch import Tensor


def refuse_gradients(who: str, **tensors: Tensor | None) -> None:
    """Raises where autograd would expect a gradient that the kernels do not give.

    Raises:
        ValueError: gradients are being recorded and a tensor requires one.

    >>> refuse_gradients("example", x=torch.zeros(1))
    """
    for name, tensor in tensors.items():
        # Most are None, and few need gradients: the cheapest question comes first.
        if tensor is not None and isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{who}: {name} must not require a gradient, since this is inference only, got requires_grad=True; "
                "call under torch.no_grad() or pass a detached tensor"
            )
