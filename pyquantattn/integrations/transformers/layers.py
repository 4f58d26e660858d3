"""Cache layers that store codes: one that grows, and one of fixed size for compiled decoding."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from pyquantattn.formats import kv_pair
from pyquantattn.integrations.transformers.key_check import KeyCheck
from pyquantattn.integrations.transformers.layer_formats import prompt_offset, static_scale
from pyquantattn.integrations.transformers.quantized_kv import QuantizedKV
from pyquantattn.integrations.transformers.step_tensors import StepTensors
from pyquantattn.integrations.transformers.storage import RING_PAGE_SIZE, LayerStorage, check_kernel

# A growing layer adds an eighth of its tokens, at least this many: little unused memory, and each byte is copied
# about nine times in all, against one read of every byte for each token that is made.
_MIN_GROWTH = 64


@dataclass(frozen=True)
class LayerOptions:
    """How one layer stores K and V.

    Attributes:
        name: for messages.
        kv_format: a format or pair.
        window: keys that a query token sees, itself included; 0: all.
        granularity: what one scale covers: ``"token"`` (of one head), ``"head"`` or ``"tensor"``.
        k_scale, v_scale: given static scales; None: dynamic, or taken from the first tokens.
        k_offset: given key offset; ``"prompt"``: taken from the first tokens; None: nothing.
        reads_fresh_prompt: attention over the first tokens reads them as the model made them.
        key_check: looks at the first keys; None: they are not looked at.
    """

    name: str
    kv_format: str
    window: int = 0
    granularity: str = "token"
    k_scale: Tensor | float | None = None
    v_scale: Tensor | float | None = None
    k_offset: Tensor | str | None = None
    reads_fresh_prompt: bool = True
    key_check: KeyCheck | None = None


class CodedLayer(CacheLayerMixin):
    """What both kinds of layer share: storage and its hand-over."""

    def __init__(self, options: LayerOptions) -> None:
        super().__init__()
        self.options = options
        self.is_sliding = options.window > 0
        # Scales and offsets that are taken from data need data.
        has_scales = options.granularity == "token" or options.k_scale is not None
        self.supports_early_init = has_scales and not isinstance(options.k_offset, str)
        self.storage: LayerStorage

    @abstractmethod
    def first_capacity(self, num_tokens: int) -> int:
        """Tokens of each sequence to make room for, when the first update brings ``num_tokens``."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the storage. Sizes come from the tensors, so that a tensor-parallel rank has its own heads."""
        options = self.options
        batch_size, num_heads, num_tokens, head_dim = key_states.shape
        check_kernel(options.kv_format, num_heads, key_states, value_states, options.name)
        self.dtype, self.device = key_states.dtype, key_states.device
        pair = kv_pair(options.kv_format, "QuantizedCache")
        k_scale, v_scale = options.k_scale, options.v_scale
        k_offset = prompt_offset(key_states) if isinstance(options.k_offset, str) else options.k_offset
        if options.granularity != "token":
            if k_scale is None and pair.k.has_scale:
                stored = key_states if k_offset is None else key_states - k_offset[:, None]
                k_scale = static_scale(stored, pair.k, options.granularity)
            if v_scale is None and pair.v.has_scale:
                v_scale = static_scale(value_states, pair.v, options.granularity)
        self.storage = LayerStorage(
            batch_size, self.first_capacity(num_tokens), num_heads, head_dim, options.kv_format, self.device,
            self.is_sliding, k_scale if pair.k.has_scale else None, v_scale if pair.v.has_scale else None, k_offset,
        )  # fmt: skip
        self.is_initialized = True

    def _look_at(self, first_keys: Tensor) -> None:
        if self.options.key_check is not None:
            self.options.key_check.look(self.options.name, first_keys)

    @property
    def batch_size(self) -> int:
        return self.storage.batch_size

    @property
    def max_batch_size(self) -> int:  # its name before transformers 5.13
        return self.storage.batch_size

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, unused room included."""
        return self.storage.nbytes if self.is_initialized else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._choose(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._choose(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._choose(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        self._choose(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._choose(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _choose(self, choose: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.storage.apply_to_sequences(choose)

    def _handles(
        self, seq_lens: Tensor, page_table: Tensor | None, fresh: tuple[Tensor, Tensor] | None, first: int, size: int
    ) -> tuple[Tensor, Tensor]:
        cache = self.storage.cache
        k, v = fresh if fresh is not None else (None, None)
        window = self.options.window
        geometry = (cache.layout, self.storage.capacity, first, size, window, self.dtype)
        keys = QuantizedKV(cache.k, cache.k_scale, cache.k_offset, seq_lens, page_table, k, *geometry)
        values = QuantizedKV(cache.v, cache.v_scale, None, seq_lens, page_table, v, *geometry)
        if not torch.compiler.is_compiling():
            keys.cache = values.cache = cache
        return keys, values


class GrowingLayer(CodedLayer):
    """A layer without a maximum length; a sliding one keeps its window and what the latest step needs."""

    is_compileable = False
    is_croppable = True

    def __init__(self, options: LayerOptions, steps: StepTensors) -> None:
        super().__init__(options)
        self.steps = steps
        self.length = 0
        self.oldest = 0  # position of the oldest token that the storage still holds

    def first_capacity(self, num_tokens: int) -> int:
        if not self.is_sliding:
            return max(num_tokens, 1)
        is_read_fresh = self.options.reads_fresh_prompt
        return _ring_capacity(self.options.window, 0 if is_read_fresh else num_tokens)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Encodes the new tokens; returns quantised K and V, or for a fresh prompt the tensors that came."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_tokens = key_states.shape[2]
        if self.length == 0:
            self._look_at(key_states)
        is_read_fresh = self.length == 0 and self.options.reads_fresh_prompt
        if not is_read_fresh or not self.is_sliding:
            self._make_room(num_tokens)
        self._append(key_states, value_states)
        if is_read_fresh:
            return key_states, value_states
        size = self._num_visible(num_tokens)
        seq_lens = self.steps.seq_lens(self.batch_size, self.length, self.device)
        page_table = self.storage.page_table(self.length)
        return self._handles(seq_lens, page_table, None, self.length - size, size)

    def _make_room(self, num_tokens: int) -> None:
        capacity = self.storage.capacity
        if self.is_sliding:
            needed = _ring_capacity(self.options.window, num_tokens)
            if needed > capacity:
                held = self.length - self.oldest
                self.storage = self.storage.resized(needed, self.oldest, held)
        elif self.length + num_tokens > capacity:
            growth = max(_MIN_GROWTH, capacity // 8)
            self.storage = self.storage.resized(max(self.length + num_tokens, capacity + growth), 0, self.length)

    def _append(self, k: Tensor, v: Tensor) -> None:
        num_tokens, capacity = k.shape[2], self.storage.capacity
        if num_tokens > capacity:  # of a long prompt a ring keeps its end
            k, v = k[:, :, -capacity:], v[:, :, -capacity:]
        kept = min(num_tokens, capacity)
        slots = self.steps.slot_mapping(self.batch_size, capacity, self.length + num_tokens - kept, kept, self.device)
        self.storage.write(k, v, slots)
        self.length += num_tokens
        self.oldest = max(self.oldest, self.length - self.storage.capacity)

    def _num_visible(self, num_tokens: int) -> int:
        return min(self.length, self.options.window - 1 + num_tokens) if self.is_sliding else self.length

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """K and V that the layer still needs, as numbers ``[B, H, size, D]``."""
        size = self._num_visible(1)
        return self.storage.dequantize(self.length - size, size, self.dtype)

    @property
    def nbytes_in_use(self) -> int:
        """Bytes of codes and scales of the tokens that are held, and of what all tokens share."""
        if not self.is_initialized:
            return 0
        held, shared = self.length - self.oldest, self.storage.shared_nbytes
        return shared + round((self.nbytes - shared) * held / self.storage.capacity)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Columns of the mask of the next step, and the position of the first one."""
        # Before transformers 5.5 the argument is the positions of the query tokens.
        num_tokens = query_length if isinstance(query_length, int) else query_length.shape[0]
        total = self.length + num_tokens
        size = min(total, self.options.window - 1 + num_tokens) if self.is_sliding else total
        return size, total - size

    def get_max_length(self) -> int:
        return self.options.window if self.is_sliding else -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.13

    def reset(self) -> None:
        self.length = self.oldest = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the latest tokens: a negative number of them, or (transformers before 5.20) the length to keep."""
        length = self.length + tokens_to_remove if tokens_to_remove <= 0 else min(self.length, tokens_to_remove)
        length = max(length, 0)
        is_whole = not self.is_sliding or max(length - self.options.window + 1, 0) >= self.oldest
        if not is_whole:
            raise ValueError(
                f"QuantizedCache: crop of {self.options.name} must leave a window of {self.options.window} tokens that "
                f"are still held (positions {self.oldest} on), got a length of {length}"
            )
        self.length = length


class StaticLayer(CodedLayer):
    """A layer of fixed size whose tensors never move: for compiled decoding and CUDA graphs.

    The number of tokens lives on the device. Every sequence has the same length.
    """

    is_compileable = True
    is_croppable = False

    def __init__(self, options: LayerOptions, max_cache_len: int, max_step_tokens: int) -> None:
        super().__init__(options)
        self.max_cache_len = max_cache_len
        self.max_step_tokens = max_step_tokens
        self.is_empty = True
        self.seq_lens: Tensor
        self.first_slots: Tensor  # int64 [B, 1], where the storage of each sequence begins

    def first_capacity(self, num_tokens: int) -> int:
        if not self.is_sliding:
            return self.max_cache_len
        whole = -(-self.max_cache_len // RING_PAGE_SIZE) * RING_PAGE_SIZE
        return min(_ring_capacity(self.options.window, self.max_step_tokens), whole)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.seq_lens = torch.zeros(self.batch_size, dtype=torch.int32, device=self.device)
        self.first_slots = torch.arange(self.batch_size, device=self.device)[:, None] * self.storage.capacity
        self.page_table = self.storage.page_table(self.max_cache_len)
        if not torch.compiler.is_compiling():
            cache = self.storage.cache
            scales = (cache.k_scale, cache.v_scale, cache.k_offset)
            tensors = (cache.k, cache.v, *scales, self.seq_lens, self.first_slots, self.page_table)
            for tensor in tensors:
                if tensor is not None:
                    torch._dynamo.mark_static_address(tensor)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Encodes the new tokens and returns quantised K and V of the whole capacity."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.is_empty:
            self._look_at(key_states)
        is_read_fresh = self.is_empty and self.options.reads_fresh_prompt
        self._require_room(key_states.shape[2], is_read_fresh)
        self._append(key_states, value_states)
        self.is_empty = False
        fresh = (key_states, value_states) if is_read_fresh else None
        return self._handles(self.seq_lens, self.page_table, fresh, 0, self.max_cache_len)

    def _require_room(self, num_tokens: int, is_read_fresh: bool) -> None:
        if num_tokens > self.max_cache_len:
            raise ValueError(f"QuantizedCache: max_cache_len must be at least {num_tokens}, got {self.max_cache_len}")
        is_bounded = self.is_sliding and not is_read_fresh and self.storage.capacity < self.max_cache_len
        if is_bounded and num_tokens > self.max_step_tokens:
            raise ValueError(
                f"QuantizedCache: a step over sliding {self.options.name} must bring at most "
                f"max_step_tokens={self.max_step_tokens} new tokens, got {num_tokens}"
            )

    def _append(self, k: Tensor, v: Tensor) -> None:
        num_tokens, capacity = k.shape[2], self.storage.capacity
        kept = min(num_tokens, capacity)
        positions = self.seq_lens[:, None]
        if num_tokens > 1:  # a decoding step launches as few kernels as possible
            positions = positions + torch.arange(num_tokens - kept, num_tokens, device=self.device)
        slots = (self.first_slots + positions % capacity).flatten()
        self.storage.write(k[:, :, num_tokens - kept :], v[:, :, num_tokens - kept :], slots)
        self.seq_lens.add_(num_tokens)

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """K and V of the whole capacity, as numbers ``[B, H, max_cache_len, D]``; unused slots are 0."""
        return self.storage.dequantize(0, self.max_cache_len, self.dtype)

    @property
    def nbytes_in_use(self) -> int:
        return self.nbytes

    def get_seq_length(self) -> int | Tensor:
        return self.seq_lens[0] if self.is_initialized and self.batch_size > 0 else 0

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    get_max_cache_shape = get_max_length  # its name before transformers 5.13

    def reset(self) -> None:
        self.is_empty = True
        if self.is_initialized:
            self.seq_lens.zero_()


def _ring_capacity(window: int, num_tokens: int) -> int:
    """Whole pages that hold the window of every token of a step."""
    needed = window - 1 + max(num_tokens, RING_PAGE_SIZE)
    return -(-needed // RING_PAGE_SIZE) * RING_PAGE_SIZE
