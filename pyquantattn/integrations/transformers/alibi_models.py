"""BLOOM, MPT and Falcon with ALiBi: their attention computes its own scores, so it is replaced, with proof.

In these models transformers bypasses its attention interface. ``enable_alibi_kernel`` gives each attention layer a
forward method that calls the kernels with ALiBi slopes. It changes one model object, never transformers, and it is
checked twice: the names of the parameters that transformers passes must be the known ones, and the model must give the
same logits before and after.
"""

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from pyquantattn._core import UnsupportedError
from pyquantattn.integrations.transformers.attention import quantized_attention

# Relative L2 error of the logits, from summing in another order in the model's dtype. A wrong slope, scale or mask
# changes them by tens of percent.
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_NUM_CHECKED_TOKENS = 12
# As transformers' attention interface calls it, with alibi_slopes besides.
Attention = Callable[..., tuple[Tensor, None]]


class _Step:
    """The attention function of the layers, and the mask of the current step in the form that the kernels read; the
    model's own has ALiBi or floats in it."""

    def __init__(self, config: Any, attention: Attention) -> None:
        self.config = copy(config)
        self.config._attn_implementation = "pyquantattn"
        self.attention = attention
        self.mask: Tensor | None = None

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the base model."""
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        inputs = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if inputs is None:
            return  # the model itself says what is missing
        past = given.get("past_key_values")
        options: dict[str, Any] = {"inputs_embeds": inputs.new_empty((*inputs.shape[:2], 0), dtype=torch.float32)}
        if "cache_position" in inspect.signature(create_causal_mask).parameters:  # transformers before 5.5
            start = past.get_seq_length() if past is not None else 0
            options["cache_position"] = torch.arange(inputs.shape[1], device=inputs.device) + start
        self.mask = create_causal_mask(
            config=self.config, attention_mask=given.get("attention_mask"), past_key_values=past, **options
        )


@dataclass(frozen=True)
class _Family:
    """How one family of models is patched."""

    attention: str  # name of the attention class
    parameters: tuple[str, ...]  # that its forward must have
    slopes: Callable[[nn.Module, Any], Tensor]  # of (base model, its config): float32 [Hq]
    forward: Callable[[nn.Module, _Step, Tensor], Callable[..., tuple[Tensor, None]]]


def _bloom_slopes(base: Any, config: Any) -> Tensor:
    return _slopes_of(base.build_alibi_tensor(torch.ones(1, 2), config.n_head, torch.float32))


def _mpt_slopes(base: Any, config: Any) -> Tensor:
    return _slopes_of(base.build_mpt_alibi_tensor(config.n_heads, 2))


def _falcon_slopes(base: Any, config: Any) -> Tensor:
    module: Any = inspect.getmodule(type(base))
    bias = module.build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), config.num_attention_heads, torch.float32)
    # Falcon scales the sum of scores and ALiBi.
    scale: float = (config.hidden_size // config.num_attention_heads) ** -0.5
    return _slopes_of(bias) * scale


def _slopes_of(bias: Tensor) -> Tensor:
    """The model's own slopes: what its bias grows by from one key to the next."""
    bias = bias.float().flatten(0, -2)
    return bias[:, 1] - bias[:, 0]


