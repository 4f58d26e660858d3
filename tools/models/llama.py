"""A Llama in plain PyTorch whose attention is a function that the caller passes in; also Qwen2's and Qwen3's attention.

Weights and config.json are in the layout of Hugging Face transformers, so either program reads the other's files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attend, causal_attention

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a model; the names are those of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    model_type: str = "llama"  # qwen2: the projections to q, k and v have biases; qwen3: each head's q and k are normed

    def __post_init__(self) -> None:
        if self.model_type not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"LlamaConfig: model_type must be one of {known}, got {self.model_type!r}")

    @classmethod
    def from_file(cls, path: Path) -> LlamaConfig:
        """Reads config.json."""
        raw = json.loads(path.read_text())
        raw["rope_theta"] = raw["rope_parameters"]["rope_theta"]
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__})

    def to_json(self) -> dict[str, object]:
        """The content of config.json, as transformers reads it."""
        sizes = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "rope_theta"}
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        fixed = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "hidden_act": "silu",
            "dtype": "bfloat16",
        }
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        return fixed | sizes | ids | {"rope_parameters": rope, "tie_word_embeddings": True}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, n, H, D]; cos and sin [n, D/2] or [B, n, D/2]."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        has_bias = config.model_type == "qwen2"
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=has_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=has_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=has_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        if config.model_type == "qwen3":
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(layer, rotate(q, cos, sin).to(q.dtype), rotate(k, cos, sin).to(k.dtype), v)
        return self.o_proj(out.flatten(-2).to(x.dtype))


class FeedForward(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(layer, self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """tokens -> logits, with the input embedding also as the output layer.

    >>> model = Llama.load(Path("tools/models/pybyte-8m"))
    >>> logits = model(torch.tensor([list(b"import os")]))   # [1, 9, 256]
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, attend: Attend = causal_attention) -> Tensor:
        """Logits [B, n, vocab_size] of tokens [B, n] at positions [n] or [B, n] (default: 0 .. n-1)."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        half = torch.arange(0, self.config.head_dim, 2, device=tokens.device, dtype=torch.float32)
        angle = positions.unsqueeze(-1).float() * self.config.rope_theta ** (-half / self.config.head_dim)
        cos, sin = angle.cos(), angle.sin()
        x = self.embed_tokens(tokens)
        for index, layer in enumerate(self.layers):
            x = layer(index, x, cos, sin, attend)
        return F.linear(self.norm(x), self.embed_tokens.weight)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Llama:
        """Reads config.json and model.safetensors of a folder."""
        model = cls(LlamaConfig.from_file(folder / "config.json"))
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})
        return model.to(device=device, dtype=dtype).eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Writes config.json and model.safetensors (bfloat16)."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            f"model.{name}": w.detach().to("cpu", torch.bfloat16).contiguous() for name, w in self.state_dict().items()
        }
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config.to_json(), indent=2) + "\n")
