"""The demo's report: Markdown, JSON and plots from the records of the formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .attention_error import AttentionErrors

Record = dict[str, Any]

COLUMNS: list[tuple[str, str]] = [
    ("KV format", "{kv_format}"),
    ("bits per element", "{bits_per_element:.3f}"),
    ("cache MB", "{cache_megabytes:.2f}"),
    ("saved against fp16", "{saving_percent:.1f} %"),
    ("codec error", "{codec_error_mean:.2e}"),
    ("codec error p99", "{codec_error_p99:.2e}"),
    ("kernel error, largest", "{kernel_error_max:.1e}"),
    ("LSE error", "{codec_lse_error_mean:.1e}"),
    ("ms per step", "{milliseconds:.3f}"),
    ("KL, 1e-3 nats", "{kl_milli:.3f} ± {kl_se_milli:.3f}"),
    ("same top-1", "{same_top_1_percent:.1f} %"),
]

# The same for a terminal of 80 columns.
NARROW_COLUMNS: list[tuple[str, str]] = [
    ("KV format", "{kv_format}"),
    ("bits", "{bits_per_element:.2f}"),
    ("MB", "{cache_megabytes:.1f}"),
    ("saved", "{saving_percent:.1f} %"),
    ("codec", "{codec_error_mean:.1e}"),
    ("kernel", "{kernel_error_max:.0e}"),
    ("LSE", "{codec_lse_error_mean:.0e}"),
    ("ms", "{milliseconds:.2f}"),
    ("KL e-3", "{kl_milli:.3f}"),
    ("top-1", "{same_top_1_percent:.1f}"),
]

# Text that the model writes: prompts through prefill_attention, then token by token over the cache.
GENERATION_COLUMNS: list[tuple[str, str]] = [
    ("KV format", "{kv_format}"),
    ("prompt tokens/s", "{prompt_tokens_per_second:.0f}"),
    ("written tokens/s", "{tokens_per_second:.0f}"),
    ("agreement", "{agreement_percent:.1f} %"),
    ("same as fp16", "{common_prefix_with_fp16}"),
]

LEGEND = """\
- **codec error**: float64 attention over the stored codes * scales against float64 attention over the original K and
  V; L2 distance of an output vector relative to its norm, mean and 99th percentile over layers, context lengths,
  sequences, queries and heads.
- **kernel error**: `decode_attention` against float64 attention over the same codes * scales; the largest of all.
- **LSE error**: mean absolute error of the natural-log log-sum-exp that the codec causes.
- **ms per step**: attention of one decoded token per sequence through all layers, median.
- **KL, same top-1**: every token decoded through the cache, against the model's own full-precision predictions (mean ±
  standard error)."""


def cells(record: Record, columns: list[tuple[str, str]] = COLUMNS) -> list[str]:
    """One row of the main table."""
    return [text.format(**record) for _, text in columns]


def _table(head: list[str], body: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def _by_length(records: list[Record]) -> str:
    lengths = records[0]["codec_error_by_length"]
    head = ["KV format", *(f"{length} tokens" for length in lengths)]
    body = [[r["kv_format"], *(f"{error:.2e}" for error in r["codec_error_by_length"].values())] for r in records]
    return _table(head, body)


def _by_layer(records: list[Record]) -> str:
    head = ["KV format", *(f"layer {layer}" for layer in range(len(records[0]["codec_error_by_layer"])))]
    body = [[r["kv_format"], *(f"{error:.2e}" for error in r["codec_error_by_layer"])] for r in records]
    return _table(head, body)


def _generation(records: list[Record], about: Record) -> str:
    """How fast text is read and written, how far it agrees, and some of it."""
    prompt, count = about["prompt_tokens"], about["generated_tokens"]
    table = _table([name for name, _ in GENERATION_COLUMNS], [cells(r, GENERATION_COLUMNS) for r in records])
    samples = [
        f"Over the {r['kv_format']} cache (the prompt's last line first):\n\n"
        f"```python\n...{about['prompt_end']}{r['generated_text']}\n```"
        for r in records
        if r["kv_format"] in about["sample_formats"]
    ]
    return (
        f"{about['sequences']} prompts of {prompt} tokens through {about['prompt_attention']} and `append`, then "
        f"{count} greedy tokens each through `append` and `decode_attention`. Tokens per second are the whole model's, "
        f"all sequences together. Agreement: how many of the tokens full precision would have chosen after the same "
        f"text. Same as fp16: how many first tokens of each sequence are those over the fp16 cache.\n\n{table}\n\n"
        + "\n\n".join(samples)
    )


def write(folder: Path, about: Record, records: list[Record], checks: list[Record]) -> None:
    """Writes report.md and report.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"about": about, "formats": records, "checks": checks}
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    passed = "\n".join(
        f"- {'ok' if check['passed'] else '**BROKEN**'}: {check['rule']}, got {check['got']}" for check in checks
    )
    texts = ", ".join(f"`{name}`" for name in about["texts"])
    (folder / "report.md").write_text(
        f"# KV formats on {about['model']}\n\n"
        f"{about['sequences']} sequences of {about['tokens']} tokens of held-out text "
        f"({texts} of this interpreter's standard library), {about['device']}, kernels: {about['kernel']}, "
        f"{about['threads']} threads.\n\n"
        f"{_table([name for name, _ in COLUMNS], [cells(record) for record in records])}\n\n{LEGEND}\n\n"
        f"## Codec error by context length\n\n{_by_length(records)}\n\n"
        f"## Codec error by layer\n\n{_by_layer(records)}\n\n"
        f"## Text from prompts\n\n{_generation(records, about)}\n\n"
        f"## Checks\n\n{passed}\n\n![plots](report.png)\n"
    )


def plot(folder: Path, records: list[Record], errors: dict[str, AttentionErrors]) -> None:
    """report.png: error against memory, error by context length, error by layer and head, time per step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((pareto, length), (heat, time)) = pyplot.subplots(2, 2, figsize=(12, 9))
    for record in records:
        name, by_length = record["kv_format"], record["codec_error_by_length"]
        pareto.scatter(record["bits_per_element"], record["codec_error_mean"], s=50, label=name)
        length.plot(list(map(int, by_length)), list(by_length.values()), marker="o", label=name)
    pareto.set(yscale="log", xlabel="bits per element, scales included", ylabel="codec error", title="Error by memory")
    pareto.legend(fontsize=8)
    length.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="codec error", title="Error by context")
    lengths = list(records[0]["codec_error_by_length"])
    length.set_xticks(lengths, labels=lengths)
    length.minorticks_off()
    by_head = errors["int8"].codec.mean(dim=(1, 2, 3))
    image = heat.imshow(by_head, aspect="auto", cmap="viridis")
    heat.set(xlabel="query head", ylabel="layer", title="int8: codec error by layer and head")
    heat.set_xticks(range(by_head.shape[1]))
    figure.colorbar(image, ax=heat)
    time.barh([r["kv_format"] for r in records], [r["milliseconds"] for r in records], color="#1f6feb")
    time.set(xlabel="ms per step, all layers", title="Time")
    figure.tight_layout()
    figure.savefig(folder / "report.png", dpi=110)
    pyplot.close(figure)
