"""Level 3: a pass key hidden in a long text and asked for at its end, which short tests and averages do not see.

A key counts as found where every token of it is the model's first choice, given those before: what greedy decoding
would have written. Text, question and answer are all read from the cache.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyquantattn.evaluation.language_model import LanguageModel
from pyquantattn.evaluation.metrics import mcnemar, standard_error
from pyquantattn.evaluation.plan import NOISE, REFERENCE, Settings
from pyquantattn.evaluation.sequence import Calibration, Contestant, QuantizedSequence
from pyquantattn.evaluation.store import Arrays

Encode = Callable[[str], Tensor]  # text -> token ids [n]
NEEDLE, QUESTION, ANSWER = "\n# The pass key is {}. Remember it.\n", "\n# The pass key is", " {}"
KEY_DIGITS = 6
NEEDLE_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the text before the question
BLOCK = 256  # tokens that are encoded before their queries read the cache


def hide(text: Tensor, length: int, depth: float, key: str, encode: Encode) -> tuple[Tensor, int]:
    """`length` tokens, and how many of them are the answer at the end: the beginning of a text [n >= length] with a
    needle in it, then the question.

    Raises:
        ValueError: needle and question do not fit.
    """
    needle, question, answer = (encode(part.format(key)).to(text.device) for part in (NEEDLE, QUESTION, ANSWER))
    room = length - len(needle) - len(question) - len(answer)
    if room < len(needle):
        least = length - room + len(needle)
        raise ValueError(f"evaluate: --needles needs contexts of at least {least} tokens, got {length}")
    first = 1 + round(depth * (room - 1))  # behind the token that a text begins with
    return torch.cat([text[:first], needle, text[first:room], question, answer]), len(answer)


def look_up(
    model: LanguageModel,
    tokens: Tensor,
    num_answer: int,
    contestant: Contestant,
    calibrated: list[Calibration] | None,
) -> tuple[float, bool]:
    """-ln p of the answer, the last `num_answer` tokens, and whether each of them is the first choice."""
    known, answer = tokens[:-1], tokens[-num_answer:]
    sequence = QuantizedSequence(contestant, model.num_layers, len(known), calibrated)
    asked = len(known) - num_answer
    for first in range(0, asked, BLOCK):
        model.logits(known[first : min(first + BLOCK, asked)], first, sequence)
    logits = model.logits(known[asked:], asked, sequence)
    nll = -logits.double().log_softmax(-1).gather(-1, answer[:, None]).sum()
    return float(nll), bool((logits.argmax(-1) == answer).all())


def needle_contestants(settings: Settings) -> list[Contestant]:
    """The reference, then the formats."""
    return [settings.reference(), *settings.under_test()]


def needle_part(
    model: LanguageModel,
    text: Tensor,
    index: int,
    settings: Settings,
    calibrated: list[Calibration] | None,
    encode: Encode,
    advance: Callable[[int], None],
) -> Arrays:
    """One key for each context and depth, the same for every contestant."""
    shape = (len(settings.contexts), len(NEEDLE_DEPTHS))
    contestants = needle_contestants(settings)
    nll = {contestant.name: np.zeros(shape) for contestant in contestants}
    found = {contestant.name: np.zeros(shape, dtype=np.bool_) for contestant in contestants}
    keys = random.Random(index)
    for place in np.ndindex(shape):
        key = "".join(keys.choices("0123456789", k=KEY_DIGITS))
        tokens, num_answer = hide(text, settings.contexts[place[0]], NEEDLE_DEPTHS[place[1]], key, encode)
        for contestant in contestants:
            name = contestant.name
            nll[name][place], found[name][place] = look_up(model, tokens, num_answer, contestant, calibrated)
            advance(1)
    return {f"nll|{name}": table for name, table in nll.items()} | {
        f"found|{name}": table for name, table in found.items()
    }


def needle_figures(parts: list[Arrays], contestant: str) -> dict[str, Any]:
    """Keys found of all parts, beside the reference's, by context and depth."""
    source = REFERENCE if contestant == NOISE else contestant
    found, expected = (np.stack([arrays[f"found|{name}"] for arrays in parts]) for name in (source, REFERENCE))
    nll, expected_nll = (np.stack([arrays[f"nll|{name}"] for arrays in parts]) for name in (source, REFERENCE))
    lost, won = int((expected & ~found).sum()), int((found & ~expected).sum())
    share = float(found.mean())
    return {
        "count": found.size,
        "depths": list(NEEDLE_DEPTHS),
        "found_percent": 100 * share,
        "found_standard_error": 100 * math.sqrt(share * (1 - share) / found.size),
        "reference_found_percent": 100 * float(expected.mean()),
        "lost": lost,
        "won": won,
        "p_value": mcnemar(lost, won),
        "nll_change": float((nll - expected_nll).mean()),
        "nll_change_standard_error": standard_error((nll - expected_nll).ravel(), block=1),
        "found_percent_by_context_and_depth": (100 * found.mean(0)).tolist(),
    }
