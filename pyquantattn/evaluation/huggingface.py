"""Any causal language model in a local Hugging Face folder, through transformers' attention interface.

The model runs without a cache of its own: its layers hand the new tokens' q, k and v to the evaluation, which owns the
past. BLOOM, MPT and Falcon with ALiBi, whose attention bypasses the interface, have their layers' forward replaced.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyquantattn.evaluation.exact import AttentionOptions
from pyquantattn.evaluation.language_model import Attend

IMPLEMENTATION = "pyquantattn_evaluation"  # a name with "flash" or "sdpa" in it would be treated as those
BYTE_VOCABULARY = 256
_attend: ContextVar[Attend | None] = ContextVar("attend", default=None)
_UNSUPPORTED = ("position_bias", "indices")  # arguments that change the result and that decode_attention does not have


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """transformers' signature: q, k, v are [1, H, n, D]; the result is [1, n, Hq, D]."""
    attend = _attend.get()
    if attend is None:
        raise RuntimeError(f"evaluate: attention {IMPLEMENTATION!r} runs inside the evaluation only")
    given = [name for name in _UNSUPPORTED if arguments.get(name) is not None]
    if given or attention_mask is not None:
        raise ValueError(
            f"evaluate: the model's attention needs {(*given, 'a mask')[0]}, which decode_attention does not have"
        )
    options = AttentionOptions(sm_scale=arguments.get("scaling"), sliding_window=arguments.get("sliding_window"))
    if (cap := arguments.get("softcap")) is not None:
        options["logits_soft_cap"] = cap
    if (sinks := arguments.get("s_aux")) is not None:
        options["sinks"] = sinks.float()
    if (slopes := arguments.get("alibi_slopes")) is not None:
        options["alibi_slopes"] = slopes
    layer: Any = module.layer_idx
    q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    return attend(layer, q, k, v, **options), None


class HuggingFaceModel:
    """A model folder. Implements :class:`~pyquantattn.evaluation.language_model.LanguageModel`."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: str = "auto") -> None:
        if not (folder / "config.json").is_file():
            raise ValueError(f"evaluate: --model must be a Hugging Face model folder with a config.json, got {folder}")
        if importlib.util.find_spec("transformers") is None:
            raise ValueError("evaluate: --model needs transformers 5.3 or newer, got none: pip install transformers")
        transformers = importlib.import_module("transformers")
        transformers.AttentionInterface.register(IMPLEMENTATION, _attention)
        transformers.AttentionMaskInterface.register(IMPLEMENTATION, lambda *_, **__: None)
        self._alibi_models = importlib.import_module("pyquantattn.integrations.transformers.alibi_models")
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        self._computes_own_alibi: bool = self._alibi_models.computes_own_alibi(config)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        self._model.to(device).eval().requires_grad_(False)
        self._config = self._model.config.get_text_config()
        self._own_implementation = self._model.config._attn_implementation
        self._is_ours = False  # whether the model's attention is the evaluation's now
        self._folder = folder
        self._tokenizer = self._load_tokenizer()
        self._check_that_attention_is_ours()

    def _check_that_attention_is_ours(self) -> None:
        """Raises for models that keep their attention to themselves: they would be measured unquantised."""
        seen: set[int] = set()

        def note(layer: int, q: Tensor, k: Tensor, v: Tensor, /, **_: Any) -> Tensor:
            seen.add(layer)
            return torch.zeros_like(q)

        self.logits(torch.zeros(1, dtype=torch.long, device=self.device), 0, note)
        if seen != set(range(self.num_layers)):
            name = type(self._model).__name__
            raise ValueError(
                f"evaluate: {name} must use transformers' attention interface in every layer, got layers {sorted(seen)}"
            )

    @property
    def name(self) -> str:
        """The folder's name."""
        return self._folder.resolve().name

    @property
    def identity(self) -> dict[str, object]:
        """Class, folder, dtype, weights' hash and sizes."""
        names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
        return {
            "class": type(self._model).__name__,
            "folder": self.name,
            "dtype": str(self.dtype),
            "sha256": hash_weights(self._folder),
            "num_layers": self.num_layers,
            **{name: getattr(self._config, name, None) for name in names},
        }

    @property
    def num_layers(self) -> int:
        """Hidden layers."""
        return int(self._config.num_hidden_layers)

    @property
    def max_length(self) -> int:
        """Positions that the model knows (BLOOM names no limit), at most one chunk: decode_attention has no chunks."""
        is_chunked = "chunked_attention" in (getattr(self._config, "layer_types", None) or ())
        names = ["max_position_embeddings", "max_seq_len", *(["attention_chunk_size"] if is_chunked else [])]
        limits = (getattr(self._config, name, None) for name in names)
        return min((int(limit) for limit in limits if limit is not None), default=sys.maxsize)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        found: torch.dtype = self._model.dtype
        return found

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        found: torch.device = self._model.device
        return found

    def logits(self, tokens: Tensor, first_position: int, attend: Attend | None) -> Tensor:
        """See LanguageModel."""
        self._choose_attention(attend is not None)
        options = {}
        if not self._computes_own_alibi:  # which has no positions but the distances of the keys
            positions = torch.arange(first_position, first_position + len(tokens), device=tokens.device)
            options["position_ids"] = positions[None]
        token = _attend.set(attend)
        try:
            with torch.inference_mode():
                out = self._model(input_ids=tokens[None], use_cache=False, **options)
        finally:
            _attend.reset(token)
        logits: Tensor = out.logits[0]
        return logits

    def _choose_attention(self, is_ours: bool) -> None:
        if is_ours == self._is_ours:
            return
        if not self._computes_own_alibi:
            self._model.set_attn_implementation(IMPLEMENTATION if is_ours else self._own_implementation)
        elif is_ours:
            self._alibi_models.replace_attention(self._model, _attention)
        else:
            self._alibi_models.disable_alibi_kernel(self._model)
        self._is_ours = is_ours

    def tokenize(self, text: str) -> Tensor:
        """Token ids without special ones; a folder without a tokenizer and with a vocabulary of 256 reads bytes."""
        ids = list(text.encode()) if self._tokenizer is None else self._tokenizer.encode(text, add_special_tokens=False)
        return torch.tensor(ids, device=self.device)

    @property
    def first_tokens(self) -> list[int]:
        """What every text begins with: the beginning-of-text token, for tokenizers that put one there."""
        if self._tokenizer is None:
            return []
        ids, first = self._tokenizer.encode("a"), self._tokenizer.bos_token_id
        return [first] if ids and ids[0] == first else []

    def with_first_tokens(self, tokens: Tensor) -> Tensor:
        """`tokens` [n] behind `first_tokens`."""
        return torch.cat([torch.tensor(self.first_tokens, dtype=tokens.dtype, device=tokens.device), tokens])

    def _load_tokenizer(self) -> Any:
        names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
        if any((self._folder / name).exists() for name in names):
            transformers = importlib.import_module("transformers")
            return transformers.AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        if self._config.vocab_size != BYTE_VOCABULARY:
            raise ValueError(f"evaluate: a model folder must hold a tokenizer, got {self._folder}")
        return None


def hash_weights(folder: Path) -> str:
    """SHA-256 over a folder's configuration and weight files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
