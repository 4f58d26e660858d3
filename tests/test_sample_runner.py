"""The C++ sample runner from its command line: exit codes, reports, files, and that no option is ignored."""

import csv
import io
import json
import subprocess
from functools import partial

import numpy as np
import pytest
from sample_runner import SMALL, rows_of, run_sample_runner

from pyquantattn.formats import KV_PAIRS

pytestmark = pytest.mark.timeout(900)  # the first test waits for the build

# What the runner measures, beside what it repeats of the command line and beside times.
MEASURED = (
    "cache_bytes",
    "bytes_read",
    "kernel",
    "num_splits",
    "split_size",
    "workspace_bytes",
    "relative_l2",
    "max_lse_error",
)
CHECKED = ("max_error", "k_format_error", "v_format_error", "output_format_error")


@pytest.fixture
def runner(static_build):
    return partial(run_sample_runner, static_build)


@pytest.fixture
def rows(static_build):
    return partial(rows_of, static_build)


def test_every_format_is_right_and_csv_says_what_json_says(runner, rows):
    table = list(csv.DictReader(io.StringIO(runner("--kv-format", "all", "--output", "csv").stdout)))
    objects = rows("--kv-format", "all")
    assert [row["kv_format"] for row in table] == [row["kv_format"] for row in objects] == list(KV_PAIRS)
    assert [list(row) for row in table] == [list(row) for row in objects]
    for as_text, row in zip(table, objects, strict=True):
        assert as_text["status"] == row["status"] == "right"
        assert float(as_text["relative_l2"]) == row["relative_l2"] <= row["tolerance"]
        assert int(as_text["cache_bytes"]) == row["cache_bytes"]


def test_memory_and_error_are_those_of_the_formats(rows):
    by_name = {row["kv_format"]: row for row in rows("--kv-format", "all", **{"--head-dim": "128", "--seq-k": "300"})}
    assert by_name["int8"]["saving_percent"] == pytest.approx(49.2188) and by_name["int8"]["bits_per_element"] == 8.125
    assert by_name["fp16"]["saving_percent"] == 0
    for name, low, high in (("int8", 0.007, 0.013), ("fp8_e4m3", 0.03, 0.045), ("fp8_e5m2", 0.06, 0.09)):
        assert low <= by_name[name]["output_format_error"] <= high, name
    (static,) = rows("--k-scale", "head", "--v-scale", "tensor", **{"--head-dim": "128"})
    assert 49.99 < static["saving_percent"] < 50  # a few scales are bytes, too


def test_the_text_report_names_error_time_bandwidth_and_saving(runner):
    result = runner()
    assert result.returncode == 0
    for word in (
        "max_error",
        "mean_error",
        "median_ms",
        "gb_per_s",
        "cache_bytes",
        "saving_percent",
        "status",
        "right",
    ):
        assert word in result.stdout, word


def test_a_mismatch_exits_with_1_and_says_where(runner):
    result = runner("--tolerance", "1e-9", "--output", "json")
    assert result.returncode == 1 and json.loads(result.stdout)[0]["status"] == "mismatch"
    assert "sample_runner: int8: sequence 0, token 0, head 0: " in result.stderr