def _bloom_forward(layer: Any, step: _Step, slopes: Tensor) -> Callable[..., tuple[Tensor, None]]:
    def forward(
        self: Any, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Tensor | None,
        layer_past: Any = None, use_cache: bool = False, output_attentions: bool = False, **unused: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        out = _attend(self, step, slopes, query, key, value, layer_past, self.inv_norm_factor, output_attentions)
        out = nn.functional.dropout(self.dense(out), p=self.hidden_dropout, training=self.training)
        return residual + out, None

    return forward


def _mpt_forward(layer: Any, step: _Step, slopes: Tensor) -> Callable[..., tuple[Tensor, None]]:
    def forward(
        self: Any, hidden_states: Tensor, position_bias: Tensor, past_key_values: Any = None,
        attention_mask: Tensor | None = None, **unused: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        qkv = self.Wqkv(hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = qkv.unflatten(-1, (3, self.n_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        out = _attend(self, step, slopes, query, key, value, past_key_values, self.softmax_scale, False)
        return self.out_proj(out), None

    return forward


def _falcon_forward(layer: Any, step: _Step, slopes: Tensor) -> Callable[..., tuple[Tensor, None]]:
    def forward(
        self: Any, hidden_states: Tensor, alibi: Tensor | None, attention_mask: Tensor | None,
        position_ids: Tensor | None = None, layer_past: Any = None, use_cache: bool = False,
        output_attentions: bool = False, **unused: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        query, key, value = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
        out = _attend(self, step, slopes, query, key, value, layer_past, self.inv_norm_factor, output_attentions)
        return self.dense(out), None

    return forward


def _attend(
    layer: Any, step: _Step, slopes: Tensor, query: Tensor, key: Tensor, value: Tensor, past: Any, scaling: float,
    output_attentions: bool,
) -> Tensor:  # fmt: skip
    """``[B, n, Hq * D]``."""
    if past is not None:
        key, value = past.update(key, value, layer.layer_idx)
    out, _ = step.attention(
        layer, query, key, value, step.mask, scaling=scaling, is_causal=True, alibi_slopes=slopes,
        output_attentions=output_attentions,
    )  # fmt: skip
    return out.flatten(2, 3)


_FAMILIES = {
    "bloom": _Family("BloomAttention", ("hidden_states", "residual", "alibi", "attention_mask", "layer_past"),
                     _bloom_slopes, _bloom_forward),
    "mpt": _Family("MptAttention", ("hidden_states", "position_bias", "past_key_values", "attention_mask"),
                   _mpt_slopes, _mpt_forward),
    "falcon": _Family("FalconAttention", ("hidden_states", "alibi", "attention_mask", "position_ids", "layer_past"),
                      _falcon_slopes, _falcon_forward),
}  # fmt: skip


def enable_alibi_kernel(model: nn.Module) -> None:
    """Makes the attention of a BLOOM, MPT or Falcon (ALiBi) model read a ``QuantizedCache`` in place.

    Call it after the model is on its device and in eval mode. ``disable_alibi_kernel`` undoes it.

    Args:
        model: changed in place.

    Raises:
        ValueError: not such a model, or already changed.
        UnsupportedError: this release of transformers has another forward method, or the changed model's logits differ
            from the model's own; the model is as it was.

    >>> from transformers import BloomConfig, BloomForCausalLM
    >>> model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=128, n_layer=1, n_head=4)).eval()
    >>> enable_alibi_kernel(model)
    >>> disable_alibi_kernel(model)
    """
    _family_of(model)
    expected = _sample_logits(model)
    replace_attention(model, quantized_attention)
    _require_same(model, expected)


def replace_attention(model: nn.Module, attention: Attention) -> None:
    """Gives the attention layers of a BLOOM, MPT or Falcon (ALiBi) model another attention function, unproven.

    ``disable_alibi_kernel`` undoes it.

    Raises:
        ValueError, UnsupportedError: see ``enable_alibi_kernel``.
    """
    family = _family_of(model)
    base: Any = model.base_model
    if hasattr(base, "_pyquantattn_hook"):
        raise ValueError("enable_alibi_kernel: model must not be changed already; call disable_alibi_kernel first")
    layers = [layer for layer in base.modules() if type(layer).__name__.startswith(family.attention)]
    found = tuple(inspect.signature(type(layers[0]).forward).parameters)[1 : len(family.parameters) + 1]
    if found != family.parameters:
        raise UnsupportedError(
            f"enable_alibi_kernel: {family.attention}.forward must take {', '.join(family.parameters)}, "
            f"got {', '.join(found)}"
        )
    step = _Step(model.config, attention)
    slopes = family.slopes(base, model.config)
    for layer in layers:
        device = next(layer.parameters()).device
        layer.forward = MethodType(family.forward(layer, step, slopes.to(device)), layer)
    base._pyquantattn_hook = base.register_forward_pre_hook(step.before_forward, with_kwargs=True)


def disable_alibi_kernel(model: nn.Module) -> None:
    """Gives a model that ``enable_alibi_kernel`` changed its own attention back.

    Raises:
        ValueError: the model is not changed.
    """
    family = _family_of(model, "disable_alibi_kernel")
    base: Any = model.base_model
    if not hasattr(base, "_pyquantattn_hook"):
        raise ValueError(
            "disable_alibi_kernel: model must have been changed by enable_alibi_kernel, got one that is not"
        )
    base._pyquantattn_hook.remove()
    del base._pyquantattn_hook
    for layer in base.modules():
        if type(layer).__name__.startswith(family.attention):
            del layer.forward


def computes_own_alibi(config: Any) -> bool:
    """Whether models of this configuration are those that ``enable_alibi_kernel`` takes."""
    model_type = getattr(config, "model_type", None)
    return model_type in _FAMILIES and (model_type != "falcon" or bool(config.alibi))


def _family_of(model: nn.Module, who: str = "enable_alibi_kernel") -> _Family:
    config: Any = getattr(model, "config", None)
    if not computes_own_alibi(config):
        model_type = getattr(config, "model_type", type(model).__name__)
        raise ValueError(f"{who}: model must be one of {', '.join(_FAMILIES)}, with ALiBi, got {model_type}")
    return _FAMILIES[config.model_type]


@torch.no_grad()
def _sample_logits(model: Any) -> Tensor:
    """Of two short sequences, one of them left-padded; the padding's own outputs mean nothing."""
    vocabulary = model.get_input_embeddings().num_embeddings
    device = model.get_input_embeddings().weight.device
    tokens = (torch.arange(2 * _NUM_CHECKED_TOKENS, device=device) * 7919 % vocabulary).view(2, -1)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    was_training = model.training
    model.eval()
    out = model(tokens, attention_mask=mask, use_cache=False)
    model.train(was_training)
    logits: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return logits[mask.bool()].float()


def _require_same(model: nn.Module, expected: Tensor) -> None:
    dtype = next(model.parameters()).dtype
    try:
        error = float((_sample_logits(model) - expected).norm() / expected.norm())
    except Exception:
        disable_alibi_kernel(model)
        raise
    if not error <= _TOLERANCES.get(dtype, 0.0):
        disable_alibi_kernel(model)
        raise UnsupportedError(
            f"enable_alibi_kernel: logits of the changed model must be its own within "
            f"{_TOLERANCES.get(dtype, 0.0)}, got a relative error of {error:.1e}"
        )
