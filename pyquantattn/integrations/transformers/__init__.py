"""Hugging Face transformers models on a quantised KV cache.

>>> import torch
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> from pyquantattn.integrations.transformers import QuantizedCache
>>> config = LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1,
...                      num_attention_heads=2, bos_token_id=1, eos_token_id=None)
>>> model = LlamaForCausalLM(config).eval()
>>> model.set_attn_implementation("pyquantattn")
>>> prompt = torch.tensor([[1, 2, 3]])
>>> model.generate(prompt, past_key_values=QuantizedCache(model.config), max_new_tokens=2).shape
torch.Size([1, 5])
"""

try:
    import transformers as _transformers
except ModuleNotFoundError as _error:
    if _error.name != "transformers":
        raise
    raise ImportError(
        "pyquantattn.integrations.transformers needs transformers 5.3 or newer, which is not installed: "
        "run `pip install 'pyquantattn[transformers]'`"
    ) from _error

if tuple(int(part) for part in _transformers.__version__.split(".")[:2]) < (5, 3):
    raise ImportError(
        f"pyquantattn.integrations.transformers needs transformers 5.3 or newer, got {_transformers.__version__}: "
        "run `pip install -U transformers`"
    )

from transformers import AttentionInterface as _AttentionInterface
from transformers import AttentionMaskInterface as _AttentionMaskInterface

from pyquantattn.integrations.transformers.alibi_models import disable_alibi_kernel, enable_alibi_kernel
from pyquantattn.integrations.transformers.attention import quantized_attention
from pyquantattn.integrations.transformers.cache import QuantizedCache
from pyquantattn.integrations.transformers.key_spans import key_span_mask
from pyquantattn.integrations.transformers.layer_formats import keep_edges
from pyquantattn.integrations.transformers.read_counts import ReadCounts, read_counts, reset_read_counts

# Without a mask function of the same name transformers passes no mask at all, and padding would be attended to.
_AttentionInterface.register("pyquantattn", quantized_attention)
_AttentionMaskInterface.register("pyquantattn", key_span_mask)

__all__ = [
    "QuantizedCache",
    "ReadCounts",
    "disable_alibi_kernel",
    "enable_alibi_kernel",
    "keep_edges",
    "quantized_attention",
    "read_counts",
    "reset_read_counts",
]
