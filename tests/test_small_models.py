"""The small models of this repository and the tool that trains such models."""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="the models are read by safetensors, an extra")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import train_model
from models.attention import alibi_bias
from models.folders import DEFAULT, MODELS, load, names
from models.llama import LlamaConfig
from models.mpt import MptConfig

from pyquantattn.evaluation.huggingface import hash_weights

ROOT = Path(__file__).resolve().parents[1]
MAX_WEIGHT_BYTES = 20e6  # of all models in git
SIZES = ["--hidden-size=64", "--intermediate-size=64", "--layers=1", "--heads=2", "--context=64", "--step-tokens=128"]
ROPE_SIZES = [*SIZES, "--kv-heads=1", "--head-dim=32"]
# The logits of a whole text in float32, by this code and by transformers: another order of summation.
SAME_LOGITS = 2e-3


def train(corpus: Path, out: Path, *arguments: str) -> None:
    """Three steps of the training tool, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_model.py", "train", str(corpus), str(out), "--device", "cpu", *arguments])
        train_model.main()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.xz"
    path.write_bytes(lzma.compress((ROOT / "tools/train_model.py").read_bytes() * 4))
    return path


def test_the_default_is_first_and_all_weights_are_small() -> None:
    assert names()[0] == DEFAULT
    assert sum((MODELS / name / "model.safetensors").stat().st_size for name in names()) <= MAX_WEIGHT_BYTES


@pytest.mark.parametrize("name", names())
def test_every_model_knows_python(name: str) -> None:
    """A byte of source costs an untrained model ln 256 = 5.5 nats, and the letters' frequencies alone 3.2."""
    text = torch.tensor([list((ROOT / "tools/models/corpus.py").read_bytes()[:1000])])
    with torch.inference_mode():
        logits = load(MODELS / name)(text[:, :-1])
    assert torch.nn.functional.cross_entropy(logits[0], text[0, 1:]) < 1.8


@pytest.mark.parametrize("name", names())
def test_transformers_reads_every_model_and_says_the_same(name: str) -> None:
    transformers = pytest.importorskip("transformers", "5.3", reason="needs transformers 5.3")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
    tokens = torch.tensor([list(b"def add(a, b):\n    return a + b\n")])
    with torch.inference_mode():
        torch.testing.assert_close(load(MODELS / name)(tokens), theirs(tokens).logits, rtol=0, atol=SAME_LOGITS)


@pytest.mark.parametrize("name", ["pybyte-key-bias", "pybyte-qk-norm", "pybyte-alibi"])
def test_the_published_tables_are_of_these_weights(name: str) -> None:
    record = json.loads((ROOT / f"benchmarks/accuracy-{name}.json").read_text())
    assert record["inputs"]["model"]["sha256"] == hash_weights(MODELS / name)
    assert record["results"]["controls_passed"]
    words = {spec: figures["verdict"]["word"] for spec, figures in record["results"]["formats"].items()}
    is_fragile = name == "pybyte-key-bias"
    assert words["int8"] == ("do not use" if is_fragile else "indistinguishable")
    assert not is_fragile or words["int8:centred"] == "indistinguishable"


@pytest.mark.parametrize("sizes", [["--model-type", "qwen3", *ROPE_SIZES], ["--model-type", "mpt", *SIZES]])
def test_training_by_steps_repeats_itself(sizes: list[str], corpus: Path, tmp_path: Path) -> None:
    for run, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        train(corpus, tmp_path / run, "--steps", "3", *sizes, "--seed", seed)
    a, b, c = ((tmp_path / run / "model.safetensors").read_bytes() for run in "abc")
    assert a == b and a != c
    record = json.loads((tmp_path / "a/training.json").read_text())
    assert record["steps"] == 3 and record["bytes"] == 3 * 128 and len(record["corpus_sha256"]) == 64


def test_key_biases_stay_as_large_as_they_start(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path, "--steps", "3", "--model-type", "qwen2", "--key-bias", "100", *ROPE_SIZES)
    model = load(tmp_path)
    bias = model.layers[0].self_attn.k_proj.bias
    large = bias.abs() > 1
    assert large.sum() == 3 and bias[large].abs().min() > 45 and bias.abs().max() < 155
    # Only slow rotary pairs have one: the last quarter of either half of a head.
    assert all(index % 16 >= 12 for index in large.nonzero().flatten().tolist())


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--key-bias", "9"], "--key-bias needs --model-type qwen2, got llama"),
        (["--model-type", "mpt", "--hidden-size", "48"], "--intermediate-size must be a multiple of --hidden-size"),
        (["--steps", "1", "--seconds", "1"], "not allowed with argument"),
    ],
)
def test_what_training_refuses(
    arguments: list[str], rule: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refusal:
        train(corpus, tmp_path / "out", *arguments)
    assert rule in f"{refusal.value} {capsys.readouterr().err}"


def test_configurations_say_what_they_cannot_be() -> None:
    sizes = dict.fromkeys(LlamaConfig.__dataclass_fields__, 1) | {"model_type": "bert"}
    with pytest.raises(ValueError, match="model_type must be one of llama, qwen2, qwen3, got 'bert'"):
        LlamaConfig(**sizes)
    with pytest.raises(ValueError, match="n_heads must be a power of two, got 3"):
        _ = MptConfig(256, 96, 1, 3, 4, 64).alibi_slopes
    assert MptConfig(256, 64, 1, 4, 4, 64).alibi_slopes.tolist() == [2**-2, 2**-4, 2**-6, 2**-8]


def test_alibi_falls_with_distance() -> None:
    bias = alibi_bias(torch.tensor([0.5, 2.0]), 3)
    assert bias.shape == (1, 2, 3, 3)
    assert bias[0, 1, 2].tolist() == [-4.0, -2.0, 0.0] and bias[0, 0, 0].tolist()[1:] == [float("-inf")] * 2
