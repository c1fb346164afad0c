"""The text side of a model or tenant: tokenizer, end-of-text tokens, size of the vocabulary."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltakeeper.overlay.side_files import checked_copy, has_tokenizer, read_tokenizer, reading

_MOST_KEPT = 256
_MOST_JSON_BYTES = 1 << 20
_GENERATION = "generation_config.json"


@dataclass(frozen=True, eq=False)
class TextSide:
    """What turns tokens into text and ends an answer.

    Attributes:
        tokenizer: a transformers tokenizer, or None where only tokens are asked for.
        eos: token ids that end an answer.
        vocabulary: number of tokens that may stand in a prompt.
    """

    tokenizer: Any
    eos: frozenset[int]
    vocabulary: int


def base_side(model: Any, tokenizer: Any) -> TextSide:
    """The text side of a model as `generate` sees it: its generation config's end-of-text tokens, else its config's."""
    generation = getattr(model, "generation_config", None)
    eos = _token_ids(getattr(generation, "eos_token_id", None)) or _token_ids(
        getattr(model.config, "eos_token_id", None)
    )
    if not eos and tokenizer is not None:
        eos = _token_ids(getattr(tokenizer, "eos_token_id", None))
    return TextSide(tokenizer, eos, int(model.get_input_embeddings().weight.shape[0]))


class TextSides:
    """Text sides of tenants, read on a thread of their own since a tokenizer takes a second to build."""

    def __init__(self, base: TextSide) -> None:
        self.base = base
        self._kept: dict[str, Future[TextSide]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="deltakeeper-text")

    def get(self, version: str, delta: Any) -> TextSide | None:
        """The text side of a tenant's delta, or None while it is read.

        Args:
            version: identity of the delta.
            delta: with `vocabulary`, `side_folder` and `side_files`; what it lacks is the base's.

        Raises:
            SideFileError: its tokenizer or generation config cannot be read.
            ChangedError: they are not what they were at the load.
            TenantError: they cannot be read now.
        """
        vocabulary = int(getattr(delta, "vocabulary", self.base.vocabulary))
        folder, files = getattr(delta, "side_folder", None), dict(getattr(delta, "side_files", {}))
        if folder is None or not (_GENERATION in files or has_tokenizer(files)):
            return replace(self.base, vocabulary=vocabulary)
        kept = self._kept.get(version)
        if kept is None:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.pop(next(iter(self._kept)), None)
            kept = self._kept[version] = self._pool.submit(_read, self.base, Path(folder), files, vocabulary)
            weakref.finalize(delta, self._kept.pop, version, None).atexit = False  # it goes with the delta
        if not kept.done():
            return None
        try:
            return kept.result()
        except Exception:
            self._kept.pop(version, None)
            raise

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def read_ends(folder: Path, files: Mapping[str, str]) -> frozenset[int]:
    """Token ids that end an answer, by a delta's `generation_config.json`; none where it has no such file.

    Args:
        folder: that of its artifact.
        files: its side files, each with the SHA-256 that it must have.

    Raises:
        SideFileError: the file is none, or too large.
        ChangedError: it is not what it was at the load.
        TenantError: it cannot be read now.
    """
    if _GENERATION not in files:
        return frozenset()
    with (
        checked_copy(folder, files, [_GENERATION]) as copy,
        reading(f"the generation config {folder / _GENERATION}"),
    ):
        if (copy / _GENERATION).stat().st_size > _MOST_JSON_BYTES:
            raise ValueError("it is too large")
        return _token_ids(json.loads((copy / _GENERATION).read_text(encoding="utf-8")).get("eos_token_id"))


def _read(base: TextSide, folder: Path, files: Mapping[str, str], vocabulary: int) -> TextSide:
    eos = read_ends(folder, files)
    if not has_tokenizer(files):
        return TextSide(base.tokenizer, eos or base.eos, vocabulary)
    tokenizer = read_tokenizer(folder, files)
    return TextSide(tokenizer, eos or _token_ids(tokenizer.eos_token_id) or base.eos, vocabulary)


def _token_ids(value: int | Iterable[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else (int(token) for token in value))
