"""The evaluation's numbers against formulas written here, and the words that follow from them."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch

from pyquantattn.evaluation.exact import exact_attention, full_text_attention
from pyquantattn.evaluation.metrics import TokenMeasurements, bucket_masks, measure_tokens, standard_error, summarize
from pyquantattn.evaluation.model_level import first_divergence
from pyquantattn.evaluation.verdict import (
    DO_NOT_USE,
    INDISTINGUISHABLE,
    VISIBLE,
    Verdict,
    bit_exact_control,
    judge_attention,
    judge_model,
    kernel_control,
    negative_control,
    noise_control,
    uncached_control,
)


def test_kl_is_from_the_reference_to_the_contestant():
    """Of (3/4, 1/4) and (1/2, 1/2), by hand; the other direction gives 0.1438."""
    reference, contestant = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 1.0]]).log()
    found = measure_tokens(reference, contestant, torch.tensor([1]))
    assert found.kl[0] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-7)
    assert found.nll[0] == pytest.approx(math.log(2)) and found.reference_nll[0] == pytest.approx(math.log(4))
    assert found.same_top[0]  # the first of equals
    flipped = measure_tokens(reference, reference.flip(-1), torch.tensor([1]))
    assert not flipped.same_top[0] and flipped.right[0] and not flipped.reference_right[0]


def measurements(nll, reference_nll, kl=None, same_top=None):
    size = len(nll)
    kl = np.zeros(size) if kl is None else np.array(kl)
    same_top = np.ones(size, bool) if same_top is None else np.array(same_top)
    right, reference_right = np.arange(size) % 3 == 0, np.arange(size) < 3
    return TokenMeasurements(kl, np.array(nll), np.array(reference_nll), same_top, right, reference_right)


def test_summary_by_hand():
    p, reference_p = np.array([0.5, 0.2, 0.9, 0.4]), np.array([0.4, 0.4, 0.9, 0.5])
    tokens = measurements(-np.log(p), -np.log(reference_p), [0.1, 0.2, 0.3, 0.8], [True, False, True, True])
    found = summarize(tokens)
    assert found["count"] == 4 and found["top_flips"] == 1 and found["same_top_percent"] == 75.0
    assert found["flips_to_wrong"] == 2 and found["flips_to_right"] == 1  # right 1001, the reference 1110
    assert found["kl_mean"] == pytest.approx(0.35) and found["kl_max"] == 0.8 and found["kl_p50"] == pytest.approx(0.25)
    assert found["p_change_mean"] == pytest.approx(100 * (0.1 - 0.2 + 0 - 0.1) / 4)
    assert found["p_change_rms"] == pytest.approx(100 * math.sqrt((0.01 + 0.04 + 0 + 0.01) / 4))
    change = (0.5 * 0.2 * 0.9 * 0.4) ** -0.25 - (0.4 * 0.4 * 0.9 * 0.5) ** -0.25
    assert found["perplexity_change"] == pytest.approx(change)
    assert found["nll_correlation"] == pytest.approx(np.corrcoef(np.log(p), np.log(reference_p))[0, 1])
    assert summarize(tokens.select(np.zeros(4, bool))) == {"count": 0}


def test_standard_error_counts_neighbours_as_one():
    """Values that repeat 64 times carry the information of one: the naive error would be 8 times too small."""
    rng = np.random.default_rng(0)
    independent = rng.normal(size=256)
    expected = independent.std(ddof=1) / 16
    assert standard_error(np.repeat(independent, 64)) == pytest.approx(expected)
    assert standard_error(rng.normal(size=64 * 256)) == pytest.approx(1 / 128, rel=0.2)
    assert math.isnan(standard_error(np.ones(64)))


def test_the_error_of_a_perplexity_change_is_that_of_paired_differences():
    """Against the spread of the change over many draws; unpaired, the error would be 30 times larger."""
    rng = np.random.default_rng(0)

    def draw():
        reference = rng.normal(1.0, 0.5, 64 * 64)
        return summarize(measurements(reference + rng.normal(0.0, 0.01, reference.shape), reference))

    found = [draw() for _ in range(200)]
    spread = np.std([figures["perplexity_change"] for figures in found])
    stated = np.mean([figures["perplexity_change_standard_error"] for figures in found])
    assert stated == pytest.approx(spread, rel=0.2)


def test_buckets_hold_every_position_once():
    masks = bucket_masks(100, (16, 50, 100))
    assert [int(mask.sum()) for mask in masks.values()] == [16, 34, 50]
    assert np.array_equal(sum(mask.astype(int) for mask in masks.values()), np.ones(100))


def test_first_divergence():
    assert first_divergence(np.array([1, 2, 3]), np.array([1, 9, 3])) == 1
    assert first_divergence(np.array([1, 2, 3]), np.array([1, 2, 3])) == 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sm_scale": 0.3, "sliding_window": 7},
        {"logits_soft_cap": 2.0, "sinks": torch.tensor([1.0, -1.0, 0.5, 3.0])},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]), "sliding_window": 1},
    ],
    ids=["plain", "window", "cap and sinks", "alibi"],
)
def test_the_yardstick_is_attention_by_definition(options):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(n, heads, 8, generator=generator) for n, heads in ((5, 4), (20, 2), (20, 2)))
    found = exact_attention(q, k, v, 15, options)
    given = {name: value.double().numpy() if torch.is_tensor(value) else value for name, value in options.items()}
    if "alibi_slopes" in given:
        given["alibi_slopes"] = given["alibi_slopes"][None]
    pages = (x.double().numpy()[None] for x in (k, v))
    out, lse = oracle.decode_attention(q.double().numpy()[None], *pages, seq_lens=np.array([20]), **given)
    np.testing.assert_allclose(found.out.numpy(), out[0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.lse.numpy(), lse[0], rtol=1e-10)
    if "sinks" not in options:
        assert torch.allclose(found.weights.sum(-1), torch.ones(5, 4).double())


def test_a_whole_text_in_chunks_equals_one_row_at_a_time(monkeypatch):
    monkeypatch.setattr("pyquantattn.evaluation.exact.CHUNK_SCORES", 4 * 20 * 3)
    q, k, v = (torch.randn(20, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 1))
    v = v.expand(20, 2, 8)
    rows = [exact_attention(q[i : i + 1], k[: i + 1], v[: i + 1], i, {}).out for i in range(20)]
    torch.testing.assert_close(full_text_attention(q, k, v, {}).double(), torch.cat(rows), rtol=1e-5, atol=1e-6)


def figures(kl, top=100.0, kl_error=1e-9, top_error=0.01, count=100):
    return {
        "count": count,
        "kl_mean": kl,
        "kl_standard_error": kl_error,
        "same_top_percent": top,
        "same_top_standard_error": top_error,
    }


@pytest.mark.parametrize(
    ("kl", "top", "noise", "word"),
    [
        (9e-4, 99.5, 0.0, INDISTINGUISHABLE),
        (9e-4, 98.5, 0.0, VISIBLE),  # the first choice counts too
        (9e-3, 90.0, 5e-3, INDISTINGUISHABLE),  # within twice the noise floor
        (9e-3, 99.9, 0.0, VISIBLE),
        (2e-2, 99.9, 0.0, DO_NOT_USE),
        (math.nan, 99.9, 0.0, DO_NOT_USE),
    ],
)
def test_words_of_a_model(kl, top, noise, word):
    assert judge_model(figures(kl, top), {}, noise).word == word


def test_no_average_hides_a_broken_context():
    verdict = judge_model(figures(1e-5), {64: figures(1e-6), 128: figures(0.5), 256: {"count": 0}}, 0.0)
    assert verdict.word == DO_NOT_USE and "128" in verdict.reason


def test_a_verdict_near_a_threshold_says_so():
    assert judge_model(figures(9e-4, kl_error=1e-4), {}, 0.0).is_borderline
    assert not judge_model(figures(5e-4, kl_error=1e-4), {}, 0.0).is_borderline
    assert judge_model(figures(5e-4, top=99.1, top_error=0.1), {}, 0.0).is_borderline
    assert judge_model(figures(5e-4, top=98.9, top_error=0.1), {}, 0.0).is_borderline


def test_words_of_attention():
    words = [judge_attention(error, "layer 0", 1e-4).word for error in (0.01, 0.05, 0.2, math.nan)]
    assert words == [INDISTINGUISHABLE, VISIBLE, DO_NOT_USE, DO_NOT_USE]
    assert judge_attention(0.05, "layer 0", 0.03).word == INDISTINGUISHABLE


def test_every_control_can_fail():
    good, bad = Verdict(INDISTINGUISHABLE, ""), Verdict(DO_NOT_USE, "")
    assert bit_exact_control(0, 0.0).passed
    assert not bit_exact_control(1, 0.0).passed and not bit_exact_control(0, 1e-300).passed
    assert negative_control([bad, bad]).passed and not negative_control([bad, good]).passed
    for control in (lambda x: noise_control(x, 1e-3, "KLD"), uncached_control, lambda x: kernel_control(x, "int8")):
        assert control(1e-6).passed and not control(0.5).passed and not control(math.nan).passed
