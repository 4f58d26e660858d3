"""onnxruntime's GroupQueryAttention as a contender: past and present share one buffer, as its users decode."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cpu_contenders import StepData, UnavailableError
from .cpu_timing import num_copies

# kv dtype, k_quant_type and v_quant_type
FORMATS = {
    "fp32": (np.float32, "NONE"),
    "int8 per tensor": (np.int8, "PER_TENSOR"),
    "int8 per channel": (np.int8, "PER_CHANNEL"),
}


def _model(data: StepData, kv_format: str) -> bytes:
    """A graph of the one operator. The step's newest token comes as `key` and `value`; the rest is the past."""
    try:
        from onnx import TensorProto, helper
    except ImportError as error:
        raise UnavailableError("onnx is not installed") from error

    shape, length = data.shape, data.k.shape[1]
    kv_type = TensorProto.FLOAT if kv_format == "fp32" else TensorProto.INT8
    past = [shape.batch_size, shape.num_kv_heads, length, shape.head_dim]
    kv_row = [shape.batch_size, 1, shape.num_kv_heads * shape.head_dim]
    quant_type = FORMATS[kv_format][1]
    scales = [] if quant_type == "NONE" else ["k_scale", "v_scale"]
    scale_size = 1 if quant_type == "PER_TENSOR" else shape.num_kv_heads * shape.head_dim
    # Position in the operator's input list; "" is an optional input left out.
    names = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length"]
    names += [""] * 5 + scales if scales else []
    attributes: dict[str, Any] = {"num_heads": shape.num_q_heads, "kv_num_heads": shape.num_kv_heads}
    if scales:
        attributes |= {"k_quant_type": quant_type, "v_quant_type": quant_type, "kv_cache_bit_width": 8}
    outputs = ["output", "present_key", "present_value"]
    node = helper.make_node("GroupQueryAttention", names, outputs, domain="com.microsoft", **attributes)
    info = helper.make_tensor_value_info
    q_row = [shape.batch_size, 1, shape.num_q_heads * shape.head_dim]
    inputs = [
        info("query", TensorProto.FLOAT, q_row),
        info("key", TensorProto.FLOAT, kv_row),
        info("value", TensorProto.FLOAT, kv_row),
    ]
    inputs += [info("past_key", kv_type, past), info("past_value", kv_type, past)]
    inputs += [
        info("seqlens_k", TensorProto.INT32, [shape.batch_size]),
        info("total_sequence_length", TensorProto.INT32, []),
    ]
    inputs += [info(scale, TensorProto.FLOAT, [scale_size]) for scale in scales]
    results = [
        info("output", TensorProto.FLOAT, q_row),
        info("present_key", kv_type, past),
        info("present_value", kv_type, past),
    ]
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
