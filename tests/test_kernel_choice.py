"""Which kernel runs: each that this machine has is right, says its name and can be forced; the choice is visible."""

from dataclasses import replace

import pytest
import torch
from bridge import tensor_of_values
from ragged import (
    RaggedCase,
    arrays,
    check_hybrid,
    check_prefill,
    cumulative,
    hybrid_tensors,
    make_hybrid_problem,
    make_prefill_problem,
)
from test_hybrid import EVERYTHING

from pyquantattn import UnsupportedError, _core, doctor, force_kernel, last_kernel, prefill_attention
from pyquantattn.runtime import decode_variants, prefill_variants

RUNNABLE_PREFILL = [row[:3] for row in _core.prefill_kernels() if row[6]]
LONG = RaggedCase(
    seq_lens=(300, 0, 65, 17), q_lens=(300, 0, 20, 17), alibi="heads", logits_soft_cap=8.0, has_sinks=True
)


@pytest.fixture
def hopper(cuda):
    if "hopper" not in prefill_variants():
        pytest.skip("needs a GPU of compute capability 9.0 and a build with code for it")
    return cuda


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("backend", "variant", "dtype"), RUNNABLE_PREFILL)
def test_every_prefill_kernel_is_right_when_forced(backend, variant, dtype, causal):
    with force_kernel(variant):
        check_prefill(make_prefill_problem(replace(LONG, q_dtype=dtype, causal=causal)), backend)
        assert last_kernel().variant == variant


def test_doctor_lists_every_kernel():
    report = "\n".join(doctor.report())
    for variant in (*decode_variants(), *prefill_variants()):
        assert f" {variant} (runs here)" in report


def test_the_hopper_kernel_is_preferred_and_said(hopper):
    problem = make_prefill_problem(RaggedCase())
    check_prefill(problem, hopper)
    assert last_kernel().variant == "hopper"


def unaligned(rows, device):
    """Vectors of K or V at addresses that the copy engine does not read."""
    return tensor_of_values(rows, "float16", device)[..., 4:]


def test_rows_that_the_copy_engine_cannot_read_go_to_the_other_kernel(hopper):
    """A choice by the tensors: never an error, unless the Hopper kernel was asked for by name."""
    problem = make_prefill_problem(RaggedCase(head_dim=68))
    q, k, v = (unaligned(x, hopper) for x in (problem.q, problem.k, problem.v))
    ends = torch.from_numpy(cumulative(problem.case.query_lengths)).to(hopper)
    out = prefill_attention(q, k, v, cu_seqlens_q=ends)
    assert last_kernel().variant == "tensor_cores"
    aligned = prefill_attention(*(x.contiguous() for x in (q, k, v)), cu_seqlens_q=ends)
    assert last_kernel().variant == "hopper"
    torch.testing.assert_close(out, aligned, rtol=2e-3, atol=2e-3)
    with (
        force_kernel("hopper"),
        pytest.raises(UnsupportedError, match="prefill_attention: the hopper kernel must have"),
    ):
        prefill_attention(q, k, v, cu_seqlens_q=ends)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_format", ["fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("page_size", [16, 64, None])
def test_both_kernels_serve_the_prompts_of_a_hybrid_batch(page_size, kv_format, causal, hopper):
    dtype = "bfloat16" if kv_format == "bf16" else "float16"
    case = replace(EVERYTHING, kv_format=kv_format, q_dtype=dtype, page_size=page_size, causal=causal)
    problem = make_hybrid_problem(case)
    check_hybrid(problem, hopper)
    assert last_kernel().variant == "tensor_cores+hopper"
    with force_kernel("tensor_cores"):
        check_hybrid(problem, hopper)
        assert last_kernel().variant == "tensor_cores"


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("page_size", [8, 20, 24, 40, 200])
@pytest.mark.parametrize("kv_format", ["fp16", "int8"])
def test_the_hopper_kernel_reads_pages_of_any_number_of_eight_tokens(kv_format, page_size, head_dim, layout, hopper):
    """Key tiles are made of boxes of one page; of 16-bit caches they hold whole rows, but where head_dim is 192."""
    case = replace(EVERYTHING, kv_format=kv_format, page_size=page_size, head_dim=head_dim, layout=layout)
    check_hybrid(make_hybrid_problem(case), hopper)
    assert last_kernel().variant == ("tensor_cores+hopper" if page_size % 8 == 0 else "tensor_cores")


def test_the_cuda_core_kernel_can_be_forced_on_a_hybrid_batch(cuda):
    problem = make_hybrid_problem(EVERYTHING)
    with force_kernel("cuda_cores"):
        check_hybrid(problem, cuda)
        assert last_kernel().variant == "cuda_cores"


def test_a_hybrid_batch_refuses_the_name_of_a_kernel_for_prompts_alone(hopper):
    message = "no kernel for head_dim 64 and kv_format int8 with kernel hopper"
    with force_kernel("hopper"), pytest.raises(UnsupportedError, match=message):
        hybrid_tensors(make_hybrid_problem(EVERYTHING), hopper)


def test_the_environment_chooses_for_operations_that_have_the_kernel(hopper, monkeypatch):
    """QUANTATTN_CUDA_KERNEL=hopper says nothing of decoding, "cuda_cores" nothing of fresh K and V."""
    prompts, batch = make_prefill_problem(LONG), make_hybrid_problem(replace(EVERYTHING, kv_format="fp16"))
    expected = {"tensor_cores": ("tensor_cores", "tensor_cores"), "hopper": ("hopper", "tensor_cores+hopper")}
    expected["cuda_cores"] = ("hopper", "cuda_cores")
    for name, variants in expected.items():
        monkeypatch.setenv("QUANTATTN_CUDA_KERNEL", name)
        check_prefill(prompts, hopper)
        assert last_kernel().variant == variants[0]
        assert arrays(hybrid_tensors(batch, hopper))[0].any()
        assert last_kernel().variant == variants[1]
