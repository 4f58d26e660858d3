"""Warnings with their reason, from K and V alone: said before a user sees gibberish."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pyquantattn.evaluation.tensor_level import InputStatistics, Table

# The step of int8 is max / 127, so its rounding error is crest / 440 of a vector, and reach / 440 of what tells tokens
# apart. Gaussian vectors of 128 have 2.8 of both.
CREST_LIMIT, REACH_LIMIT = 6.0, 12.0
CLIPPED_PERCENT_LIMIT, FLUSHED_PERCENT_LIMIT = 0.1, 10.0

# What was found, with the place of its largest value, and why it matters.
OFFSETS = (
    "offsets of {:.0f} times the spread",
    "channel offsets take the codes' range, what differs gets the rest; centre the keys, or keep this in 16 bits",
)
CREST = (
    "crest factor {:.1f}",
    "few values set the step of int8 for all others; FP8 or 16 bits may suit this better",
)
CLIPPED = (
    "{:.2g} % of values clipped",
    "values lie beyond the largest code: the scale is static and too small for this text",
)
FLUSHED = (
    "{:.2g} % of values became 0",
    "values are smaller than half a step: the scale is too large for them",
)


@dataclass(frozen=True)
class Finding:
    """One fragile thing in one layer."""

    subject: str  # "K", "V", or a format's: "int8 K"
    layer: str
    kind: tuple[str, str]  # what and reason, one of the above
    value: float


@dataclass(frozen=True)
class Concern:
    """Why a format may fail in some layers."""

    where: str
    what: str
    reason: str


def input_findings(layer: str, k: InputStatistics, v: InputStatistics) -> list[Finding]:
    """Of the distribution itself, whatever the format."""
    found = []
    for subject, statistics in (("K", k), ("V", v)):
        crest, reach = float(statistics.crest.max()), float(statistics.reach.max())
        if reach > REACH_LIMIT and reach > 2 * crest:
            found.append(Finding(subject, layer, OFFSETS, reach))
        elif crest > CREST_LIMIT:
            found.append(Finding(subject, layer, CREST, crest))
    return found


def codec_findings(layer: str, contestant: str, codec: Table) -> list[Finding]:
    """Of one format on one layer."""
    found = []
    for is_v, name in enumerate("KV"):
        chosen = codec["is_v"] == is_v
        clipped, flushed = (float(codec[key][chosen].max()) for key in ("clipped_percent", "flushed_percent"))
        if clipped > CLIPPED_PERCENT_LIMIT:
            found.append(Finding(f"{contestant} {name}", layer, CLIPPED, clipped))
        if flushed > FLUSHED_PERCENT_LIMIT:
            found.append(Finding(f"{contestant} {name}", layer, FLUSHED, flushed))
    return found


def concerns(findings: Iterable[Finding]) -> list[Concern]:
    """The same finding in several layers is one concern, with its largest value.

    >>> found = [Finding("K", "0", CREST, 7.0), Finding("K", "3", CREST, 9.0)]
    >>> [(concern.where, concern.what) for concern in concerns(found)]
    [('K of layers 0, 3', 'crest factor 9.0, most in layer 3')]
    """
    groups: dict[tuple[str, tuple[str, str]], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.subject, finding.kind), []).append(finding)
    return [_concern(subject, kind, group) for (subject, kind), group in groups.items()]


def _concern(subject: str, kind: tuple[str, str], group: list[Finding]) -> Concern:
    what, reason = kind
    worst = max(group, key=lambda finding: finding.value)
    layers = ", ".join(finding.layer for finding in group)
    where = f"{subject} of layer{'s' if len(group) > 1 else ''} {layers}"
    most = f", most in layer {worst.layer}" if len(group) > 1 else ""
    return Concern(where, what.format(worst.value) + most, reason)