BAD = {
    "unknown": (["--foo"], r"unknown option '--foo', allowed: --mode, "),
    "no_value": (["--layout"], "--layout needs a value: LAYOUT"),
    "value_of_a_switch": (["--info=3"], "--info takes no value, got '--info=3'"),
    "twice": (["--seed", "1", "--seed", "2"], "--seed must be given at most once"),
    "number": (["--page-size", "x"], "--page-size must be an integer in [0, 2147483647], got 'x'"),
    "negative": (["--page-size", "-1"], "--page-size must be an integer in [0, 2147483647], got '-1'"),
    "trailing": (["--sm-scale", "1.0f"], "--sm-scale must be a finite number, got '1.0f'"),
    "format": (["--kv-format", "int8/fp16"], "--kv-format must be 'all' or a list of fp16, "),
    "two_ways": (["--kv-format", "int8", "--k-format", "int8"], "must not be given with --kv-format"),
    "unused_scale": (["--kv-format", "fp16", "--k-scale", "head"], "--k-scale must not be given for formats"),
    "scale": (["--k-scale", "head:1,-2"], "--k-scale must be positive scales, got 'head:1,-2'"),
    "huge": (["--k-scale", "tensor:1e39"], "--k-scale must be numbers that are finite in float32, got '1e39'"),
    "lengths": (["--seq-starts", "uniform:9:3"], "--seq-starts must be uniform:MIN:MAX with MIN <= MAX"),
    "slopes": (["--alibi", "1,2"], "--alibi must have 4 or 12 values, got 2"),
    "acausal": (["--causal", "off"], "--causal must be on with --mode decode, which is causal, got 'off'"),
    "two_modes": (["--decoding", "--hybrid"], "--mode, --decoding and --hybrid exclude each other"),
    "fraction": (["--prefill-fraction", "30"], "--prefill-fraction needs --mode hybrid"),
    "fraction_above_100": (["--hybrid", "--prefill-fraction", "101"], "must be an integer in [0, 100], got '101'"),
    "ragged_decode": (["--seq-q", "1,2,1"], "--seq-q must be one number with --mode decode"),
    "no_prompt": (["--hybrid", "--prefill-fraction", "0", "--seq-q", "3"], "--seq-q is of sequences that prefill"),
    "fresh_decode": (["--kv-format", "fresh"], "--kv-format must be of a cache except with --mode prefill"),
    "fresh_pages": (["--mode", "prefill", "--page-size", "16"], "--page-size needs a cache, so --kv-format must"),
    "fresh_splits": (["--mode", "prefill", "--num-splits", "2"], "--num-splits needs a cache"),
    "fresh_scale": (["--mode", "prefill", "--v-scale", "head"], "--v-scale must not be given for formats"),
    "17_tokens": (["--seq-q", "17"], "decode_attention: q must have 1 to 16 query tokens per sequence, got 17"),
    "splits": (["--num-splits", "2", "--batch-invariant", "on"], "decode_attention: num_splits must be "),
    "no_file": (["--load-q", "nowhere.npy"], "nowhere.npy: must be a readable file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_usage_exits_with_2_and_says_what_is_allowed(name, runner):
    arguments, message = BAD[name]
    result = runner(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("sample_runner: ") and message in result.stderr, result.stderr


UNSUPPORTED = {
    "kernel": (["--kernel", "abacus"], "with kernel abacus; this build and machine have head_dim in {"),
    "cuda": (["--device", "cuda"], "--device must be cpu, because this build has no CUDA backend"),
    "cuda_prefill": (["--device", "cuda", "--mode", "prefill"], "--device must be cpu, because this build has no CUDA"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_this_build_cannot_do_exits_with_3(name, runner):
    arguments, message = UNSUPPORTED[name]
    result = runner(*arguments)
    assert result.returncode == 3 and message in result.stderr, result.stderr


def test_a_head_dim_without_a_kernel_exits_with_3(runner):
    result = runner("--output", "json", **{"--head-dim": "36"})
    assert result.returncode == 3 and json.loads(result.stdout)[0]["status"] == "unsupported"
    assert "no kernel for head_dim 36" in result.stderr


def test_help_and_info(runner):
    for option in (*SMALL, "--load-k", "--k-scale", "--flush-mib", "--check"):
        assert option in runner("--help").stdout
    assert "decode kernel cpu scalar int8: head_dim 32 to 256 in steps of 8" in runner("--info").stdout


CHANGES = {
    "batch": {"--batch-size": "2", "--seq-k": "33,7"},
    "length": {"--seq-k": "33,7,101"},
    "uniform": {"--seq-k": "uniform:200:300"},
    "lognormal": {"--seq-k": "lognormal:200:0.5"},
    "starts": {"--seq-starts": "5,0,20"},
    "q_tokens": {"--seq-q": "3"},
    "q_heads": {"--num-q-heads": "8"},
    "kv_heads": {"--num-kv-heads": "4"},
    "head_dim": {"--head-dim": "72"},
    "q_dtype": {"--q-dtype": "float32"},
    "kv_format": {"--kv-format": "fp8_e4m3"},
    "k_and_v_format": {"--k-format": "int8", "--v-format": "fp8_e4m3"},
    "k_scale": {"--k-scale": "head"},
    "v_scale": {"--v-scale": "tensor:0.02"},
    "page_size": {"--page-size": "16"},
    "sm_scale": {"--sm-scale": "0.5"},
    "alibi": {"--alibi": "standard"},
    "alibi_values": {"--alibi": "0.1,0.2,0.3,0.4"},
    "window": {"--sliding-window": "5"},
    "cap": {"--logits-soft-cap": "0.5"},
    "sinks": {"--sinks": "3"},
    "seed": {"--seed": "1"},
    "kernel": {"--kernel": "scalar"},
    "splits": {"--num-splits": "4"},
    "invariant": {"--batch-invariant": "on"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_no_option_is_ignored(name, rows):
    """The result is right with the option, and another one than without. That the kernel and the runner's own reference
    agree says that both of them heard it."""
    (before,), (after,) = rows(), rows(**CHANGES[name])
    fields = MEASURED + CHECKED
    assert after["status"] == "right" and [after[f] for f in fields] != [before[f] for f in fields]


def test_layout_iterations_flush_and_check_do_what_they_say(rows):
    (nhd,), (hnd,) = rows("--page-size", "16"), rows("--page-size", "16", "--layout", "HND")
    assert hnd["layout"] == "HND" and [nhd[f] for f in CHECKED] == [hnd[f] for f in CHECKED]
    counts = {"--warmup-iterations": "3", "--profiling-iterations": "4"}
    (row,) = rows("--flush-mib", "1", **counts)
    assert (row["warmup_iterations"], row["profiling_iterations"], row["flush_mib"]) == (3, 4, 1)
    assert 0 < row["min_ms"] <= row["median_ms"]
    (unchecked,) = rows("--check", "off")
    assert unchecked["status"] == "unchecked" and all(unchecked[f] is None for f in CHECKED)


def save(folder, **arrays):
    options = []
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
        options += [f"--load-{name}", str(folder / f"{name}.npy")]
    return options


@pytest.fixture
def load(static_build):
    """Runs on files alone, whose shapes give the sizes."""

    def run(*arguments):
        command = [static_build / "tools/sample_runner/sample_runner", "--output", "json", *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return result.returncode, result.stderr, json.loads(result.stdout) if result.returncode == 0 else None

    return run


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_npy_files_give_data_and_sizes(dtype, load, tmp_path):
    """Small whole numbers are exact in fp16, so its format error vanishes; generated data would not do that."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.integers(-4, 5, size=s).astype(dtype) for s in ((2, 3, 6, 40), (2, 50, 3, 40), (2, 50, 3, 40)))
    code, message, report = load("--kv-format", "fp16", *save(tmp_path, q=q, k=k, v=v))
    assert code == 0, message
    sizes = {
        name: report[0][name]
        for name in ("batch_size", "seq_q_max", "seq_k_max", "num_q_heads", "num_kv_heads", "head_dim")
    }
    assert list(sizes.values()) == [2, 3, 50, 6, 3, 40]
    assert report[0]["k_format_error"] == report[0]["v_format_error"] == 0 and report[0]["status"] == "right"


def test_codes_come_with_their_scales(load, tmp_path):
    rng = np.random.default_rng(1)
    q = rng.normal(size=(2, 1, 4, 64)).astype(np.float32)
    k, v = rng.integers(-127, 128, size=(2, 2, 30, 2, 64)).astype(np.int8)
    np.save(tmp_path / "k_scale.npy", rng.uniform(0.01, 0.02, size=(2, 30, 2)).astype(np.float16))
    scales = ["--k-scale", f"file:{tmp_path / 'k_scale.npy'}", "--v-scale", "head:0.01,0.03"]
    code, message, report = load("--kv-format", "int8", *save(tmp_path, q=q, k=k, v=v), *scales)
    assert code == 0 and (report[0]["k_scale"], report[0]["v_scale"]) == ("token_head", "head"), message


@pytest.mark.parametrize("element_type", ["float32", "bfloat16"])
def test_raw_files_need_their_type_and_sizes(element_type, load, tmp_path):
    k = np.random.default_rng(2).normal(size=(1, 20, 2, 64)).astype(np.float32)
    bits = k if element_type == "float32" else (k.view(np.uint32) >> 16).astype(np.uint16)
    (tmp_path / "k.bin").write_bytes(bits.tobytes())
    sizes = [
        "--batch-size",
        1,
        "--seq-k",
        20,
        "--num-q-heads",
        2,
        "--num-kv-heads",
        2,
        "--head-dim",
        64,
        "--kv-format",
        "bf16",
    ]
    code, message, _ = load("--load-k", tmp_path / "k.bin", *sizes)
    assert code == 2 and "is raw, so --load-type must say its type" in message
    code, message, report = load("--load-k", tmp_path / "k.bin", "--load-type", element_type, *sizes)
    assert code == 0, message
    assert (report[0]["k_format_error"] == 0) is (element_type == "bfloat16")


def test_broken_files_exit_with_2_and_name_the_file(load, tmp_path):
    k = np.zeros((2, 20, 2, 64), np.float32)
    path = tmp_path / "k.npy"
    for spoil, rule in (
        (lambda: np.save(path, np.asfortranarray(np.ones((2, 20, 2, 64), np.float32))), "must be in C order"),
        (lambda: np.save(path, k.astype(np.float64)), "type must be <f4"),
        (lambda: np.save(path, k[0]), "[20, 2, 64]"),
        (lambda: path.write_bytes(b"not numpy"), "is not a .npy file"),
        (lambda: (np.save(path, k), path.write_bytes(path.read_bytes()[:-8])), "truncated"),
        (lambda: (np.save(path, k), path.write_bytes(path.read_bytes() + b"12345678")), "longer than its shape"),
        (lambda: (np.save(path, k), path.write_bytes(path.read_bytes()[:30])), "k.npy"),
    ):
        spoil()
        code, message, _ = load("--load-k", path)
        assert code == 2 and "k.npy" in message and rule in message, message
