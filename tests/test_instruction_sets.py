"""Every CPU instruction set that this machine can run gives the same answers; the forced one is the one that ran."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bridge import check, decode_arrays
from cases import Case, make_problem
from ragged import (
    RaggedCase,
    arrays,
    check_hybrid,
    check_prefill,
    make_hybrid_problem,
    make_prefill_problem,
    prefill_tensors,
)

import pyquantattn
from pyquantattn import _core

PAIRS = ["fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2", "fp16/int8", "bf16/fp8_e4m3", "int8/fp8_e4m3"]
CPU_VARIANTS = list(dict.fromkeys(row[1] for row in _core.decode_kernels() if row[0] == "cpu" and row[6]))
SHAPES = [
    Case(),
    Case(group=1, head_dim=128, num_q_tokens=3, seq_lens=(300, 0, 37)),
    Case(group=8, head_dim=80, seq_lens=(64, 65, 1)),
    Case(group=17, num_kv_heads=2, seq_lens=(140, 0, 9)),  # more rows than any format multiplies without an operand
    Case(group=5, head_dim=40, page_size=3, layout="HND", seq_lens=(33, 7, 0)),
    Case(
        group=3,
        head_dim=72,
        num_q_tokens=2,
        seq_lens=(70, 3, 0, 33),
        alibi="rows",
        sliding_window=21,
        logits_soft_cap=6.0,
        has_sinks=True,
        has_starts=True,
    ),
]


@pytest.mark.parametrize("variant", CPU_VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kv_format", PAIRS)
def test_every_instruction_set_matches_the_reference(kv_format, shape, variant):
    problem = make_problem(replace(shape, kv_format=kv_format))
    with pyquantattn.force_kernel(variant):
        check(problem, "cpu")
        assert pyquantattn.last_kernel().variant == variant
        if kv_format in ("int8", "fp8_e4m3", "fp8_e5m2"):
            check(make_problem(replace(shape, kv_format=kv_format, scales="head")), "cpu")


RAGGED_SHAPES = [
    RaggedCase(q_lens=(37, 0, 100, 1, 17)),
    RaggedCase(group=1, head_dim=128, seq_lens=(150, 0, 37), causal=False),
    RaggedCase(group=5, head_dim=40, page_size=3, layout="HND", seq_lens=(33, 70, 0), q_lens=(40, 3, 2)),
    RaggedCase(
        group=3,
        head_dim=72,
        q_lens=(30, 3, 130, 1, 70),
        alibi="rows",
        sliding_window=21,
        logits_soft_cap=6.0,
        has_sinks=True,
        has_starts=True,
    ),
]


@pytest.mark.parametrize("variant", CPU_VARIANTS)
@pytest.mark.parametrize("shape", RAGGED_SHAPES, ids=str)
@pytest.mark.parametrize("kv_format", PAIRS)
def test_every_instruction_set_computes_hybrid_batches(kv_format, shape, variant):
    with pyquantattn.force_kernel(variant):
        check_hybrid(make_hybrid_problem(replace(shape, kv_format=kv_format)), "cpu")
        assert pyquantattn.last_kernel().variant == variant


@pytest.mark.parametrize("variant", CPU_VARIANTS)
@pytest.mark.parametrize("shape", RAGGED_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_instruction_set_computes_prompts(dtype, shape, variant):
    with pyquantattn.force_kernel(variant):
        check_prefill(make_prefill_problem(replace(shape, q_dtype=dtype)), "cpu")
        assert pyquantattn.last_kernel().variant == variant


@pytest.mark.parametrize("variant", CPU_VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_instruction_set_keeps_rows_free_of_later_keys(dtype, variant):
    """A1 on every instruction set: tiles that the diagonal crosses multiply nothing by NaN."""
    problem = make_prefill_problem(RaggedCase(seq_lens=(70, 33), head_dim=40, q_dtype=dtype))
    spoiled = replace(problem, k=problem.k.copy(), v=problem.v.copy())
    spoiled.k[41:70] = spoiled.v[41:70] = np.nan
    safe = np.r_[0:41, 70:103]
    with pyquantattn.force_kernel(variant):
        for mine, other in zip(
            arrays(prefill_tensors(problem, "cpu")), arrays(prefill_tensors(spoiled, "cpu")), strict=True
        ):
            np.testing.assert_array_equal(mine[safe], other[safe])


@pytest.mark.parametrize("variant", CPU_VARIANTS)
@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e4m3"])
def test_every_instruction_set_ignores_poison(kv_format, variant):
    """A1 on every instruction set: a vector tail must not read what a shorter one does not."""
    problem = make_problem(Case(kv_format=kv_format, head_dim=40, page_size=3, seq_lens=(1, 2, 15, 17, 63, 0)))
    zeroed = replace(problem, page_table=problem.page_table.copy())
    for name in ("k_codes", "v_codes"):
        codes = getattr(problem, name).copy()
        codes[0] = 0
        setattr(zeroed, name, codes)
    with pyquantattn.force_kernel(variant):
        check(problem, "cpu")
        for mine, other in zip(decode_arrays(problem, "cpu"), decode_arrays(zeroed, "cpu"), strict=True):
            np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("variant", CPU_VARIANTS)
def test_the_environment_chooses_the_instruction_set_of_every_operation(variant):
    """Codecs, append, merge and a part of the attention tests in a process of their own."""
    here = Path(__file__).parent
    selected = [
        "test_codecs.py",
        "test_merge.py",
        "test_cache.py::test_append_writes_the_reference_bits_into_its_slots_and_nothing_else",
        "test_decode.py::test_decode_matches_float64_reference",
        "test_decode.py::test_all_features_together",
        "test_hybrid.py::test_without_causal_order",
        "test_prefill.py::test_first_visible_key",
        "test_instruction_sets.py::test_the_forced_instruction_set_ran",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(str(here / s) for s in selected)],
        env=os.environ | {"QUANTATTN_CPU_ISA": variant},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def test_the_forced_instruction_set_ran():
    forced = os.environ.get("QUANTATTN_CPU_ISA")
    decode_arrays(make_problem(Case()), "cpu")
    best = CPU_VARIANTS[0]
    assert pyquantattn.last_kernel().variant == (forced or best)
    prefill_tensors(make_prefill_problem(RaggedCase()), "cpu")
    assert pyquantattn.last_kernel().variant == (forced or best)


@pytest.mark.parametrize("wrong", ["abacus", "AVX2", "neon" if "neon" not in CPU_VARIANTS else "avx512"])
def test_an_instruction_set_that_cannot_run_is_an_error(wrong):
    """No silent fallback: neither from the environment nor from the context manager."""
    code = (
        "import torch, pyquantattn as p\n"
        "cache = p.KVCache.allocate(1, 4, 1, 64)\n"
        "p.decode_attention(torch.zeros(1, 1, 64), cache, seq_lens=torch.ones(1, dtype=torch.int32))\n"
    )
    environment = os.environ | {"QUANTATTN_CPU_ISA": wrong}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    assert "QUANTATTN_CPU_ISA" in run.stderr and wrong in run.stderr, run.stderr[-500:]
    message = rf"^force_kernel: variant must be one of .*, got '{wrong}'"
    with pytest.raises(ValueError, match=message), pyquantattn.force_kernel(wrong):
        pass


def test_codecs_agree_bit_by_bit_between_threads_of_different_counts():
    x = torch.randn(1000, 2, 72)
    pyquantattn.set_num_threads(1)
    try:
        one = pyquantattn.quantize_kv(x, "fp8_e5m2")
    finally:
        pyquantattn.set_num_threads(None)
    assert torch.equal(one[0].view(torch.uint8), pyquantattn.quantize_kv(x, "fp8_e5m2")[0].view(torch.uint8))
