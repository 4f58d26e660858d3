"""The C++ sample runner's prefill and hybrid batches, over fresh and over cached K and V."""

import json
from functools import partial

import numpy as np
import pytest
from sample_runner import SMALL, rows_of, run_sample_runner

from pyquantattn.formats import KV_PAIRS

pytestmark = pytest.mark.timeout(900)  # the first test waits for the build

LENGTHS = [33, 7, 100]  # of SMALL
# Some chunks of prompts: the second has more query tokens than keys, so its first two tokens see nothing.
CHUNKS = [20, 9, 100]
# What the runner finds out, beside what it repeats of the command line and beside times.
FOUND = (
    "bytes_read",
    "flop",
    "kernel",
    "num_splits",
    "split_size",
    "max_error",
    "max_lse_error",
    "output_format_error",
)


@pytest.fixture
def runner(static_build):
    return partial(run_sample_runner, static_build)


@pytest.fixture
def rows(static_build):
    return partial(rows_of, static_build)


def num_scores(counts, is_causal=True):
    """Pairs of a query token and a key that it sees, counted one by one."""
    pairs = 0
    for count, length in zip(counts, LENGTHS, strict=True):
        for position in range(length - count, length):
            pairs += sum(not is_causal or key <= position for key in range(length))
    return pairs


@pytest.mark.parametrize("q_dtype", ["float32", "float16", "bfloat16"])
def test_prefill_is_right_over_fresh_keys_and_over_every_cache(q_dtype, rows):
    chunks = {"--seq-q": ",".join(map(str, CHUNKS)), "--q-dtype": q_dtype}
    report = rows("--mode", "prefill", "--kv-format", ",".join(["fresh", *KV_PAIRS]), **chunks)
    assert [row["kv_format"] for row in report] == ["fresh", *KV_PAIRS]
    heads, head_dim = int(SMALL["--num-q-heads"]), int(SMALL["--head-dim"])
    for row in report:
        assert row["status"] == "right" and row["reproducible"] is True
        assert (row["seq_q_min"], row["seq_q_max"], row["seq_q_total"]) == (9, 100, 129)
        assert row["flop"] == 4 * heads * head_dim * num_scores(CHUNKS) and row["tflop_per_s"] > 0
        assert (row["cache_bytes"] is None) is (row["k_format_error"] is None) is (row["kv_format"] == "fresh")
        assert row["sum_of_parts_ms"] is None


def test_a_prompt_is_as_long_as_its_keys_and_fresh_unless_a_format_is_named(rows):
    (row,) = rows("--mode", "prefill", "--causal", "off")
    assert (row["kv_format"], row["seq_q_total"], row["prefill_sequences"]) == ("fresh", sum(LENGTHS), 3)
    assert row["flop"] == 4 * 4 * 64 * num_scores(LENGTHS, is_causal=False)


@pytest.mark.parametrize(("percent", "num_prefills"), [(0, 0), (25, 2), (50, 4), (75, 6), (100, 8)])
def test_a_hybrid_batch_prefills_the_fraction_asked_for(percent, num_prefills, rows):
    eight = {"--batch-size": "8", "--seq-k": "30,9,64,17,100,5,1,200", "--profiling-iterations": "3"}
    (row,) = rows("--hybrid", "--prefill-fraction", str(percent), "--page-size", "16", **eight)
    assert row["status"] == "right" and row["prefill_sequences"] == num_prefills
    assert (row["prefill_ms"] is None) is (row["prefill_tflop_per_s"] is None) is (num_prefills == 0)
    assert (row["decode_ms"] is None) is (row["decode_gb_per_s"] is None) is (num_prefills == 8)
    parts = (row["prefill_ms"] or 0) + (row["decode_ms"] or 0)
    assert row["sum_of_parts_ms"] == pytest.approx(parts, rel=1e-4) and row["median_ms"] > 0


def test_a_hybrid_batch_may_hold_sequences_without_query_tokens(rows):
    report = rows("--hybrid", "--prefill-fraction", "100", "--kv-format", "all", **{"--seq-q": "0,1,17"})
    assert all(row["status"] == "right" and row["seq_q_total"] == 18 for row in report)


