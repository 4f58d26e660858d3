"""A language model of two layers with random weights, for tests of the evaluation: a text takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pyquantattn.evaluation.language_model import Attend
from pyquantattn.evaluation.run import Text

VOCABULARY, WIDTH, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, MAX_LENGTH = 32, 64, 4, 2, 64, 256


def causal_attention(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@dataclass
class TinyModel:
    """Implements pyquantattn.evaluation.language_model.LanguageModel."""

    seed: int = 0
    num_layers: int = 2
    name: str = "tiny"
    max_length: int = MAX_LENGTH
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self.embedding, self.positions = self._weight(VOCABULARY), self._weight(MAX_LENGTH)
        q_width, kv_width = NUM_Q_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
        self.layers = [
            (*(self._weight(WIDTH, width) for width in (q_width, kv_width, kv_width)), self._weight(q_width, WIDTH))
            for _ in range(self.num_layers)
        ]

    def _weight(self, rows: int, columns: int = WIDTH) -> Tensor:
        return torch.randn(rows, columns, generator=self._generator)

    @property
    def identity(self) -> dict[str, object]:
        return {"seed": self.seed}

    def logits(self, tokens: Tensor, first_position: int, attend: Attend | None) -> Tensor:
        attention = causal_attention if attend is None else attend
        x = self.embedding[tokens] + self.positions[first_position : first_position + len(tokens)]
        for index, (*projections, output) in enumerate(self.layers):
            normal = F.rms_norm(x, (WIDTH,))
            q, k, v = ((normal @ w / WIDTH**0.5).unflatten(-1, (-1, HEAD_DIM))[None] for w in projections)
            x = x + attention(index, q, k, v)[0].flatten(1) @ output / WIDTH**0.5
        return F.rms_norm(x, (WIDTH,)) @ self.embedding.T / WIDTH**0.5

    def tokenize(self, text: str) -> Tensor:
        return torch.tensor([ord(letter) % VOCABULARY for letter in text])

    def texts(self, count: int, length: int) -> list[Text]:
        tokens = torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(7))
        return [Text(f"text {index}", row) for index, row in enumerate(tokens)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small are faster alone: threads of torch and of the kernels would wait for one another."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


class CountingProgress:
    """Counts the work of each stage; raises KeyboardInterrupt where the work done reaches a limit."""

    def __init__(self, interrupt_stage: str | None = None, after: int = 0) -> None:
        self.done: dict[str, int] = {}
        self.totals: dict[str, int] = {}
        self._interrupt_stage, self._after = interrupt_stage, after

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        self.totals[name], self.done[name] = total, 0

        def advance(count: int) -> None:
            self.done[name] += count
            if name == self._interrupt_stage and self.done[name] >= self._after:
                raise KeyboardInterrupt

        yield advance
