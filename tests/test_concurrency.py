"""Several Python threads, forks, and the GIL."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from bridge import check, decode_arrays, keywords, make_cache, query_tensor
from cases import Case, make_problem
from ragged import (
    RaggedCase,
    arrays,
    check_hybrid,
    check_prefill,
    hybrid_tensors,
    make_hybrid_problem,
    make_prefill_problem,
    prefill_arguments,
    prefill_keywords,
    prefill_tensors,
)

import pyquantattn

CASE = Case(seq_lens=(700, 37, 0, 513), group=4)


def test_threads_that_decode_at_once_do_not_disturb_each_other(device):
    """Each thread has problems of its own, of several shapes, and checks every result."""
    problems = [
        make_problem(replace(CASE, seed=s, kv_format=f)) for s, f in enumerate(("int8", "fp16", "fp8_e4m3", "bf16"))
    ]
    expected = [decode_arrays(p, device) for p in problems]
    failures = []

    def work(index):
        try:
            for _ in range(15):
                for mine, result in zip(decode_arrays(problems[index], device), expected[index], strict=True):
                    np.testing.assert_array_equal(mine, result)
        except BaseException as error:
            failures.append((index, error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_threads_that_prefill_and_decode_at_once_do_not_disturb_each_other(hybrid_device):
    """All three operations side by side, each with scratch of its own."""
    prompts = RaggedCase(seq_lens=(300, 0, 70), q_lens=(300, 3, 20))
    prefill, hybrid = make_prefill_problem(prompts), make_hybrid_problem(prompts)
    bf16, decode = make_hybrid_problem(replace(prompts, kv_format="bf16")), make_problem(CASE)
    calls = [
        lambda: arrays(prefill_tensors(prefill, hybrid_device)),
        lambda: arrays(hybrid_tensors(hybrid, hybrid_device)),
        lambda: arrays(hybrid_tensors(bf16, hybrid_device)),
        lambda: decode_arrays(decode, hybrid_device),
    ]
    expected, failures = [call() for call in calls], []

    def work(index):
        try:
            for _ in range(15):
                for mine, result in zip(calls[index](), expected[index], strict=True):
                    np.testing.assert_array_equal(mine, result)
        except BaseException as error:
            failures.append((index, error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_threads_may_append_to_different_slots_of_one_cache(device):
    cache = pyquantattn.KVCache.allocate(64, 16, 2, 64, device=device)
    k, v = torch.randn(2, 1024, 2, 64, device=device)
    parts = torch.arange(1024, device=device).chunk(8)
    threads = [threading.Thread(target=cache.append, args=(k[p], v[p], p)) for p in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected, scale = pyquantattn.quantize_kv(k, "int8")
    assert torch.equal(cache.k.reshape(1024, 2, 64), expected) and torch.equal(cache.k_scale.reshape(1024, 2), scale)


def long_calls():
    """One call of each operation that takes many milliseconds."""
    heads, dim, length = 8, 128, 60000
    cache = pyquantattn.KVCache.allocate(1, length, heads, dim, kv_format="int8")
    q = torch.randn(64, 8, dim)
    lens, ends = torch.tensor([length], dtype=torch.int32), torch.tensor([0, 64], dtype=torch.int32)
    prompt, prompt_ends = torch.randn(1024, heads, dim), torch.tensor([0, 1024], dtype=torch.int32)
    return {
        "decode_attention": lambda: pyquantattn.decode_attention(q[None, :, 0], cache, seq_lens=lens),
        "hybrid_attention": lambda: pyquantattn.hybrid_attention(q, cache, cu_seqlens_q=ends, seq_lens=lens),
        "prefill_attention": lambda: pyquantattn.prefill_attention(prompt, prompt, prompt, cu_seqlens_q=prompt_ends),
    }


@pytest.mark.parametrize("operation", ["decode_attention", "hybrid_attention", "prefill_attention"])
def test_the_gil_is_released_while_a_kernel_runs(operation):
    """A Python loop in another thread goes on while one long call runs."""
    call = long_calls()[operation]
    call()
    ticks, done = [], threading.Event()

    def count():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0002)

    ticker = threading.Thread(target=count)
    ticker.start()
    start = time.perf_counter()
    while time.perf_counter() - start < 10:  # one call suffices; a busy machine may need several
        begin = time.perf_counter()
        call()
        end = time.perf_counter()
        inside = sum(begin < t < end for t in ticks)
        if inside >= 3 and end - begin > 0.002:
            break
    done.set()
    ticker.join()
    assert inside >= 3, f"{inside} ticks in a call of {1e3 * (end - begin):.1f} ms"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("num_children", [1, 3])
def test_a_forked_child_can_decode_and_prefill(num_children):
    """Threads of a pool do not survive a fork; the child must get new ones instead of waiting for ever."""
    problem = make_problem(CASE)
    q, cache, given = query_tensor(problem, "cpu"), make_cache(problem, "cpu"), keywords(problem, "cpu")
    prompts = make_prefill_problem(RaggedCase())
    tensors, options = prefill_arguments(prompts, "cpu"), prefill_keywords(prompts, "cpu")

    def run():
        return pyquantattn.decode_attention(q, cache, **given), pyquantattn.prefill_attention(*tensors, **options)

    expected = run()

    def is_same():
        # In NumPy: torch's own parallel operations do not survive a fork.
        return all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(run(), expected, strict=True))

    for _ in range(num_children):
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if is_same() else 3)
            except BaseException:
                os._exit(4)
        assert exit_status(child, seconds=30) == 0
    assert is_same(), "the parent goes on"


def exit_status(child, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.skipif("backend: OpenMP" not in torch.__config__.parallel_info(), reason="torch without OpenMP")
def test_a_call_runs_on_the_threads_that_torch_has_started():
    """Threads of its own would share the cores with torch's, which spin after each operation."""
    script = """
import os, torch, pyquantattn
torch.set_num_threads(3)
torch.ones(1 << 22).add_(1)
started = len(os.listdir("/proc/self/task"))
cache = pyquantattn.KVCache.allocate(1, 4096, 4, 64)
pyquantattn.set_num_threads(3)
pyquantattn.decode_attention(torch.zeros(1, 4, 64), cache, seq_lens=torch.tensor([4096], dtype=torch.int32))
print(started, len(os.listdir("/proc/self/task")))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    before, after = map(int, result.stdout.split())
    assert before >= 3 and after == before


def test_results_are_right_with_more_threads_than_cores():
    problem = make_problem(replace(CASE, seq_lens=(2, 1, 0, 3, 1000)))
    try:
        pyquantattn.set_num_threads(16)
        check(problem, "cpu")
        check_prefill(make_prefill_problem(RaggedCase()), "cpu")
        check_hybrid(make_hybrid_problem(RaggedCase()), "cpu")
    finally:
        pyquantattn.set_num_threads(None)
