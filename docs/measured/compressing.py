"""Tables of compression: speed, size, the published code, quality at equal bytes, exports."""

from __future__ import annotations

from typing import Any

from .tables import table

SCALE = """\
One bit a weight, a scale per tensor, a synthetic decoder in two checkpoints on disk (in the page cache as far as they
fit) to an artifact on disk. Million parameters a second, medians (and the best), in turns. *Compress* includes hashing
base, fine-tune, decoded result and payload with SHA-256; *unhashed* is the same with hashing switched off. *Read and
subtract* is torch reading both files and taking the difference in float32; the ratios are to that. Peak memory is that
of a fresh process, Python and torch included.
"""

SCALE_COLUMNS = ("compress", "unhashed", "read_and_subtract")

SHAPES = """\
Synthetic weights in the published shapes; all files of the artifact counted. With dense embeddings, as BitDelta
stores them, most of an artifact is embeddings.
"""

PEERS = """\
One bfloat16 matrix pair in memory, to packed buffers, ours and theirs in turns; the ratio is their time over ours
(above 1: ours is faster), the median over rounds with the range. The code of MergeLM, ComPEFT, UltraDelta, DeltaZip,
Delta-CoMe and ImPart leaves a dense tensor, so packing is in our time alone; the last two decompose exactly, ours at
random where that is enough. Memory is the growth of a fresh process above its inputs.
"""

SVD = """\
Rank 128 of a 4096 x 4096 delta; the excess is over the error of the exact truncated decomposition.
"""

QUALITY = """\
The fine-tunes of `make demo` and a benign one, one seed each, on SmolLM2-135M. Each cell: relative error of the delta
/ KL(fine-tune to compressed) in nats per token on held-out tickets and passages / share of held-out tickets routed
correctly. *budget* chooses settings by tensor to meet the size, *budget+text* weighs errors by what layers are fed on
training text, *text* gives a fixed codec that text, *healed* refits the scales to the fine-tune's logits on it,
*fixed* is the codec as spelled. All are run unmerged.
"""


VLLM = """\
Unmodified vLLM {version} beside PEFT, float32, {tokens} greedy tokens on a few prompts, without and with an adapter of
rank {rank} that `export-lora` wrote from a fine-tune of SmolLM2-135M.
"""


def scale(rows: list[dict[str, Any]]) -> str:
    head = ("parameters", "compress", "unhashed", "read and subtract", "ratios", "apply", "peak", "largest tensor")
    body = (
        (
            f"{row['parameters'] / 1e9:.2f} B",
            *(f"{row[f'{n}_mparam_s']:.0f} ({row[f'{n}_best_mparam_s']:.0f})" for n in SCALE_COLUMNS),
            f"{_ratio(row, 'compress'):.1f}x, unhashed {_ratio(row, 'unhashed'):.1f}x",
            f"{row['apply_mparam_s']:.0f} ({row['apply_best_mparam_s']:.0f})",
            f"{row['peak_mib']:.0f} MiB",
            f"{row['largest_tensor_mib']:.0f} MiB",
        )
        for row in rows
    )
    return SCALE + "\n" + table(head, body)


def _ratio(row: dict[str, Any], what: str) -> float:
    return row[f"{what}_mparam_s"] / row["read_and_subtract_mparam_s"]


def shapes(rows: list[dict[str, Any]]) -> str:
    head = ("model", "bfloat16", "everything in 1 bit", "ratio", "embeddings dense", "ratio", "time", "peak memory")
    body = (
        (
            row["model"],
            f"{row['model_bytes'] / 1e9:.2f} GB",
            f"{row['all_bytes'] / 1e9:.3f} GB",
            f"{row['all_ratio']:.1f}x",
            f"{row['dense_embeddings_bytes'] / 1e9:.2f} GB",
            f"{row['dense_embeddings_ratio']:.1f}x",
            f"{row['all_seconds']:.0f} s",
            f"{row['peak_mib']:.0f} MiB",
        )
        for row in rows
    )
    return SHAPES + "\n" + table(head, body)


def peers(rows: list[dict[str, Any]]) -> str:
    head = ("contest", "side", "ratio", "range", "ours, M/s", "theirs, M/s", "ours, MiB", "theirs, MiB")
    body = (
        (
            row["contest"],
            f"{row['side']}",
            f"**{row['ratio']:.1f}**",
            f"{row['ratio_min']:.1f} to {row['ratio_max']:.1f}",
            f"{row['ours_mparam_s']:.1f}",
            f"{row['theirs_mparam_s']:.1f}",
            f"{row['ours_peak_mib']:.0f}",
            f"{row['theirs_peak_mib']:.0f}",
        )
        for row in rows
    )
    return PEERS + "\n" + table(head, body)


def svd(rows: list[dict[str, Any]]) -> str:
    head = ("spectrum", "seconds", "excess error", "exact singular values alone")
    body = (
        (
            row["spectrum"],
            f"{row['seconds']:.2f}",
            f"{100 * row['excess_error']:.2f} %",
            f"{row['exact_values_seconds']:.1f} s",
        )
        for row in rows
    )
    return SVD + "\n" + table(head, body)


def vllm(rows: list[dict[str, Any]]) -> str:
    settings, *sides = rows
    body = (
        (side["side"], f"{side['same_tokens']} of {side['prompts']}", f"{side['largest_logprob_gap']:.1e}")
        for side in sides
    )
    text = VLLM.format(version=settings["vllm"], rank=settings["rank"], tokens=settings["tokens"])
    return text + "\n" + table(("served", "the same tokens", "largest difference of log-probability"), body)


def quality(rows: list[dict[str, Any]]) -> str:
    parts = [QUALITY]
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    for ratio in sorted({row["ratio"] for row in rows}):
        here = [row for row in rows if row["ratio"] == ratio]
        body = []
        for codec, how in dict.fromkeys((row["codec"], row["how"]) for row in here):
            cells = {row["pair"]: row for row in here if (row["codec"], row["how"]) == (codec, how)}
            sizes = [16 / row["bits_per_weight"] for row in cells.values() if "bits_per_weight" in row]
            size = f"{min(sizes):.1f}x" if sizes else ""
            body.append((f"`{codec}` {how}", size, *(_cell(cells.get(pair)) for pair in pairs)))
        parts.append(f"### {ratio} times smaller than bfloat16\n\n" + table(("codec", "smaller", *pairs), body))
    return "\n".join(parts)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "failed" in row:
        return "cannot"
    return f"{row['relative_error']:.2f} / {row['kl']:.3f} / {100 * row['skill']:.0f} %"