CHANGES = {
    "causal": {"--causal": "off"},
    "q_tokens": {"--seq-q": "5"},
    "drawn_q_tokens": {"--seq-q": "uniform:2:30"},
    "length": {"--seq-k": "33,7,101"},
    "starts": {"--seq-starts": "5,0,20"},
    "kv_heads": {"--num-kv-heads": "4"},
    "q_dtype": {"--q-dtype": "float32"},
    "sm_scale": {"--sm-scale": "0.5"},
    "alibi": {"--alibi": "standard"},
    "alibi_of_sequences": {"--alibi": ",".join(str(0.01 * i) for i in range(12))},
    "window": {"--sliding-window": "5"},
    "cap": {"--logits-soft-cap": "0.5"},
    "sinks": {"--sinks": "3"},
    "seed": {"--seed": "1"},
    "kernel": {"--kernel": "scalar"},
}
OF_A_CACHE = {
    "fraction": {"--prefill-fraction": "100"},
    "kv_format": {"--kv-format": "fp8_e5m2"},
    "k_scale": {"--k-scale": "head"},
    "splits": {"--num-splits": "4"},
    "invariant": {"--batch-invariant": "on"},
}


@pytest.mark.parametrize(
    ("mode", "name"), [*(("prefill", name) for name in CHANGES), *(("hybrid", name) for name in CHANGES | OF_A_CACHE)]
)
def test_no_option_is_ignored(mode, name, rows):
    """The result is right with the option, and another one than without. That the kernel and the runner's own reference
    agree says that both of them heard it."""
    (before,), (after,) = rows("--mode", mode), rows("--mode", mode, **(CHANGES | OF_A_CACHE)[name])
    assert after["status"] == "right" and [after[f] for f in FOUND] != [before[f] for f in FOUND]


def test_a_mismatch_names_sequence_token_and_head(runner):
    result = runner("--mode", "prefill", "--tolerance", "0", "--output", "json", **{"--seq-q": "0,0,3"})
    assert result.returncode == 1 and json.loads(result.stdout)[0]["status"] == "mismatch"
    assert "sample_runner: fresh: sequence 2, token 0, head 0: " in result.stderr


def test_the_text_report_leaves_out_what_a_run_has_not(runner):
    fresh, hybrid = runner("--mode", "prefill").stdout, runner("--hybrid").stdout
    assert "tflop_per_s" in fresh and "cache" not in fresh and "decode_ms" not in fresh
    for word in ("prefill_tflop_per_s", "decode_gb_per_s", "sum_of_parts_ms", "saving_percent"):
        assert word in hybrid, word


def test_a_sequence_takes_its_last_loaded_query_tokens(rows, tmp_path):
    """The error of the format comes from the runner's reference alone, so equal queries make it equal."""
    q = np.random.default_rng(0).normal(size=(3, 5, 4, 64)).astype(np.float32)
    np.save(tmp_path / "five.npy", q)
    np.save(tmp_path / "one.npy", q[:, -1:])
    (five,) = rows("--hybrid", "--prefill-fraction", "0", "--load-q", str(tmp_path / "five.npy"))
    (one,) = rows("--decoding", "--load-q", str(tmp_path / "one.npy"))
    assert five["status"] == "right" and five["output_format_error"] == one["output_format_error"]


def test_loaded_prompts_give_their_sizes(rows, tmp_path):
    """Small whole numbers are exact in every type."""
    rng = np.random.default_rng(1)
    for name, tokens, heads in (("q", 12, 4), ("k", 12, 2), ("v", 12, 2)):
        np.save(tmp_path / f"{name}.npy", rng.integers(-4, 5, size=(3, tokens, heads, 64)).astype(np.float32))
    files = [x for name in "qkv" for x in (f"--load-{name}", str(tmp_path / f"{name}.npy"))]
    report = rows("--mode", "prefill", "--kv-format", "fresh,fp16", *files, **{"--seq-k": "12"})
    assert [(row["status"], row["seq_q_total"]) for row in report] == [("right", 36)] * 2
    assert report[1]["k_format_error"] == report[1]["output_format_error"] == 0
