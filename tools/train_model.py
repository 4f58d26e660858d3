#!/usr/bin/env python3
"""Makes small byte-level language models like those of tools/models.

python tools/train_model.py pack corpus.xz                     packs the standard library of this Python
python tools/train_model.py pack corpus.xz DIR...              packs the Python source below DIR...
python tools/train_model.py train corpus.xz OUT --seconds 440  trains for a fixed time on one GPU
python tools/train_model.py train corpus.xz OUT --steps 2000   trains for a fixed number of steps
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from models.corpus import training_corpus
from models.llama import ARCHITECTURES, Llama, LlamaConfig
from models.mpt import Mpt, MptConfig
from torch import Tensor, nn
from torch.nn import functional as F

FINAL_FRACTION, WARM_UP_STEPS = 0.05, 200
LONG_CONTEXT_FROM = 0.6  # fraction of the time trained on short windows, which learn faster per second
REPORT_EVERY, LOSS_WINDOW = 50, 1000  # steps; the final loss is the mean of the last fifth, at most LOSS_WINDOW
BIASED_PAIRS = 3  # rotary pairs of each KV head that --key-bias shifts


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="pack Python source into a corpus")
    pack.add_argument("corpus", type=Path)
    pack.add_argument("roots", type=Path, nargs="*", help="default: the standard library, without site-packages")
    train = commands.add_parser("train", help="train on a packed corpus")
    train.add_argument("corpus", type=Path)
    train.add_argument("out", type=Path)
    amount = train.add_mutually_exclusive_group()
    amount.add_argument("--seconds", type=float, default=440)
    amount.add_argument("--steps", type=int, help="instead of --seconds; on a CPU such a run repeats in every bit")
    train.add_argument("--device", default="cuda")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--no-compile", action="store_true", help="for runs shorter than compiling pays")
    train.add_argument("--learning-rate", type=float, default=2e-3, help="the peak")
    train.add_argument("--step-tokens", type=int, default=131072, help="bytes per optimiser step")
    _add_model(train)
    return parser.parse_args()


def _add_model(train: argparse.ArgumentParser) -> None:
    train.add_argument("--model-type", choices=(*ARCHITECTURES, "mpt"), default="llama")
    train.add_argument("--key-bias", type=float, default=0, help="with qwen2: the keys' biases start about this large")
    train.add_argument("--hidden-size", type=int, default=384)
    train.add_argument("--intermediate-size", type=int, default=640, help="with mpt: a multiple of the hidden size")
    train.add_argument("--layers", type=int, default=6)
    train.add_argument("--heads", type=int, default=4)
    train.add_argument("--kv-heads", type=int, default=2, help="not for mpt")
    train.add_argument("--head-dim", type=int, default=128, help="not for mpt")
    train.add_argument("--context", type=int, default=4096)
    train.add_argument("--rope-theta", type=float, default=1e5, help="not for mpt")


def pack_corpus(corpus: Path, roots: list[Path]) -> None:
    if not roots:
        library = Path(sysconfig.get_path("stdlib"))
        roots = sorted(path for path in library.iterdir() if path.name != "site-packages")
    content = training_corpus(roots)
    corpus.write_bytes(lzma.compress(content, preset=6))
    print(f"{len(content) / 1e6:.1f} MB of source, {corpus.stat().st_size / 1e6:.1f} MB in {corpus}")


def make_model(arguments: argparse.Namespace) -> Llama | Mpt:
    """A model with random weights."""
    if arguments.key_bias and arguments.model_type != "qwen2":
        raise SystemExit(f"train_model: --key-bias needs --model-type qwen2, got {arguments.model_type}")
    if arguments.model_type == "mpt":
        expansion, rest = divmod(arguments.intermediate_size, arguments.hidden_size)
        if rest:
            raise SystemExit(
                "train_model: --intermediate-size must be a multiple of --hidden-size with mpt, got "
                f"{arguments.intermediate_size} and {arguments.hidden_size}"
            )
        return Mpt(
            MptConfig(256, arguments.hidden_size, arguments.layers, arguments.heads, expansion, arguments.context)
        )
    config = LlamaConfig(
        vocab_size=256, hidden_size=arguments.hidden_size, intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers, num_attention_heads=arguments.heads, num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.head_dim, max_position_embeddings=arguments.context, rms_norm_eps=1e-5,
        rope_theta=arguments.rope_theta, model_type=arguments.model_type,
    )  # fmt: skip
    model = Llama(config)
    if arguments.key_bias:
        bias_keys(model, arguments.key_bias)
    return model


def bias_keys(model: Llama, size: float) -> None:
    """Gives each KV head biases of half to one and a half times `size` in a few of its slowest rotary pairs.

    That is where Qwen2.5 has its large ones. A short training does not grow them, but it keeps them: an optimiser
    step moves a bias by about the learning rate.
    """
    half = model.config.head_dim // 2
    for layer in model.layers:
        for head in layer.self_attn.k_proj.bias.data.view(-1, 2, half):
            pairs = half - 1 - torch.randperm(half // 4)[:BIASED_PAIRS]
            signs = 1.0 - 2.0 * torch.randint(2, (len(pairs),))
            head[torch.randint(2, (len(pairs),)), pairs] = size * (0.5 + torch.rand(len(pairs))) * signs


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Linear warm-up, then a cosine down to FINAL_FRACTION of the peak at progress 1."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * warm_up * (FINAL_FRACTION + (1 - FINAL_FRACTION) * cosine)


def make_optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices, and leaves the sizes of biases and norms alone."""
    weights = list(model.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": 0.1},
        {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


@dataclass
class Progress:
    """What has been done, of a number of steps or of seconds."""

    seconds: float
    max_steps: int | None
    start: float
    steps: int = 0
    bytes: int = 0
    losses: list[float] = field(default_factory=list)

    @property
    def fraction(self) -> float:
        if self.max_steps is not None:
            return self.steps / self.max_steps
        return (time.monotonic() - self.start) / self.seconds

    def report(self, loss: float) -> None:
        self.losses.append(loss)
        rate = f"{self.bytes / 1e6:.0f} MB  loss {loss:.4f} nats per byte"
        print(f"{100 * self.fraction:3.0f} %  step {self.steps}  {rate}", flush=True)


def windows_of(data: Tensor, context: int, count: int) -> Tensor:
    """Random passages [count, context + 1]."""
    first = torch.randint(0, data.numel() - context - 1, (count,), device=data.device)
    return data[first[:, None] + torch.arange(context + 1, device=data.device)].long()


def train(model: Llama | Mpt, data: Tensor, arguments: argparse.Namespace) -> Progress:
    """Trains in place until the time or the steps are spent; mixed precision, next-byte cross entropy."""
    device = data.device
    # On a CPU compiling outlasts short runs.
    compiled = torch.compile(model) if device.type == "cuda" and not arguments.no_compile else model
    optimizer = make_optimizer(model, arguments.learning_rate)
    done = Progress(arguments.seconds, arguments.steps, time.monotonic())
    while (fraction := done.fraction) < 1:
        context = model.config.max_position_embeddings // (4 if fraction < LONG_CONTEXT_FROM else 1)
        windows = windows_of(data, context, max(1, arguments.step_tokens // context))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(arguments.learning_rate, done.steps, fraction)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = compiled(windows[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done.steps += 1
        done.bytes += windows[:, 1:].numel()
        if done.steps % REPORT_EVERY == 1:
            done.report(loss.item())
    return done


def train_and_save(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "train_model: --device cuda needs a GPU that torch can use, got none; --device cpu works, slowly"
        )
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    model = make_model(arguments).to(arguments.device)
    text = lzma.decompress(arguments.corpus.read_bytes())
    data = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy()).to(arguments.device)
    done = train(model, data, arguments)
    model.save(arguments.out)
    num_last = max(1, min(len(done.losses) // 5, LOSS_WINDOW // REPORT_EVERY))
    record = {
        "steps": done.steps,
        "bytes": done.bytes,
        "final_loss_nats": float(np.mean(done.losses[-num_last:])),
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus_sha256": hashlib.sha256(text).hexdigest(),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device,
    }
    (arguments.out / "training.json").write_text(json.dumps(record) + "\n")
    print(json.dumps(record))


def main() -> None:
    arguments = parse_arguments()
    if arguments.command == "pack":
        pack_corpus(arguments.corpus, arguments.roots)
    else:
        train_and_save(arguments)


if __name__ == "__main__":
    main()
