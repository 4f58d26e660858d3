#!/usr/bin/env python3
"""Makes a small byte-level Llama like tools/models/pybyte-8m.

python tools/train_model.py pack corpus.xz DIR...              packs the Python source below DIR...
python tools/train_model.py train corpus.xz OUT --seconds 440  trains for a fixed time on one GPU
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from models.corpus import training_corpus
from models.llama import Llama, LlamaConfig
from torch import Tensor
from torch.nn import functional as F

PEAK_LEARNING_RATE, FINAL_FRACTION, WARM_UP_STEPS = 2e-3, 0.05, 200
LONG_CONTEXT_FROM = 0.6  # fraction of the time trained on short windows, which learn faster per second
REPORT_EVERY, LOSS_WINDOW = 50, 1000  # steps; the final loss is the mean of the last LOSS_WINDOW


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="pack Python source into a corpus")
    pack.add_argument("corpus", type=Path)
    pack.add_argument("roots", type=Path, nargs="+")
    train = commands.add_parser("train", help="train on a packed corpus")
    train.add_argument("corpus", type=Path)
    train.add_argument("out", type=Path)
    train.add_argument("--seconds", type=float, default=440)
    train.add_argument("--device", default="cuda")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--hidden-size", type=int, default=384)
    train.add_argument("--intermediate-size", type=int, default=640)
    train.add_argument("--layers", type=int, default=6)
    train.add_argument("--heads", type=int, default=4)
    train.add_argument("--kv-heads", type=int, default=2)
    train.add_argument("--head-dim", type=int, default=128)
    train.add_argument("--context", type=int, default=4096)
    train.add_argument("--rope-theta", type=float, default=1e5)
    train.add_argument("--step-tokens", type=int, default=131072, help="bytes per optimiser step")
    return parser.parse_args()


def pack_corpus(corpus: Path, roots: list[Path]) -> None:
    content = training_corpus(roots)
    corpus.write_bytes(lzma.compress(content, preset=6))
    print(f"{len(content) / 1e6:.1f} MB of source, {corpus.stat().st_size / 1e6:.1f} MB in {corpus}")


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up, then a cosine down to FINAL_FRACTION of the peak at progress 1."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    return (
        PEAK_LEARNING_RATE
        * warm_up
        * (FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress)))
    )


@dataclass
class Progress:
    steps: int
    bytes: int
    losses: list[float]


def train(model: Llama, data: Tensor, seconds: float, step_tokens: int) -> Progress:
    """Trains in place until the time is spent; mixed precision, next-byte cross entropy."""
    device = data.device
    compiled = torch.compile(model) if device.type == "cuda" else model  # on a CPU compiling outlasts short runs
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    done, start = Progress(0, 0, []), time.monotonic()
    while (progress := (time.monotonic() - start) / seconds) < 1:
        context = model.config.max_position_embeddings // (4 if progress < LONG_CONTEXT_FROM else 1)
        first = torch.randint(0, data.numel() - context - 1, (max(1, step_tokens // context),), device=device)
        windows = data[first[:, None] + torch.arange(context + 1, device=device)].long()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done.steps, progress)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = compiled(windows[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done.steps += 1
        done.bytes += first.numel() * context
        if done.steps % REPORT_EVERY == 1:
            done.losses.append(loss.item())
            rate = f"{done.bytes / 1e6:.0f} MB  loss {done.losses[-1]:.4f} nats per byte"
            print(f"{100 * progress:3.0f} %  step {done.steps}  {rate}", flush=True)
    return done


def train_and_save(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "train_model: --device cuda needs a GPU that torch can use, got none; --device cpu works, slowly"
        )
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    config = LlamaConfig(
        vocab_size=256, hidden_size=arguments.hidden_size, intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers, num_attention_heads=arguments.heads, num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.head_dim, max_position_embeddings=arguments.context, rms_norm_eps=1e-5,
        rope_theta=arguments.rope_theta,
    )  # fmt: skip
    model = Llama(config).to(arguments.device)
    text = lzma.decompress(arguments.corpus.read_bytes())
    data = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy()).to(arguments.device)
    done = train(model, data, arguments.seconds, arguments.step_tokens)
    model.save(arguments.out)
    record = {
        "steps": done.steps,
        "bytes": done.bytes,
        "final_loss_nats": float(np.mean(done.losses[-LOSS_WINDOW // REPORT_EVERY :])),
        "parameters": sum(p.numel() for p in model.parameters()),
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
