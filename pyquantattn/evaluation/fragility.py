"""Warnings with their reason, from K and V alone: said before a user sees gibberish."""

from __future__ import annotations

from dataclasses import dataclass

from pyquantattn.evaluation.tensor_level import InputStatistics, Table

# The step of int8 is max / 127, so its rounding error is crest / 440 of a vector, and reach / 440 of what tells tokens
# apart. Gaussian vectors of 128 have 2.8 of both.
CREST_LIMIT, REACH_LIMIT = 6.0, 12.0
CLIPPED_PERCENT_LIMIT, FLUSHED_PERCENT_LIMIT = 0.1, 10.0


@dataclass(frozen=True)
class Concern:
    """Why a format may fail in a layer."""

    where: str
    what: str
    reason: str


def input_warnings(label: str, k: InputStatistics, v: InputStatistics) -> list[Concern]:
    """Of the distribution itself, whatever the format."""
    found = []
    for name, statistics in (("K", k), ("V", v)):
        where = f"layer {label} {name}"
        crest, reach = float(statistics.crest.max()), float(statistics.reach.max())
        if reach > REACH_LIMIT and reach > 2 * crest:
            reason = "channel offsets take the codes' range, what differs gets the rest; keep this layer in 16 bits"
            found.append(Concern(where, f"offsets of {reach:.0f} times the spread", reason))
        elif crest > CREST_LIMIT:
            reason = "few values set the step of int8 for all others; FP8 or 16 bits may suit this layer better"
            found.append(Concern(where, f"crest factor {crest:.1f}", reason))
    return found


def codec_warnings(label: str, contestant: str, codec: Table) -> list[Concern]:
    """Of one format on one layer."""
    found = []
    for is_v, name in enumerate("KV"):
        chosen = codec["is_v"] == is_v
        clipped, flushed = (float(codec[key][chosen].max()) for key in ("clipped_percent", "flushed_percent"))
        where = f"{contestant}, layer {label} {name}"
        if clipped > CLIPPED_PERCENT_LIMIT:
            reason = "values lie beyond the largest code: the scale is static and too small for this text"
            found.append(Concern(where, f"{clipped:.2g} % of values clipped", reason))
        if flushed > FLUSHED_PERCENT_LIMIT:
            reason = "values are smaller than half a step: the scale is too large for them"
            found.append(Concern(where, f"{flushed:.2g} % of values became 0", reason))
    return found
