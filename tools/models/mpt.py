"""An MPT in plain PyTorch: ALiBi, as many KV heads as query heads, LayerNorm, GELU; attention is passed in.

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

PREFIX = "transformer."  # of the names in model.safetensors


@dataclass(frozen=True)
class MptConfig:
    """Sizes of a model; the names are those of config.json."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    expansion_ratio: int
    max_seq_len: int

    @classmethod
    def from_file(cls, path: Path) -> MptConfig:
        """Reads config.json."""
        raw = json.loads(path.read_text())
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__})

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layers

    @property
    def max_position_embeddings(self) -> int:
        return self.max_seq_len

    @property
    def alibi_slopes(self) -> Tensor:
        """Of Press et al. (arXiv:2108.12409), for a power of two: float32 [n_heads]."""
        if self.n_heads & (self.n_heads - 1):
            raise ValueError(f"MptConfig: n_heads must be a power of two, got {self.n_heads}")
        return 2.0 ** (-8.0 / self.n_heads * torch.arange(1, self.n_heads + 1))

    def to_json(self) -> dict[str, object]:
        """The content of config.json, as transformers reads it."""
        sizes = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fixed = {"model_type": "mpt", "architectures": ["MptForCausalLM"], "dtype": "bfloat16", "no_bias": True}
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        return fixed | sizes | ids | {"attn_config": {"alibi": True}, "tie_word_embeddings": True}


class Attention(nn.Module):
    def __init__(self, config: MptConfig) -> None:
        super().__init__()
        self.num_heads = config.n_heads
        self.Wqkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, layer: int, x: Tensor, slopes: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.Wqkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return self.out_proj(attend(layer, q, k, v, alibi_slopes=slopes).flatten(-2).to(x.dtype))


class FeedForward(nn.Module):
    def __init__(self, config: MptConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.expansion_ratio * config.d_model, bias=False)
        self.down_proj = nn.Linear(config.expansion_ratio * config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: MptConfig) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.d_model, bias=False)
        self.attn = Attention(config)
        self.norm_2 = nn.LayerNorm(config.d_model, bias=False)
        self.ffn = FeedForward(config)

    def forward(self, layer: int, x: Tensor, slopes: Tensor, attend: Attend) -> Tensor:
        x = x + self.attn(layer, self.norm_1(x), slopes, attend)
        return x + self.ffn(self.norm_2(x))


class Mpt(nn.Module):
    """tokens -> logits, with the input embedding also as the output layer."""

    def __init__(self, config: MptConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm_f = nn.LayerNorm(config.d_model, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, _positions: Tensor | None = None, attend: Attend = causal_attention) -> Tensor:
        """Logits [B, n, vocab_size] of tokens [B, n]; ALiBi needs no positions but those that attention counts."""
        slopes = self.config.alibi_slopes.to(tokens.device)
        x = self.wte(tokens)
        for index, block in enumerate(self.blocks):
            x = block(index, x, slopes, attend)
        return F.linear(self.norm_f(x), self.wte.weight)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Mpt:
        """Reads config.json and model.safetensors of a folder."""
        model = cls(MptConfig.from_file(folder / "config.json"))
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict({name.removeprefix(PREFIX): weight for name, weight in weights.items()})
        return model.to(device=device, dtype=dtype).eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Writes config.json and model.safetensors (bfloat16)."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {f"{PREFIX}{name}": w.detach().to("cpu", torch.bfloat16) for name, w in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config.to_json(), indent=2) + "\n")
