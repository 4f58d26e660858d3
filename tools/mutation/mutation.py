"""What a mutation is."""

from __future__ import annotations

from dataclasses import dataclass

ATTENTION_TESTS = ("tests/test_masks.py", "tests/test_decode.py", "tests/test_memory.py")
BAD_INPUT_TESTS = ("tests/test_bad_input.py",)
BAD_BATCH_TESTS = ("tests/test_bad_ragged_input.py",)
CODEC_TESTS = ("tests/test_codecs.py", "tests/test_cache.py")
PREFILL_TESTS = (
    "tests/test_prefill.py::test_all_features_together",
    "tests/test_prefill.py::test_all_features_over_many_blocks_of_query_tokens",
    "tests/test_prefill.py::test_e1_every_number_of_query_tokens",
    "tests/test_prefill.py::test_e2_one_hot_values_show_exactly_which_keys_were_seen",
)
HYBRID_TESTS = (
    "tests/test_hybrid.py::test_all_features_together",
    "tests/test_hybrid.py::test_a_mixed_batch_equals_separate_calls",
)


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    anchor: str
    replacement: str
    tests: tuple[str, ...] = ATTENTION_TESTS
    device: str = "cpu"  # whose tests must turn red


@dataclass(frozen=True)
class CudaMutation(Mutation):
    device: str = "cuda"
