"""onnxruntime's GroupQueryAttention reading a prompt: no past, fresh K and V."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batch_contenders import BatchData
from .cpu_contenders import UnavailableError


def _tensors(data: BatchData) -> dict[str, tuple[str, list[int]]]:
    """Element type (a name of TensorProto) and shape of every tensor of the graph."""
    batch_size, length, num_kv_heads, head_dim = data.by_sequence(data.k).shape
    q_row, kv_row = ([batch_size, length, n * head_dim] for n in (data.q.shape[1], num_kv_heads))
    present = ("FLOAT", [batch_size, num_kv_heads, length, head_dim])
    tensors = {"query": ("FLOAT", q_row), "key": ("FLOAT", kv_row), "value": ("FLOAT", kv_row)}
    tensors |= {"seqlens_k": ("INT32", [batch_size]), "total_sequence_length": ("INT32", [])}
    return tensors | {"output": ("FLOAT", q_row), "present_key": present, "present_value": present}


def _model(data: BatchData) -> bytes:
    """A graph of the one operator."""
    try:
        from onnx import TensorProto, helper
    except ImportError as error:
        raise UnavailableError("onnx is not installed") from error

    names = ["query", "key", "value", "", "", "seqlens_k", "total_sequence_length"]  # "": no past
    outputs = ["output", "present_key", "present_value"]
    heads = {"num_heads": data.q.shape[1], "kv_num_heads": data.k.shape[1]}
    node = helper.make_node("GroupQueryAttention", names, outputs, domain="com.microsoft", **heads)
    infos = {
        name: helper.make_tensor_value_info(name, getattr(TensorProto, dtype), sizes)
        for name, (dtype, sizes) in _tensors(data).items()
    }
    inputs, results = ([infos[name] for name in group if name] for group in (names, outputs))
    graph = helper.make_graph([node], "prefill", inputs, results)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


class OnnxRuntimePrefill:
    """One session with its own threads; it also writes K and V into a cache, as its users' models do."""

    name = "onnxruntime fp32"

    def __init__(self, data: BatchData, num_threads: int) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise UnavailableError("onnxruntime is not installed") from error
        self.data = data
        self.cache_bytes = data.k.nbytes + data.v.nbytes
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        self.session = ort.InferenceSession(_model(data), options, providers=["CPUExecutionProvider"])
        self.binding, self.arrays = self.session.io_binding(), self._arrays()
        self.values: dict[str, Any] = {n: ort.OrtValue.ortvalue_from_numpy(x) for n, x in self.arrays.items()}
        for name, value in self.values.items():
            is_result = name in ("output", "present_key", "present_value")
            (self.binding.bind_ortvalue_output if is_result else self.binding.bind_ortvalue_input)(name, value)

    def _arrays(self) -> dict[str, np.ndarray]:
        data, batch_size, length = self.data, len(self.data.kv_lens), self.data.kv_lens[0]
        arrays = {name: np.empty(sizes, np.float32) for name, (_, sizes) in _tensors(data).items()}
        rows = {"query": data.q, "key": data.k, "value": data.v}
        arrays |= {name: x.reshape(batch_size, length, -1).numpy() for name, x in rows.items()}
        arrays["seqlens_k"] = np.full(batch_size, length - 1, np.int32)  # tokens less one
        arrays["total_sequence_length"] = np.array(length, np.int32)
        return arrays

    def call(self, copy: int) -> None:
        self.session.run_with_iobinding(self.binding)

    def output(self) -> Tensor:
        self.call(0)
        return torch.from_numpy(self.values["output"].numpy()).reshape(self.data.q.shape)

    def inputs(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        data, keys = self.data, self.data.key_slice(row)
        return data.q[data.query_slice(row)].double(), data.k[keys].double(), data.v[keys].double()
