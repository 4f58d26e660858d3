"""Statistics of per-token measurements: how far a model's predictions moved, with errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Neighbouring tokens share their past, so their errors are not independent; runs of this many tokens nearly are.
STANDARD_ERROR_BLOCK = 64
PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


@dataclass(frozen=True)
class TokenMeasurements:
    """Of one contestant on consecutive positions, each [n], against the reference's logits."""

    kl: Floats  # KL(reference || contestant), nats
    nll: Floats  # -ln p of the token that follows in the text
    reference_nll: Floats
    same_top: Mask
    right: Mask  # the first choice is the token that follows
    reference_right: Mask

    @classmethod
    def concatenate(cls, parts: list[TokenMeasurements]) -> TokenMeasurements:
        """Joins consecutive positions."""
        return cls(
            np.concatenate([part.kl for part in parts]),
            np.concatenate([part.nll for part in parts]),
            np.concatenate([part.reference_nll for part in parts]),
            np.concatenate([part.same_top for part in parts]),
            np.concatenate([part.right for part in parts]),
            np.concatenate([part.reference_right for part in parts]),
        )

    def select(self, chosen: Mask) -> TokenMeasurements:
        """The positions that a mask [n] names."""
        return TokenMeasurements(
            self.kl[chosen],
            self.nll[chosen],
            self.reference_nll[chosen],
            self.same_top[chosen],
            self.right[chosen],
            self.reference_right[chosen],
        )


def measure_tokens(reference: Tensor, logits: Tensor, targets: Tensor) -> TokenMeasurements:
    """Compares logits [n, vocabulary] with the reference's, in float64; targets [n] are the tokens that follow.

    >>> import torch
    >>> same = measure_tokens(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([0]))
    >>> round(float(same.nll[0]), 4), abs(float(same.kl[0])) < 1e-12
    (0.6931, True)
    """
    log_p, log_q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    nll, reference_nll = (-table.gather(-1, targets[:, None])[:, 0].cpu().numpy() for table in (log_q, log_p))
    reference_top, top = (table.argmax(-1) for table in (reference, logits))
    masks = (mask.cpu().numpy() for mask in (top == reference_top, top == targets, reference_top == targets))
    return TokenMeasurements(kl.cpu().numpy(), nll, reference_nll, *masks)


def standard_error(values: Floats, block: int = STANDARD_ERROR_BLOCK) -> float:
    """Standard error of the mean of a correlated series: from the means of runs of `block` neighbours.

    >>> standard_error(np.array([1.0, 1.0, 3.0, 3.0]), block=2)
    1.0
    """
    num_blocks = max(1, len(values) // block)
    means = np.array([run.mean() for run in np.array_split(values, num_blocks)]) if len(values) else np.zeros(0)
    if len(means) < 2:
        return math.nan
    return float(means.std(ddof=1) / math.sqrt(len(means)))


def summarize(tokens: TokenMeasurements) -> dict[str, float]:
    """The figures of one contestant over some positions; probabilities in per cent, the rest in nats or perplexity."""
    if not len(tokens.kl):
        return {"count": 0}
    p, reference_p = np.exp(-tokens.nll), np.exp(-tokens.reference_nll)
    change = p - reference_p
    log_ratio = tokens.nll - tokens.reference_nll
    perplexity, reference_perplexity = (float(np.exp(nll.mean())) for nll in (tokens.nll, tokens.reference_nll))
    # To first order the difference of two perplexities is the mean of this series: pairing keeps the error small.
    perplexity_influence = perplexity * tokens.nll - reference_perplexity * tokens.reference_nll
    same = tokens.same_top.astype(np.float64)
    return {
        "count": len(tokens.kl),
        "kl_mean": float(tokens.kl.mean()),
        "kl_standard_error": standard_error(tokens.kl),
        **{f"kl_p{percentile:g}": float(np.percentile(tokens.kl, percentile)) for percentile in PERCENTILES},
        "kl_max": float(tokens.kl.max()),
        "same_top_percent": 100 * float(same.mean()),
        "same_top_standard_error": 100 * standard_error(same),
        "top_flips": int((~tokens.same_top).sum()),
        "flips_to_wrong": int((tokens.reference_right & ~tokens.right).sum()),
        "flips_to_right": int((tokens.right & ~tokens.reference_right).sum()),
        "p_change_mean": 100 * float(change.mean()),
        "p_change_rms": 100 * float(np.sqrt(np.mean(change**2))),
        **{f"p_change_p{q:g}": 100 * float(np.percentile(change, q)) for q in (0.1, 1, 5, 25, 50, 75, 95, 99, 99.9)},
        "perplexity": perplexity,
        "reference_perplexity": reference_perplexity,
        "perplexity_change": perplexity - reference_perplexity,
        "perplexity_change_standard_error": standard_error(perplexity_influence),
        "log_perplexity_ratio": float(log_ratio.mean()),
        "log_perplexity_ratio_standard_error": standard_error(log_ratio),
        "nll_correlation": _correlation(tokens.nll, tokens.reference_nll),
    }


def _correlation(a: Floats, b: Floats) -> float:
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def agreement_before_ties(
    first_divergence: list[int], gaps: list[float | None], count: int, tie_gap: float
) -> tuple[int, int]:
    """Tokens of greedy continuations that agree, and tokens that count, where each has `count`.

    A continuation whose first divergence is a tie counts up to there: two texts go on, either of them right. One that
    diverges beyond a tie counts to its end, all of it wrong from there on.

    >>> agreement_before_ties([100, 40, 10], [None, 0.001, 0.3], 100, tie_gap=0.02)
    (150, 240)
    """
    is_tie = [gap is not None and gap <= tie_gap for gap in gaps]
    counted = [place if tie else count for place, tie in zip(first_divergence, is_tie, strict=True)]
    return sum(first_divergence), sum(counted)


def mcnemar(lost: int, won: int) -> float:
    """The chance of paired flips as lopsided as these where either way is as likely: McNemar's exact test, two-sided.

    >>> mcnemar(5, 5), round(mcnemar(9, 1), 4)
    (1.0, 0.0215)
    """
    total, fewer = lost + won, min(lost, won)
    ways: int = sum(math.comb(total, count) for count in range(fewer + 1))
    return min(1.0, 2 * ways / (1 << total))


def bucket_masks(num_positions: int, contexts: tuple[int, ...]) -> dict[int, Mask]:
    """Which positions have a context (tokens seen, themselves included) above the last bucket's and up to each.

    >>> [int(mask.sum()) for mask in bucket_masks(8, (2, 8)).values()]
    [2, 6]
    """
    seen = np.arange(1, num_positions + 1)
    lower = (0, *contexts[:-1])
    return {context: (seen > low) & (seen <= context) for low, context in zip(lower, contexts, strict=True)}


def percentiles(values: Floats) -> dict[str, float]:
    """Mean, median and tail of an error."""
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "p99": float(np.percentile(values, 99)),
        "max": float(values.max()),
    }
