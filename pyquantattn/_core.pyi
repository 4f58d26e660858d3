"""Types of the extension module. Tensor arguments are checked in C++, which names the argument and the rule."""

from torch import Tensor

class UnsupportedError(RuntimeError): ...

class CacheHandle:
    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
        layout: str,
        k_offset: Tensor | None,
        /,
    ) -> None: ...
    @property
    def kv_format(self) -> str: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...

def decode_attention(
    cache: CacheHandle,
    q: Tensor,
    out: Tensor,
    lse: Tensor | None,
    seq_lens: Tensor,
    page_table: Tensor | None,
    seq_starts: Tensor | None,
    sm_scale: float | None,
    alibi_slopes: Tensor | None,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    sinks: Tensor | None,
    num_splits: int | None,
    batch_invariant: bool,
    /,
) -> None: ...
def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seq_starts: Tensor | None,
    causal: bool,
    sm_scale: float | None,
    alibi_slopes: Tensor | None,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    sinks: Tensor | None,
    /,
) -> None: ...
def hybrid_attention(
    cache: CacheHandle,
    q: Tensor,
    out: Tensor,
    lse: Tensor | None,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None,
    seq_starts: Tensor | None,
    causal: bool,
    sm_scale: float | None,
    alibi_slopes: Tensor | None,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    sinks: Tensor | None,
    num_splits: int | None,
    batch_invariant: bool,
    /,
) -> None: ...
def append_kv(cache: CacheHandle, k: Tensor, v: Tensor, slot_mapping: Tensor, /) -> None: ...
def quantize_kv(values: Tensor, codes: Tensor, scale: Tensor | None, offset: Tensor | None, /) -> None: ...
def dequantize_kv(codes: Tensor, scale: Tensor | None, offset: Tensor | None, values: Tensor, /) -> None: ...
def merge_states(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    out: Tensor,
    lse: Tensor,
    /,
) -> None: ...
def get_alibi_slopes(num_heads: int, /) -> list[float]: ...
def version() -> str: ...
def kv_formats() -> list[tuple[str, str, int, bool]]: ...
def kv_pairs() -> list[tuple[str, str, str]]: ...
def backends() -> list[tuple[str, str, int, str]]: ...
def decode_kernels() -> list[tuple[str, str, str, int, int, int, bool]]: ...
def prefill_kernels() -> list[tuple[str, str, str, int, int, int, bool]]: ...
def supports_decode(device: str, kv_format: str, head_dim: int, num_q_tokens: int, /) -> bool: ...
def supports_prefill(device: str, dtype: str, head_dim: int, /) -> bool: ...
def supports_hybrid(device: str, kv_format: str, head_dim: int, /) -> bool: ...
def get_num_threads() -> int: ...
def set_num_threads(num_threads: int, /) -> None: ...
def set_forced_kernel(variant: str, /) -> None: ...
def forced_kernel() -> str: ...
def last_kernel() -> tuple[str, str, int, int, str] | None: ...
def set_exchange_api_enabled(enabled: bool, /) -> None: ...
def uses_exchange_api(tensor: Tensor, /) -> bool: ...
def advise_huge_pages(address: int, num_bytes: int, /) -> None: ...
