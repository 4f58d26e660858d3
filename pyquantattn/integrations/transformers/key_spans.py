"""Attention masks as the kernels take them: a first visible key for each sequence, and a window."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from pyquantattn.integrations.transformers.stand_in import StandInTensor

# Query rows of a mask that are compared at once, which bounds the memory of the comparison.
_ROWS_PER_STEP = 512


class KeySpans(StandInTensor):
    """A boolean mask ``[B, 1, n, size]`` (True: visible) that is causal, with a first visible key for each sequence.

    Attention functions of this package read the attributes. Any other operation gets the boolean tensor.

    Attributes:
        starts: int32 ``[B]``, position of the first visible key.
        q_start: int64 ``[]``, position of the first query token.
        k_start: int64 ``[]``, position of the first column.
        window: keys that a query token sees, itself included; 0: all.
    """

    starts: Tensor
    q_start: Tensor
    k_start: Tensor
    window: int

    @staticmethod
    def __new__(
        cls, starts: Tensor, q_start: Tensor, k_start: Tensor, num_queries: int, size: int, window: int
    ) -> "KeySpans":
        shape = (starts.shape[0], 1, num_queries, size)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=starts.device)

    def __init__(
        self, starts: Tensor, q_start: Tensor, k_start: Tensor, num_queries: int, size: int, window: int
    ) -> None:
        self.starts, self.q_start, self.k_start, self.window = starts, q_start, k_start, window
        self._dense: Tensor | None = None

    def rows(self, begin: int, end: int) -> Tensor:
        """The boolean mask ``[B, end - begin, size]`` of some query tokens."""
        queries = (self.q_start + torch.arange(begin, end, device=self.starts.device))[None, :, None]
        keys = (self.k_start + torch.arange(self.shape[3], device=self.starts.device))[None, None]
        visible = (keys >= self.starts[:, None, None]) & (keys <= queries)
        return visible & (queries - keys < self.window) if self.window else visible

    def dense(self) -> Tensor:
        """The boolean mask, made once."""
        if torch.compiler.is_compiling():
            return self.rows(0, self.shape[2])[:, None]
        if self._dense is None:
            self._dense = self.rows(0, self.shape[2])[:, None]
        return self._dense

    def materialize(self) -> Tensor:
        return self.dense().contiguous()

    def equals(self, dense: Tensor) -> bool:
        """Whether ``dense`` ``[B, 1, n, size]`` is this mask. Waits for the device once."""
        is_equal = torch.ones((), dtype=torch.bool, device=dense.device)
        for begin in range(0, self.shape[2], _ROWS_PER_STEP):
            end = min(begin + _ROWS_PER_STEP, self.shape[2])
            is_equal &= (dense[:, 0, begin:end] == self.rows(begin, end)).all()
        if not bool(is_equal):
            return False
        self._dense = dense
        return True

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, int, int]]:
        return ["starts", "q_start", "k_start"], (self.shape[2], self.shape[3], self.window)

    @staticmethod
    def __tensor_unflatten__(
        tensors: Mapping[str, Tensor], constants: tuple[int, int, int], outer_size: Any, outer_stride: Any
    ) -> "KeySpans":
        return KeySpans(tensors["starts"], tensors["q_start"], tensors["k_start"], *constants)


def key_span_mask(**arguments: Any) -> Tensor | None:
    """The mask function of the ``"pyquantattn"`` attention: ``sdpa_mask``, as ``KeySpans`` wherever that says the same.

    Which rules made the mask (padding, window, chunks, packing) does not matter: it is compared with the spans that its
    first visible keys suggest. A mask that is no such span stays a boolean tensor.

    Args:
        arguments: as transformers passes them to a mask function.

    Returns:
        None (plainly causal or bidirectional, as ``sdpa_mask`` decides), ``KeySpans``, or a boolean tensor.
    """
    if torch.compiler.is_compiling() or _is_capturing():
        return _spans_without_reading(arguments)
    dense: Tensor | None = sdpa_mask(**arguments)
    if dense is None or dense.shape[1] != 1 or 0 in dense.shape:
        return dense
    q_start, k_start = _positions(arguments, dense.device)
    first_columns = dense[:, 0].any(dim=1).int().argmax(dim=-1)
    starts = (first_columns + k_start).to(torch.int32)
    spans = KeySpans(starts, q_start, k_start, dense.shape[2], dense.shape[3], arguments.get("local_size") or 0)
    return spans if spans.equals(dense) else dense


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _spans_without_reading(arguments: dict[str, Any]) -> Tensor | None:
    """Where values cannot be compared (compiling, or capturing a CUDA graph), a causal mask without padding is known by
    its function."""
    is_plain = arguments.get("mask_function") is causal_mask_function and arguments.get("attention_mask") is None
    if not is_plain or arguments.get("use_vmap"):
        mask: Tensor | None = sdpa_mask(**arguments)
        return mask
    device = arguments.get("device", "cpu")
    q_start, k_start = _positions(arguments, torch.device(device))
    starts = torch.zeros(arguments["batch_size"], dtype=torch.int32, device=device)
    return KeySpans(starts, q_start, k_start, _num_queries(arguments), arguments["kv_length"], 0)


def _num_queries(arguments: dict[str, Any]) -> int:
    # transformers before 5.5 passes the positions of the queries instead of their number and offset.
    return int(arguments["q_length"]) if "q_length" in arguments else int(arguments["cache_position"].shape[0])


def _positions(arguments: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    q_start = arguments["q_offset"] if "q_length" in arguments else arguments["cache_position"][0]
    return _position(q_start, device), _position(arguments.get("kv_offset", 0), device)


def _position(position: Tensor | int, device: torch.device) -> Tensor:
    if isinstance(position, Tensor):
        # A copy: a static cache counts on in place, and the mask must not follow.
        return position.to(device=device, dtype=torch.int64, copy=True)
    return torch.full((), position, dtype=torch.int64, device=device)
