"""llama.cpp's ggml as a contender, through the C interface of a libggml that the user has built.

Needs the shared libraries libggml-base and libggml-cpu (0.9 or newer) in one folder or in its sub-folders: --ggml DIR.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .batch_contenders import BatchData
from .cpu_contenders import StepData, UnavailableError
from .cpu_shapes import DecodeShape
from .cpu_timing import num_copies

F32, F16, Q8_0 = 0, 1, 8  # enum ggml_type
Q8_0_BLOCK = 32  # elements that share a float16 scale
CONTEXT_BYTES = 8 << 20  # tensor and graph headers; no data


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


# name: (library, result, arguments)
_FUNCTIONS = {
    "ggml_init": ("base", c_void_p, (_InitParams,)),
    "ggml_free": ("base", None, (c_void_p,)),
    "ggml_new_tensor_4d": ("base", c_void_p, (c_void_p, c_int, c_int64, c_int64, c_int64, c_int64)),
    "ggml_flash_attn_ext": (
        "base",
        c_void_p,
        (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_float, c_float, c_float),
    ),
    "ggml_new_graph": ("base", c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": ("base", None, (c_void_p, c_void_p)),
    "ggml_nbytes": ("base", c_size_t, (c_void_p,)),
    "ggml_quantize_chunk": ("base", c_size_t, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "ggml_backend_alloc_ctx_tensors": ("base", c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buffer_free": ("base", None, (c_void_p,)),
    "ggml_backend_tensor_set": ("base", None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": ("base", None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": ("base", c_int, (c_void_p, c_void_p)),
    "ggml_backend_free": ("base", None, (c_void_p,)),
    "ggml_backend_cpu_init": ("cpu", c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": ("cpu", None, (c_void_p, c_int)),
}


@cache
def _library(folder: Path) -> dict[str, ctypes._NamedFuncPointer]:
    libraries = {}
    for part in ("base", "cpu"):
        found = sorted(folder.rglob(f"libggml-{part}.so")) + sorted(folder.rglob(f"libggml-{part}.dylib"))
        if not found:
            raise UnavailableError(f"--ggml: {folder} must hold libggml-{part}, got none")
        libraries[part] = ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
    functions = {}
    for name, (part, result, arguments) in _FUNCTIONS.items():
        function = getattr(libraries[part], name)
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    return functions


class GgmlFlashAttention:
    """ggml_flash_attn_ext over K and V [D, L, Hkv, B] of type f16 or q8_0, query float32, no mask."""

    num_q_tokens = 1
    mask: np.ndarray | None = None  # float16 [num_q_tokens, L], added to the scores

    def __init__(self, data: StepData, kv_format: str, num_threads: int, folder: Path) -> None:
        self.name = f"ggml {kv_format}"
        self.shape, self.length = data.shape, data.k.shape[1]
        if kv_format == "q8_0" and data.shape.head_dim % Q8_0_BLOCK:
            raise UnavailableError(f"ggml q8_0: head_dim must be a multiple of {Q8_0_BLOCK}, got {data.shape.head_dim}")
        self.lib = _library(folder)
        self.kv_type = {"f16": F16, "q8_0": Q8_0}[kv_format]
        self.codes = [self._encode(x) for x in (data.k, data.v)]
        self.cache_bytes = sum(x.nbytes for x in self.codes)
        self.backend = self.lib["ggml_backend_cpu_init"]()
        self.lib["ggml_backend_cpu_set_n_threads"](self.backend, num_threads)
        copies = num_copies(self.cache_bytes)
        self.context = self.lib["ggml_init"](_InitParams(CONTEXT_BYTES * (1 + copies // 16), None, True))
        self.mask_tensor = None
        if self.mask is not None:
            self.mask_tensor = self.lib["ggml_new_tensor_4d"](self.context, F16, *self.mask.shape[::-1], 1, 1)
        steps = [self._new_step() for _ in range(copies)]
        self.buffer = self.lib["ggml_backend_alloc_ctx_tensors"](self.context, self.backend)
        self.q = data.q.contiguous()
        for q, k, v, _, _ in steps:
            for tensor, address, size in ((q, self.q.data_ptr(), self.q.nbytes), *self._code_addresses(k, v)):
                self.lib["ggml_backend_tensor_set"](tensor, address, 0, size)
        if self.mask is not None:
            self.lib["ggml_backend_tensor_set"](self.mask_tensor, self.mask.ctypes.data, 0, self.mask.nbytes)
        self.outputs, self.graphs = [step[3] for step in steps], [step[4] for step in steps]

    def __del__(self) -> None:
        if hasattr(self, "buffer"):
            self.lib["ggml_backend_buffer_free"](self.buffer)
            self.lib["ggml_free"](self.context)
            self.lib["ggml_backend_free"](self.backend)

    def _code_addresses(self, k: int, v: int) -> list[tuple[int, int, int]]:
        return [(tensor, codes.ctypes.data, codes.nbytes) for tensor, codes in zip((k, v), self.codes, strict=True)]

    def _encode(self, x: Tensor) -> np.ndarray:
        heads_first = x.transpose(1, 2).contiguous().numpy()  # [B, Hkv, L, D]
        if self.kv_type == F16:
            return heads_first.astype(np.float16)
        rows, row_size = heads_first.size // heads_first.shape[-1], heads_first.shape[-1]
        codes = np.empty(heads_first.size // Q8_0_BLOCK * (Q8_0_BLOCK + 2), np.uint8)
        self.lib["ggml_quantize_chunk"](Q8_0, heads_first.ctypes.data, codes.ctypes.data, 0, rows, row_size, None)
        return codes

    def _new_step(self) -> tuple[int, int, int, int, int]:
        shape, new = self.shape, self.lib["ggml_new_tensor_4d"]
        q = new(self.context, F32, shape.head_dim, self.num_q_tokens, shape.num_q_heads, shape.batch_size)
        k, v = (
            new(self.context, self.kv_type, shape.head_dim, self.length, shape.num_kv_heads, shape.batch_size)
            for _ in range(2)
        )
        scale = 1 / math.sqrt(shape.head_dim)
        out = self.lib["ggml_flash_attn_ext"](self.context, q, k, v, self.mask_tensor, scale, 0.0, 0.0)
        graph = self.lib["ggml_new_graph"](self.context)
        self.lib["ggml_build_forward_expand"](graph, out)
        return q, k, v, out, graph

    def call(self, copy: int) -> None:
        status = self.lib["ggml_backend_graph_compute"](self.backend, self.graphs[copy % len(self.graphs)])
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute: status must be 0, got {status}")

    def output(self) -> Tensor:
        self.call(0)
        out = torch.empty(self.shape.batch_size * self.num_q_tokens, self.shape.num_q_heads, self.shape.head_dim)
        self.lib["ggml_backend_tensor_get"](self.outputs[0], out.data_ptr(), 0, out.nbytes)
        return out

    def dequantized(self, row: int) -> tuple[Tensor, Tensor]:
        result = []
        for codes in self.codes:
            if self.kv_type == F16:
                numbers = codes[row].astype(np.float64)
            else:  # each block: a float16 scale, then 32 int8 codes
                blocks = codes.reshape(self.shape.batch_size, -1, Q8_0_BLOCK + 2)[row]
                scale = blocks[:, :2].copy().view(np.float16).astype(np.float64)
                numbers = blocks[:, 2:].view(np.int8) * scale
            numbers = numbers.reshape(self.shape.num_kv_heads, self.length, self.shape.head_dim)
            result.append(torch.from_numpy(numbers).transpose(0, 1))
        return result[0], result[1]


class GgmlPrefill(GgmlFlashAttention):
    """The same over a cache that holds the whole prompts, with the mask that makes them causal."""

    def __init__(self, data: BatchData, kv_format: str, num_threads: int, folder: Path) -> None:
        k, v = data.by_sequence(data.k), data.by_sequence(data.v)
        batch_size, length, num_kv_heads, head_dim = k.shape
        self.data, self.num_q_tokens = data, length
        self.mask = np.triu(np.full((length, length), -np.inf, np.float16), 1)
        q = data.by_sequence(data.q).transpose(1, 2)  # [B, Hq, L, D]
        shape = DecodeShape(batch_size, data.q.shape[1], num_kv_heads, head_dim, length)
        super().__init__(StepData(shape, q, k, v, data.seq_lens), kv_format, num_threads, folder)

    def inputs(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.data.q[self.data.query_slice(row)].double(), *self.dequantized(row)
