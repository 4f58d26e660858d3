"""The tasks of lm-evaluation-harness on a model whose attention reads a quantised KV cache.

``python -m pyquantattn.integrations.lm_eval`` is lm_eval's own command with one more model, ``pyquantattn``: its ``hf``
model, which takes these arguments besides::

    python -m pyquantattn.integrations.lm_eval run --model pyquantattn --tasks arc_easy,niah_multikey_2 \\
        --model_args pretrained=FOLDER,dtype=bfloat16,kv_format=int8 --metadata '{"max_seq_lengths": [32768]}'
"""

try:
    import lm_eval as _lm_eval  # noqa: F401
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as _error:
    raise ImportError(
        f"pyquantattn.integrations.lm_eval needs {_error.name}, which is not installed: "
        "run `pip install 'pyquantattn[lm-eval]'`"
    ) from _error

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.registry import register_model
from torch import Tensor

import pyquantattn
from pyquantattn.integrations.transformers import QuantizedCache, enable_alibi_kernel, keep_edges, read_counts
from pyquantattn.integrations.transformers.alibi_models import computes_own_alibi


@register_model("pyquantattn")
class QuantizedLM(HFLM):
    """lm_eval's Hugging Face model, each forward pass and generation of which has a new :class:`QuantizedCache`.

    Every token, those of a prompt too, attends to keys and values that were quantised before: log-likelihoods are what
    decoding token by token over the cache would give. A layer that attends to fresh ones is an error.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        kv_format: str = "int8",
        exact_first: int = 0,
        exact_last: int = 0,
        scale_granularity: str = "token",
        k_scale: float | None = None,
        v_scale: float | None = None,
        k_offset: Any = None,
        **options: Any,
    ) -> None:
        """Loads the model, or takes a loaded one.

        Args:
            pretrained: folder, name on the Hub, or a causal language model of transformers.
            kv_format: a format or pair. ``"bf16"`` or ``"fp16"`` is the baseline: another order of summation, no codes.
            exact_first, exact_last: layers at either end that keep 16 bits.
            scale_granularity, k_scale, v_scale, k_offset: as ``QuantizedCache`` takes them. Scales and offsets that it
                takes from the data come from all texts of a batch.
            options: of lm_eval's ``hf`` model.

        Raises:
            ValueError: an argument of the cache breaks a rule, or the model is no causal language model.
        """
        super().__init__(pretrained, **options)
        if self.backend != "causal":
            raise ValueError(f"pyquantattn: pretrained must be a causal language model, got a {self.backend} one")
        self._kv_format = keep_edges(kv_format, exact_first, exact_last) if exact_first or exact_last else kv_format
        self._cache_options = {
            "scale_granularity": scale_granularity,
            "k_scale": k_scale,
            "v_scale": v_scale,
            "k_offset": k_offset,
        }
        self._kv_formats = self._new_cache().kv_formats
        if computes_own_alibi(self.model.config):
            enable_alibi_kernel(self.model)
        else:
            self.model.set_attn_implementation("pyquantattn")

    def _new_cache(self) -> QuantizedCache:
        return QuantizedCache(self.model.config, self._kv_format, prefill="cached", **self._cache_options)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits of whole texts, padded on the right."""
        is_mixed = self.mixed_precision_dtype is not None
        autocast = torch.autocast(self.device.type, self.mixed_precision_dtype, enabled=is_mixed)
        with torch.no_grad(), autocast, _every_layer_reads_codes():
            logits: Tensor = self.model(inps, past_key_values=self._new_cache(), use_cache=True).logits
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Tokens of the contexts and what follows, as ``generate`` returns them."""
        generation_kwargs["past_key_values"] = self._new_cache()
        with _every_layer_reads_codes():
            tokens: Tensor = super()._model_generate(context, max_length, stop, **generation_kwargs)
        return tokens

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval records of a model, and the cache."""
        cache = {"kv_formats": self._kv_formats, **self._cache_options, "pyquantattn": pyquantattn.__version__}
        return {**super().get_model_info(), "kv_cache": cache}


@contextmanager
def _every_layer_reads_codes() -> Iterator[None]:
    before = read_counts().exact
    yield
    if read_counts().exact != before:
        raise RuntimeError(
            "pyquantattn: every layer must attend to its quantised cache, got one that read fresh K and V"
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
