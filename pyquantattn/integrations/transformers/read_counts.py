"""Counts of how attention got its keys and values: proof that the quantised bytes were read, and not a copy."""

from dataclasses import dataclass, replace

import torch


@dataclass
class ReadCounts:
    """Calls of this process since the last reset. Compiled calls are not counted, since a counter would recompile them.

    Attributes:
        quantized: attention read codes and scales in place.
        exact: attention read fresh 16-bit or 32-bit K and V, as in an exact prefill.
        dequantized: K or V of a layer was expanded to numbers, because something other than the kernel asked for it.
    """

    quantized: int = 0
    exact: int = 0
    dequantized: int = 0


_counts = ReadCounts()


def read_counts() -> ReadCounts:
    """A copy of the counts.

    >>> reset_read_counts()
    >>> read_counts()
    ReadCounts(quantized=0, exact=0, dequantized=0)
    """
    return replace(_counts)


def reset_read_counts() -> None:
    """Sets all counts to 0."""
    _counts.quantized = _counts.exact = _counts.dequantized = 0


def count_quantized() -> None:
    if not torch.compiler.is_compiling():
        _counts.quantized += 1


def count_exact() -> None:
    if not torch.compiler.is_compiling():
        _counts.exact += 1


def count_dequantized() -> None:
    if not torch.compiler.is_compiling():
        _counts.dequantized += 1
