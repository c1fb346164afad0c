"""How near other models' next-token distributions are to a fine-tune's, with one model in memory at a time.

The fine-tune's logits on a text go to a file first, whole: the largest few of them would not give the divergence.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from deltakeeper.calibration.text import read_text, tokenise
from deltakeeper.checkpoint import read_config
from deltakeeper.devices import working_device
from deltakeeper.errors import CheckpointError, DataError, first_line
from deltakeeper.quiet_loading import quiet_loading

Precision = Literal["float32", "stored"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
WINDOW = 512
BLOCK = 1 << 22
"""Logits that are compared together, in float64: 32 MiB a temporary."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of one model with the fine-tune, over all positions of the text.

    Attributes:
        kl: mean over tokens of `KL(fine-tune || model)` in nats, over the tokens that both vocabularies have.
        kl_worst: the largest of them.
        top1: share of positions where both hold the same token for the likeliest.
        tokens: number of positions.
    """

    kl: float
    kl_worst: float
    top1: float
    tokens: int


def read_windows(file: Path, folders: Sequence[Path], tokens: int, window: int = WINDOW) -> list[torch.Tensor]:
    """The first tokens of a text, cut into windows that a model sees together.

    Args:
        file: `.txt` or `.jsonl`, as for calibration.
        folders: the tokenizer of the first one that has one is used; its configuration may shorten the window.
        tokens: tokens in all, at most.
        window: tokens in a window.

    Returns:
        int64 tensors `(tokens,)`.

    Raises:
        DataError: the file is no text or holds none, or no folder has a tokenizer.
    """
    documents = read_text(file)
    folder = next((f for f in folders if any((f / name).is_file() for name in TOKENIZER_FILES)), None)
    if folder is None:
        raise DataError(f"there is no tokenizer in {', '.join(map(str, folders))}; add it to the fine-tune's folder.")
    tokenizer = _transformers().AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    limits = (_size(folder, "max_position_embeddings", "n_positions") for folder in folders)
    length = min([min(window, tokens), *(limit for limit in limits if limit)])
    rows = tokenise(tokenizer, documents, samples=-(-tokens // length), length=length)
    more = sum(map(len, rows)) - tokens
    return rows if more <= 0 else [*rows[:-1], rows[-1][:-more]]


def measure_agreement(
    tuned: Path,
    others: Mapping[str, Callable[[], Path]],
    windows: Sequence[torch.Tensor],
    scratch: Path,
    *,
    precision: Precision = "float32",
) -> dict[str, Agreement | None]:
    """Compare models with the fine-tune on one text.

    Args:
        tuned: folder of the fine-tune.
        others: by name, what gives the folder of a model, called when its turn comes.
        windows: tokens that a model sees together, int64 `(tokens,)` each.
        scratch: folder for the fine-tune's logits: tokens times vocabulary times 4 bytes.
        precision: `float32`, or the dtype that the weights are stored in, which takes less memory and rounds more.

    Returns:
        Agreement by name; None for a model that lacks tokens of the text.
    """
    spool = scratch / "logits"
    with spool.open("wb") as file:
        width = 0
        for logits in _run(tuned, windows, precision):
            width = logits.shape[1]
            logits.numpy().tofile(file)
    found: dict[str, Agreement | None] = {}
    for name, folder in others.items():
        found[name] = _compare(folder(), windows, precision, spool, width)
    spool.unlink()
    return found


def _compare(
    folder: Path, windows: Sequence[torch.Tensor], precision: Precision, spool: Path, width: int
) -> Agreement | None:
    size = _size(folder, "vocab_size")
    if size is not None and max(int(part.max()) for part in windows) >= size:
        return None
    total, worst, same, tokens = 0.0, 0.0, 0, 0
    with spool.open("rb") as file:
        for part, logits in zip(windows, _run(folder, windows, precision), strict=True):
            step = max(1, BLOCK // width)
            for start in range(0, len(part), step):
                rows = logits[start : start + step]
                true = torch.from_numpy(np.fromfile(file, np.float32, len(rows) * width)).view(len(rows), width)
                divergence = _divergence(true, rows)
                total += math.fsum(divergence.tolist())
                worst = float(np.maximum(worst, divergence.max().item()))
                same += int((true.argmax(1) == rows.argmax(1)).sum())
                tokens += len(rows)
    return Agreement(total / tokens, worst, same / tokens, tokens)


def _divergence(true: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`KL(true || other)` by row, float64, over the columns that both have."""
    shared = min(true.shape[1], other.shape[1])
    p = true[:, :shared].double().log_softmax(1)
    q = other[:, :shared].double().log_softmax(1)
    weight = p.exp()
    return torch.where(weight == 0, 0.0, weight * (p - q)).sum(1).clamp_min(0)  # a broken model's NaN stays


def _run(folder: Path, windows: Sequence[torch.Tensor], precision: Precision) -> Iterator[torch.Tensor]:
    """Logits of a model window by window, float32 `(tokens, vocabulary)`; the model is freed at the end."""
    transformers = _transformers()
    dtype: Any = torch.float32 if precision == "float32" else "auto"
    try:
        with quiet_loading():
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype, local_files_only=True, trust_remote_code=False
            )
        model.eval().to(working_device())
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} cannot be run ({first_line(error)}); give a model that transformers loads."
        ) from error
    try:
        for part in windows:
            with torch.inference_mode():
                logits = model(input_ids=part[None].to(model.device), use_cache=False).logits[0]
            yield logits.float().cpu()
    finally:
        del model
        gc.collect()


def _size(folder: Path, *names: str) -> int | None:
    """A number of a model's configuration, which multimodal models keep one level deeper."""
    config = read_config(folder)
    inner = config.get("text_config")
    for held in (config, inner if isinstance(inner, dict) else {}):
        for name in names:
            if isinstance(held.get(name), int) and held[name] > 0:
                return int(held[name])
    return None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise DataError("a text is measured with transformers; install deltakeeper[demo].") from error
    return transformers
