"""What a mutation is."""

from __future__ import annotations

from dataclasses import dataclass

ATTENTION_TESTS = ("tests/test_masks.py", "tests/test_decode.py", "tests/test_memory.py")
BAD_INPUT_TESTS = ("tests/test_bad_input.py",)
CODEC_TESTS = ("tests/test_codecs.py", "tests/test_cache.py")


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    anchor: str
    replacement: str
    tests: tuple[str, ...] = ATTENTION_TESTS
