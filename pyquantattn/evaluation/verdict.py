"""Controls that every run must pass, thresholds, and the words that a format gets.

Words speak about the worst context bucket (and, for attention, the worst layer and context), so that no average hides a
broken part.
"""

from __future__ import annotations

from dataclasses import dataclass

INDISTINGUISHABLE, VISIBLE, DO_NOT_USE = "indistinguishable", "visible", "do not use"
WORDS = (INDISTINGUISHABLE, VISIBLE, DO_NOT_USE)

NOISE_FACTOR = 2.0  # times the noise floor: what no one can tell from rounding
KL_INDISTINGUISHABLE, KL_VISIBLE = 1e-3, 1e-2  # nats, mean
SAME_TOP_PERCENT = 99.0
# Output error has no unit that a user feels. These bounds separate 8-bit storage of well-behaved K and V (int8 0.01,
# E4M3 0.04, E5M2 0.08 on Gaussian data) from broken layers (0.2 and more).
OUTPUT_ERROR_INDISTINGUISHABLE, OUTPUT_ERROR_VISIBLE = 0.02, 0.1

# The same in words, for every output.
MODEL_RULE = (
    f"{INDISTINGUISHABLE}: mean KLD at most {KL_INDISTINGUISHABLE:g} and same top-1 at least {SAME_TOP_PERCENT:g} %, "
    f"or {NOISE_FACTOR:g} times the noise floor; {VISIBLE}: at most {KL_VISIBLE:g}; else {DO_NOT_USE}. "
    "The worst context decides; borderline: within two standard errors."
)
LAYER_RULE = (
    f"{INDISTINGUISHABLE} (green): at most {OUTPUT_ERROR_INDISTINGUISHABLE:g}; {VISIBLE} (yellow): at most "
    f"{OUTPUT_ERROR_VISIBLE:g}; else {DO_NOT_USE} (red)."
)
TIE_GAP = 0.02  # probability by which the first choice must lead for a greedy divergence to be more than a tie
UNCACHED_KL_LIMIT = 1e-3  # the cached reference against the model's own attention
KERNEL_ERROR_LIMIT = 1e-2  # float32 outputs have 1e-6, bfloat16 outputs 2e-3


@dataclass(frozen=True)
class Control:
    """One check of the evaluation itself."""

    name: str
    passed: bool
    expected: str
    found: str


@dataclass(frozen=True)
class Verdict:
    """A word, what decided it, and whether a deciding figure lies within two standard errors of its threshold."""

    word: str
    reason: str
    is_borderline: bool = False


def judge_model(overall: dict[str, float], by_context: dict[int, dict[str, float]], noise_kl: float) -> Verdict:
    """The word of teacher-forced decode: the worst of all positions together and of every context bucket.

    >>> figures = {"kl_mean": 5e-3, "kl_standard_error": 1e-4, "same_top_percent": 98.0, "same_top_standard_error": 0.1}
    >>> judge_model({"count": 1, **figures}, {}, noise_kl=0.0).word
    'visible'
    """
    parts = {"all contexts": overall} | {f"context up to {context}": part for context, part in by_context.items()}
    judged = [(_model_word(part, noise_kl), where, part) for where, part in parts.items() if part["count"]]
    word = max((word for word, _, _ in judged), key=WORDS.index)
    deciding = [(where, part) for found, where, part in judged if found == word]
    where, part = max(deciding, key=lambda entry: entry[1]["kl_mean"])
    reason = f"{where}: mean KLD {part['kl_mean']:.2g}, same top-1 {part['same_top_percent']:.2f} %"
    return Verdict(word, reason, _is_borderline(part, noise_kl))


def _model_word(part: dict[str, float], noise_kl: float) -> str:
    kl = part["kl_mean"]
    if kl <= NOISE_FACTOR * noise_kl or (kl <= KL_INDISTINGUISHABLE and part["same_top_percent"] >= SAME_TOP_PERCENT):
        return INDISTINGUISHABLE
    return VISIBLE if kl <= KL_VISIBLE else DO_NOT_USE  # a NaN is not <= anything


def _is_borderline(part: dict[str, float], noise_kl: float) -> bool:
    limits = (max(KL_INDISTINGUISHABLE, NOISE_FACTOR * noise_kl), KL_VISIBLE)
    is_kl_near = any(abs(part["kl_mean"] - limit) <= 2 * part["kl_standard_error"] for limit in limits)
    # The first choice decides only where the mean KLD alone does not.
    is_top_decisive = NOISE_FACTOR * noise_kl < part["kl_mean"] <= KL_INDISTINGUISHABLE
    is_top_near = abs(part["same_top_percent"] - SAME_TOP_PERCENT) <= 2 * part["same_top_standard_error"]
    return is_kl_near or (is_top_decisive and is_top_near)


def judge_attention(worst_error: float, where: str, noise_error: float) -> Verdict:
    """The word of the attention output alone: the mean error of the worst layer and context.

    >>> judge_attention(0.35, "layer 0", 1e-4).word
    'do not use'
    """
    if worst_error <= max(OUTPUT_ERROR_INDISTINGUISHABLE, NOISE_FACTOR * noise_error):
        word = INDISTINGUISHABLE
    else:
        word = VISIBLE if worst_error <= OUTPUT_ERROR_VISIBLE else DO_NOT_USE
    return Verdict(word, f"{where}: mean output error {worst_error:.2g}")


def bit_exact_control(num_different: int, largest_kl: float) -> Control:
    """The reference run twice must agree in every measurement."""
    found = f"{num_different} values differ, largest KLD {largest_kl:.2g}"
    return Control("bit-exact", num_different == 0 and largest_kl == 0.0, "the same run twice: KLD 0 everywhere", found)


def noise_control(noise: float, limit: float, quantity: str) -> Control:
    """Another order of summation must move the result, but by less than any threshold."""
    expected = f"other splits and block sizes: {quantity} below {limit:g}"
    return Control("noise floor", noise <= limit, expected, f"{quantity} {noise:.2g}")


def negative_control(verdicts: list[Verdict]) -> Control:
    """Scales read four times too large must be condemned in every part, one verdict each.

    If a part passes, its caches are not what is measured there.
    """
    mildest = min(verdicts, key=lambda verdict: WORDS.index(verdict.word))
    expected = f"int8 with scales x4: {DO_NOT_USE!r} in every part"
    return Control("wrong scale", mildest.word == DO_NOT_USE, expected, f"at best {mildest.word!r} ({mildest.reason})")


def uncached_control(kl: float) -> Control:
    """The reference's caches against the model's own attention in one pass, which knows nothing of this library."""
    expected = f"16-bit cache against the model's own attention: mean KLD at most {UNCACHED_KL_LIMIT:g}"
    return Control("no cache", kl <= UNCACHED_KL_LIMIT, expected, f"mean KLD {kl:.2g}")


def kernel_control(mean_error: float, where: str) -> Control:
    """The kernels against float64 attention over the same codes and scales: what is blamed on a format is its own."""
    expected = f"decode_attention against float64 over the same codes: mean error at most {KERNEL_ERROR_LIMIT:g}"
    return Control("kernel", mean_error <= KERNEL_ERROR_LIMIT, expected, f"{mean_error:.2g}, worst for {where}")
