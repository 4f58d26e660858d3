"""Joining partial attention results."""

import torch
from torch import Tensor

from pyquantattn import _core, ops
from pyquantattn.inference_only import refuse_gradients


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Joins the attention over two disjoint sets of keys by their log-sum-exp (Liu et al., arXiv:2310.01889).

    Args:
        out_a, out_b: partial outputs, ``[B, H, D]`` or ``[B, n, H, D]``, float32, float16 or bfloat16.
        lse_a, lse_b: their natural-log log-sum-exp, float32, of the same shape without D; -inf where a part saw no key.

    Returns:
        The output and the log-sum-exp over both sets. With sinks, give them to one of the two parts only.

    Raises:
        ValueError: an argument breaks one of these rules.

    >>> nothing, something = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    >>> merge_states(nothing, torch.full((1, 1), -torch.inf), something, torch.zeros(1, 1))
    (tensor([[[1., 1., 1., 1.]]]), tensor([[0.]]))
    """
    for name, tensor in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"merge_states: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    refuse_gradients("merge_states", out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    lse_a, lse_b = lse_a.contiguous(), lse_b.contiguous()
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=lse_a.dtype, device=lse_a.device)
    if torch.compiler.is_compiling():
        ops.merge_states(out_a, lse_a, out_b, lse_b, out, lse)
    else:
        _core.merge_states(out_a, lse_a, out_b, lse_b, out, lse)
    return out, lse
