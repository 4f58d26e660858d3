"""What a GPU's errors look like from Python: one sentence that says who, and never silence."""

import os
import re
import subprocess
import sys

import pytest
import torch

from pyquantattn import KVCache, _core, decode_attention


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_a_cuda_build_without_a_gpu_says_so():
    if not any(name == "cuda" for name, *_ in _core.backends()):
        pytest.skip("this build has no CUDA backend")
    report = run_python("-m", "pyquantattn.doctor", CUDA_VISIBLE_DEVICES="").stdout
    assert re.search(r"^  cuda: not usable here; no usable GPU: \S", report, flags=re.MULTILINE), report


def test_scratch_that_does_not_fit_is_one_sentence(cuda):
    """A part of every item for every 16 keys of a table for a million takes terabytes; the next call is right again."""
    cache = KVCache.allocate(1, 16, 8, 64, device=cuda)
    cache.append(*torch.randn(2, 16, 8, 64, device=cuda), torch.arange(16, device=cuda))
    q, lens = torch.randn(64, 8, 64, device=cuda), torch.full((64,), 16, device=cuda, dtype=torch.int32)
    table = torch.zeros(64, 2**16, device=cuda, dtype=torch.int32)
    expected = decode_attention(q, cache, seq_lens=lens, page_table=table[:, :1])
    sentence = r"^decode_attention: \d+ bytes of scratch could not be allocated, got [^\n]*out of memory[^\n]*$"
    with pytest.raises(RuntimeError, match=sentence):
        decode_attention(q, cache, seq_lens=lens, page_table=table, num_splits=2**16)
    assert torch.equal(decode_attention(q, cache, seq_lens=lens, page_table=table[:, :1]), expected)


AFTER_A_FAULT = """
import torch
from pyquantattn import KVCache, decode_attention

cache = KVCache.allocate(1, 16, 1, 64, device="cuda")
q, lens = torch.zeros(1, 1, 64, device="cuda"), torch.ones(1, dtype=torch.int32, device="cuda")
out = decode_attention(q, cache, seq_lens=lens)
torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")]  # another kernel's assertion, found when it has run
try:
    torch.cuda.synchronize()
except RuntimeError:
    pass
decode_attention(q, cache, seq_lens=lens, out=out)
"""


def test_an_asynchronous_error_is_not_swallowed(cuda):
    """The first call after a kernel has failed raises, says that it is its own launch that cannot be, and why."""
    result = run_python("-c", AFTER_A_FAULT)
    assert result.returncode != 0
    sentence = r"^RuntimeError: decode_attention: .* must succeed, got CUDA error cudaErrorAssert \(.+\)$"
    assert re.search(sentence, result.stderr, flags=re.MULTILINE), result.stderr[-2000:]
