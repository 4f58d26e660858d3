"""From the arrays of a run to its figures, controls and verdicts: the JSON record's results."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pyquantattn.evaluation.fragility import Finding, codec_findings, concerns, input_findings
from pyquantattn.evaluation.metrics import (
    TokenMeasurements,
    agreement_before_ties,
    bucket_masks,
    percentiles,
    summarize,
)
from pyquantattn.evaluation.model_level import UNCACHED, first_divergence
from pyquantattn.evaluation.needles import needle_figures
from pyquantattn.evaluation.parts import greedy_tokens, input_statistics, storage_of, table_of, tokens_of
from pyquantattn.evaluation.plan import NOISE, REFERENCE, REPEAT, WRONG_SCALE, Settings, ablation_name
from pyquantattn.evaluation.run import RawResults
from pyquantattn.evaluation.tensor_level import ATTENTION_METRICS, CODEC_METRICS, Table, group_means, join_tables
from pyquantattn.evaluation.verdict import (
    KL_INDISTINGUISHABLE,
    OUTPUT_ERROR_INDISTINGUISHABLE,
    TIE_GAP,
    Control,
    Verdict,
    bit_exact_control,
    judge_attention,
    judge_model,
    kernel_control,
    negative_control,
    noise_control,
    uncached_control,
)

Json = dict[str, Any]


class Summary:
    """Figures of one run."""

    def __init__(self, raw: RawResults, settings: Settings) -> None:
        self._raw, self._settings = raw, settings
        self._has_model = bool(raw.decoded)

    def to_json(self) -> Json:
        """Controls, verdicts and figures. Without passing controls there is no verdict."""
        controls = self._controls()
        passed = all(control.passed for control in controls)
        return {
            "kv_read_path": "cache",
            "controls": [dataclasses.asdict(control) for control in controls],
            "controls_passed": passed,
            "warnings": [dataclasses.asdict(concern) for concern in concerns(self._findings())],
            "noise_kl": self._noise_kl() if self._has_model else None,
            "noise_output_error": float(self.attention(NOISE)["output_error"].mean()),
            "layers": {label: self._layer_inputs(index) for index, label in enumerate(self._raw.layer_labels)},
            "formats": {name: self._format(name, passed) for name in self._settings.formats},
        }

    def measured_times(self) -> Json:
        """Seconds of decode_attention over all layers for one token: of this machine, at this moment."""
        if not self._has_model:
            return {}
        names = {name: self._timed_name(name) for name in self._settings.formats}
        return {
            name: float(np.median([storage_of(arrays, source).seconds_per_step for arrays in self._raw.decoded]))
            for name, source in names.items()
        }

    def tokens(self, contestant: str) -> TokenMeasurements:
        """All texts, one after the other."""
        return TokenMeasurements.concatenate([tokens_of(arrays, contestant) for arrays in self._raw.decoded])

    def _timed_name(self, kv_format: str) -> str:
        return REFERENCE if kv_format == self._settings.reference_format else kv_format

    def by_context(self, contestant: str) -> dict[int, dict[str, float]]:
        """Figures of each context bucket."""
        masks = bucket_masks(self._settings.length, self._settings.contexts)
        return {
            context: summarize(
                TokenMeasurements.concatenate(
                    [tokens_of(arrays, contestant).select(mask) for arrays in self._raw.decoded]
                )
            )
            for context, mask in masks.items()
        }

    def attention(self, contestant: str) -> Table:
        """All texts' attention rows."""
        return join_tables([table_of(arrays, "attention", contestant) for arrays in self._raw.tensors])

    def _noise_kl(self) -> float:
        return float(self.tokens(NOISE).kl.mean())

    def _worst(self, contestant: str) -> tuple[float, str]:
        """The largest mean output error of any layer and context, and where."""
        means, (layers, contexts) = group_means(self.attention(contestant), "output_error", "layer", "context")
        place = np.unravel_index(np.argmax(np.nan_to_num(means, nan=np.inf)), means.shape)
        where = f"layer {self._raw.layer_labels[int(layers[place[0]])]} at context {contexts[place[1]]:.0f}"
        return float(means[place]), where

    def _model_verdict(self, contestant: str) -> Verdict:
        overall = summarize(self.tokens(contestant))
        return judge_model(overall, self.by_context(contestant), self._noise_kl())

    def _model_verdicts(self, contestant: str) -> list[Verdict]:
        """One for each context bucket that holds a token."""
        parts = self.by_context(contestant).items()
        return [
            judge_model({"count": 0}, {context: part}, self._noise_kl()) for context, part in parts if part["count"]
        ]

    def _attention_verdict(self, contestant: str) -> Verdict:
        return judge_attention(*self._worst(contestant), self._worst(NOISE)[0])

    def _attention_verdicts(self, contestant: str) -> list[Verdict]:
        """One for each layer."""
        means, _ = group_means(self.attention(contestant), "output_error", "layer", "context")
        noise = self._worst(NOISE)[0]
        labels = self._raw.layer_labels
        return [
            judge_attention(float(error), f"layer {label}", noise)
            for label, error in zip(labels, means.max(1), strict=True)
        ]

    def _controls(self) -> list[Control]:
        return [*(self._model_controls() if self._has_model else self._attention_controls()), self._kernel_control()]

    def _attention_controls(self) -> list[Control]:
        reference, again = self.attention(REFERENCE), self.attention(REPEAT)
        different = sum(int((reference[metric] != again[metric]).sum()) for metric in ATTENTION_METRICS)
        return [
            bit_exact_control(different, 0.0),
            noise_control(self._worst(NOISE)[0], OUTPUT_ERROR_INDISTINGUISHABLE, "mean output error"),
            negative_control(self._attention_verdicts(WRONG_SCALE)),
        ]

    def _model_controls(self) -> list[Control]:
        again = self.tokens(REPEAT)
        different = int((again.nll != again.reference_nll).sum() + (~again.same_top).sum())
        return [
            bit_exact_control(different, float(np.abs(again.kl).max())),
            noise_control(self._noise_kl(), KL_INDISTINGUISHABLE, "mean KLD"),
            uncached_control(float(self.tokens(UNCACHED).kl.mean())),
            negative_control(self._model_verdicts(WRONG_SCALE)),
        ]

    def _kernel_control(self) -> Control:
        errors = {
            contestant.name: float(self.attention(contestant.name)["kernel_error"].mean())
            for contestant in (self._settings.reference(), *self._settings.under_test())
        }
        worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
        return kernel_control(errors[worst], worst)

    def _layer_inputs(self, layer: int) -> Json:
        """What K and V of a layer look like, before any format: figures of each KV head."""
        statistics = {kv: input_statistics(self._raw.tensors[0], layer, kv.lower()) for kv in "KV"}
        return {kv: {"crest": found.crest.tolist(), "reach": found.reach.tolist()} for kv, found in statistics.items()}

    def _findings(self) -> list[Finding]:
        found: list[Finding] = []
        for index, label in enumerate(self._raw.layer_labels):
            arrays = self._raw.tensors[0]
            found += input_findings(label, input_statistics(arrays, index, "k"), input_statistics(arrays, index, "v"))
            for name in self._settings.formats:
                codec = table_of(arrays, "codec", self._settings.contestant_name(name))
                rows = codec["layer"] == index
                found += codec_findings(label, name, {key: values[rows] for key, values in codec.items()})
        return found

    def _format(self, name: str, passed: bool) -> Json:
        source = self._settings.contestant_name(name)
        found: Json = {
            "attention_verdict": _word(self._attention_verdict(source), passed),
            "attention": self._attention_figures(source),
        }
        found["by_layer"] = self._by_layer(source, passed)
        found["codec"] = self._codec_figures(source)
        found["memory"] = self._memory(name, source)
        found["ablations"] = {}
        if self._has_model:
            found["verdict"] = _word(self._model_verdict(source), passed)
            found["model"] = {
                "overall": summarize(self.tokens(source)),
                "by_context": {str(context): part for context, part in self.by_context(source).items()},
            }
            found["greedy"] = self.greedy(source) if self._raw.greedy else None
            found["needles"] = needle_figures(self._raw.needles, source) if self._raw.needles else None
        else:
            found["verdict"] = found["attention_verdict"]
        for contestant in self._settings.ablations():
            if contestant.name in (ablation_name(name, "K"), ablation_name(name, "V")) and contestant.only:
                found["ablations"][contestant.only] = self._ablation(contestant.name)
        return found

    def _ablation(self, contestant: str) -> Json:
        return {
            "output_error": percentiles(self.attention(contestant)["output_error"]),
            "by_layer_and_head": self._by_layer_and_head(contestant),
            "model": summarize(self.tokens(contestant)) if self._has_model else None,
        }

    def _by_layer_and_head(self, contestant: str) -> list[list[float]]:
        means, _ = group_means(self.attention(contestant), "output_error", "layer", "head")
        found: list[list[float]] = means.tolist()
        return found

    def _by_layer(self, source: str, passed: bool) -> Json:
        """The worst context of each layer, with its word."""
        means, _ = group_means(self.attention(source), "output_error", "layer", "context")
        noise, _ = group_means(self.attention(NOISE), "output_error", "layer", "context")
        return {
            label: {
                "output_error": float(worst),
                **_word(judge_attention(float(worst), f"layer {label}", float(floor)), passed),
            }
            for label, worst, floor in zip(self._raw.layer_labels, means.max(1), noise.max(1), strict=True)
        }

    def _attention_figures(self, source: str) -> Json:
        table = self.attention(source)
        by_layer, (layers,) = group_means(table, "output_error", "layer")
        curve, (contexts,) = group_means(table, "output_error", "context")
        ranking = sorted(
            zip(by_layer.tolist(), (self._raw.layer_labels[int(i)] for i in layers), strict=True), reverse=True
        )
        return {
            "overall": {metric: percentiles(table[metric]) for metric in ATTENTION_METRICS},
            "by_context": {f"{context:.0f}": float(mean) for context, mean in zip(contexts, curve, strict=True)},
            "by_layer_and_head": self._by_layer_and_head(source),
            "layers_most_sensitive_first": [{"layer": label, "output_error": error} for error, label in ranking],
        }

    def _codec_figures(self, source: str) -> Json:
        table = join_tables([table_of(arrays, "codec", source) for arrays in self._raw.tensors])
        figures: Json = {}
        for is_v, name in enumerate("KV"):
            rows = table["is_v"] == is_v
            figures[name] = {
                "relative_rmse_mean": float(table["relative_rmse"][rows].mean()),
                **{f"{key}_worst": float(table[key][rows].max()) for key in CODEC_METRICS},
            }
        return figures

    def _memory(self, name: str, source: str) -> Json:
        """Codes, scales and the unfilled slots of the last page, as KVCache.nbytes counts them."""
        if self._has_model:
            storage = storage_of(self._raw.decoded[0], source)
            nbytes, num_values, length = storage.nbytes, storage.num_values, self._settings.length
        else:
            arrays = self._raw.tensors[0]
            layers = range(len(self._raw.layer_labels))
            nbytes = sum(int(arrays[f"nbytes|{layer}|{source}"]) for layer in layers)
            num_values = sum(int(arrays[f"values|{layer}"]) for layer in layers)
            length = 0
        bytes_per_token = nbytes / length if length else None
        return {
            "nbytes": nbytes,
            "tokens": length or None,
            "bits_per_value": 8 * nbytes / num_values,
            "bytes_per_token": bytes_per_token,
            "bytes_per_token_and_layer": bytes_per_token / len(self._raw.layer_labels) if bytes_per_token else None,
            "tokens_per_gib": 2**30 / bytes_per_token if bytes_per_token else None,
        }

    def greedy(self, source: str) -> Json:
        """First divergences from the reference's continuation, and how many tokens agree before ties."""
        if source == NOISE:
            source = REFERENCE
        places, gaps = [], []
        for arrays in self._raw.greedy:
            expected = greedy_tokens(arrays)
            place = first_divergence(expected, greedy_tokens(arrays, source))
            places.append(place)
            gaps.append(float(arrays["greedy|gap"][place]) if place < len(expected) else None)
        count = self._settings.greedy_tokens
        agreeing, counted = agreement_before_ties(places, gaps, count, TIE_GAP)
        return {
            "tokens": count,
            "tie_gap": TIE_GAP,
            "agreeing_tokens": agreeing,
            "counted_tokens": counted,
            "first_divergence": places,
            "texts_without_divergence": sum(place == count for place in places),
            "top_gap_at_divergence": gaps,
            "divergences_beyond_ties": sum(gap is not None and gap > TIE_GAP for gap in gaps),
        }


def _word(verdict: Verdict, passed: bool) -> Json:
    if passed:
        return dataclasses.asdict(verdict)
    return {"word": None, "reason": "no verdict: a control failed", "is_borderline": False}
