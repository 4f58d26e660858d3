"""The tensors that an attention call writes."""

import torch
from torch import Tensor

from pyquantattn.inference_only import refuse_gradients


def make_outputs(who: str, q: Tensor, out: Tensor | None, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The output, given or new, and the log-sum-exp, where it is wanted, for queries ``[..., Hq, D]``.

    Raises:
        ValueError: ``q`` is no dense tensor, ``return_lse`` no bool, or ``q`` or ``out`` needs gradients.

    >>> out, lse = make_outputs("example", torch.zeros(2, 4, 64), None, True)
    >>> out.shape, lse.shape
    (torch.Size([2, 4, 64]), torch.Size([2, 4]))
    """
    if not isinstance(q, Tensor):
        raise ValueError(f"{who}: q must be a torch.Tensor, got {type(q).__name__}")
    if q.layout is not torch.strided or q.is_nested:
        raise ValueError(f"{who}: q must be a dense tensor, got layout {q.layout}")
    if not isinstance(return_lse, bool):
        raise ValueError(f"{who}: return_lse must be True or False, got {return_lse!r}")
    if torch.is_grad_enabled() and (q.requires_grad or out is not None):
        refuse_gradients(who, q=q, out=out)
    if out is None:  # a keyword costs more than the question whether it is needed
        out = torch.empty_like(q) if q.is_contiguous() else torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device) if return_lse else None
    return out, lse
