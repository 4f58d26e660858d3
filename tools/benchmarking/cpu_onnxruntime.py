"""onnxruntime's GroupQueryAttention as a contender: past and present share one buffer, as its users decode."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cpu_contenders import StepData, UnavailableError
from .cpu_shapes import DecodeShape
from .cpu_timing import num_copies

# kv dtype, k_quant_type and v_quant_type
FORMATS = {
    "fp32": (np.float32, "NONE"),
    "int8 per tensor": (np.int8, "PER_TENSOR"),
    "int8 per channel": (np.int8, "PER_CHANNEL"),
}


def _tensors(shape: DecodeShape, length: int, quant_type: str) -> dict[str, tuple[str, list[int]]]:
    """Element type (a name of TensorProto) and shape of every tensor of the graph."""
    kv_type = "FLOAT" if quant_type == "NONE" else "INT8"
    past = [shape.batch_size, shape.num_kv_heads, length, shape.head_dim]
    q_row, kv_row = ([shape.batch_size, 1, n * shape.head_dim] for n in (shape.num_q_heads, shape.num_kv_heads))
    scale = [1 if quant_type == "PER_TENSOR" else shape.num_kv_heads * shape.head_dim]
    tensors = {"query": ("FLOAT", q_row), "key": ("FLOAT", kv_row), "value": ("FLOAT", kv_row)}
    tensors |= {"past_key": (kv_type, past), "past_value": (kv_type, past)}
    tensors |= {"seqlens_k": ("INT32", [shape.batch_size]), "total_sequence_length": ("INT32", [])}
    tensors |= {"k_scale": ("FLOAT", scale), "v_scale": ("FLOAT", scale), "output": ("FLOAT", q_row)}
    return tensors | {"present_key": (kv_type, past), "present_value": (kv_type, past)}


def _model(data: StepData, kv_format: str) -> bytes:
    """A graph of the one operator. The step's newest token comes as `key` and `value`; the rest is the past."""
    try:
        from onnx import TensorProto, helper
    except ImportError as error:
        raise UnavailableError("onnx is not installed") from error

    quant_type = FORMATS[kv_format][1]
    # Position in the operator's input list; "" is an optional input left out.
    names = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length"]
    attributes: dict[str, Any] = {"num_heads": data.shape.num_q_heads, "kv_num_heads": data.shape.num_kv_heads}
    if quant_type != "NONE":
        names += [""] * 5 + ["k_scale", "v_scale"]
        attributes |= {"k_quant_type": quant_type, "v_quant_type": quant_type, "kv_cache_bit_width": 8}
    outputs = ["output", "present_key", "present_value"]
    node = helper.make_node("GroupQueryAttention", names, outputs, domain="com.microsoft", **attributes)
    infos = {
        name: helper.make_tensor_value_info(name, getattr(TensorProto, dtype), sizes)
        for name, (dtype, sizes) in _tensors(data.shape, data.k.shape[1], quant_type).items()
    }
    inputs, results = ([infos[name] for name in group if name] for group in (names, outputs))
    graph = helper.make_graph([node], "decode", inputs, results)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


class OnnxRuntimeGqa:
    """One session with its own threads; every copy of the cache is bound as past and as present."""

    def __init__(self, data: StepData, kv_format: str, num_threads: int) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise UnavailableError("onnxruntime is not installed") from error
        self.name = f"onnxruntime {kv_format}"
        self.shape = data.shape
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        self.session = ort.InferenceSession(_model(data, kv_format), options, providers=["CPUExecutionProvider"])
        codes, self.scales = zip(*(self._encode(x, kv_format) for x in (data.k, data.v)), strict=True)
        self.cache_bytes = sum(x.nbytes for x in codes)
        self.kept: list[Any] = []  # OrtValues borrow their memory from these arrays
        self.bindings = [self._bind(ort, data, codes) for _ in range(num_copies(self.cache_bytes))]

    def _encode(self, x: Tensor, kv_format: str) -> tuple[np.ndarray, np.ndarray | None]:
        heads_first = x.transpose(1, 2).contiguous()  # [B, Hkv, L, D]
        kv_dtype, quant_type = FORMATS[kv_format]
        if quant_type == "NONE":
            return heads_first.numpy(), None
        amax = heads_first.abs().amax() if quant_type == "PER_TENSOR" else heads_first.abs().amax(dim=(0, 2))
        scale = amax / 127
        codes = (heads_first / (scale if scale.ndim == 0 else scale[None, :, None])).round_().clamp_(-127, 127)
        return codes.numpy().astype(kv_dtype), scale.reshape(-1).numpy()

    def _bind(self, ort: Any, data: StepData, codes: tuple[np.ndarray, ...]) -> Any:
        binding = self.session.io_binding()
        batch_size, length = data.k.shape[:2]
        arrays = {
            "query": data.q.reshape(batch_size, 1, -1).numpy(),
            "key": data.k[:, -1].reshape(batch_size, 1, -1).numpy().copy(),
            "value": data.v[:, -1].reshape(batch_size, 1, -1).numpy().copy(),
            "seqlens_k": np.full(batch_size, length - 1, np.int32),  # tokens in the cache less one
            "total_sequence_length": np.array(length, np.int32),
            "output": np.empty((batch_size, 1, self.shape.num_q_heads * self.shape.head_dim), np.float32),
            "past_key": codes[0].copy(),
            "past_value": codes[1].copy(),
        }
        arrays |= {name: s for name, s in zip(("k_scale", "v_scale"), self.scales, strict=True) if s is not None}
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        for name, value in values.items():
            if name != "output":
                binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("output", values["output"])
        binding.bind_ortvalue_output("present_key", values["past_key"])
        binding.bind_ortvalue_output("present_value", values["past_value"])
        self.kept.append((arrays, values))
        return binding

    def call(self, copy: int) -> None:
        self.session.run_with_iobinding(self.bindings[copy % len(self.bindings)])

    def output(self) -> Tensor:
        self.call(0)
        out = self.kept[0][1]["output"].numpy()
        return torch.from_numpy(out.reshape(self.shape.batch_size, self.shape.num_q_heads, self.shape.head_dim))

    def dequantized(self, row: int) -> tuple[Tensor, Tensor]:
        result = []
        for name, scale in zip(("past_key", "past_value"), self.scales, strict=True):
            codes = torch.from_numpy(self.kept[0][1][name].numpy()[row]).transpose(0, 1).double()
            factor = 1.0 if scale is None else torch.from_numpy(scale).double()
            if scale is not None and scale.size > 1:
                factor = factor.reshape(self.shape.num_kv_heads, self.shape.head_dim)
            result.append(codes * factor)
        return result[0], result[1]
