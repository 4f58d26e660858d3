"""What every attention call does before it reaches the kernels: its outputs, and the checks that need no extension."""

import torch
from torch import Tensor

from pyquantattn.inference_only import refuse_gradients
from pyquantattn.kv_cache import KVCache


def require_cache(who: str, cache: object) -> None:
    """Raises ValueError unless ``cache`` is a ``KVCache``."""
    if not isinstance(cache, KVCache):
        raise ValueError(f"{who}: cache must be a KVCache, got {type(cache).__name__}")


def make_outputs(
    who: str, q: Tensor, out: Tensor | None, return_lse: bool, **inputs: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The output, given or new, and the log-sum-exp, where it is wanted, for queries ``[..., Hq, D]``.

    Raises:
        ValueError: ``q`` is no dense tensor, ``return_lse`` no bool, or q, out or one of ``inputs`` needs gradients.

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
    if torch.is_grad_enabled():
        refuse_gradients(who, q=q, out=out, **inputs)
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device) if return_lse else None
    return out, lse
