"""What a delta brings to make requests of texts: read where it is served, and once before that, when it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.engine.tenant_records import Delta, TenantOverlay
from deltakeeper.engine.text_side import read_ends
from deltakeeper.errors import DataError, SideFileError
from deltakeeper.overlay import TenantDelta
from deltakeeper.overlay.side_files import checked_copy, has_tokenizer, reading
from deltakeeper.prompting import tokenizers
from deltakeeper.service.sampling_defaults import FILE_NAME, SamplingDefaults, read_defaults

_MOST_PASSED = 1 << 16
_PIECE = 64
"""Tokens that are made into text at once when a tokenizer is tried."""


@dataclass(frozen=True)
class TenantText:
    """The text side of a delta.

    Attributes:
        tokenizer: its own, or the base's.
        defaults: how tokens are drawn where a request does not say; None where it says nothing.
    """

    tokenizer: Any
    defaults: SamplingDefaults | None


def read_text(tokenizer: Any, delta: TenantDelta, *, with_defaults: bool) -> TenantText:
    """Read a delta's tokenizer, chat template and sampling defaults from copies that are held against their hashes.

    Args:
        tokenizer: the base's.
        delta: with `side_folder` and `side_files`.
        with_defaults: whether its sampling defaults are wanted.

    Raises:
        ChangedError: its files are not what they were when it was loaded.
        SideFileError: they cannot be used.
        TenantError: they cannot be read now.
    """
    own = tokenizers(tokenizer, {"": delta})[""]
    if own is not tokenizer:
        with reading(f"the tokenizer in {delta.side_folder}"):
            own("")
    defaults = None
    if with_defaults and FILE_NAME in delta.side_files:
        with checked_copy(delta.side_folder, delta.side_files, [FILE_NAME]) as copied, reading(FILE_NAME):
            try:
                defaults = read_defaults(copied, delta.side_folder)
            except DataError as error:
                raise SideFileError(str(error)) from error
    return TenantText(own, defaults)


def try_words(tokenizer: Any, delta: TenantDelta) -> None:
    """Make text of every token that a delta's model may say, and tokens of some of that text (0.2 s for 50,000 tokens).

    A tokenizer may be read without a fault and fail, or panic, at its first word or token.

    Args:
        tokenizer: the delta's own.
        delta: with `side_folder` and `vocabulary`.

    Raises:
        SideFileError: it fails.
        TenantError: there is no memory for it now.
    """
    said = ""
    with reading(f"the tokenizer in {delta.side_folder}"):
        for first in range(0, delta.vocabulary, _PIECE):
            ids = list(range(first, min(first + _PIECE, delta.vocabulary)))
            tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            if not said.strip():
                said = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        tokenizer.convert_ids_to_tokens(tokenizer(said)["input_ids"])


class TextGuard:
    """An overlay that loads only deltas whose text side can be used; it runs on the store's loader threads.

    So a tokenizer that cannot be read keeps its delta out as a payload would, wherever replicas run, with a reason that
    whoever runs this finds where those of all loads are. A version that passed once is not read again.

    Args:
        overlay: which loads.
        tokenizer: the base's.
        with_defaults: whether sampling defaults of tenants are used.
    """

    def __init__(self, overlay: TenantOverlay, tokenizer: Any, *, with_defaults: bool = True) -> None:
        self._overlay, self._tokenizer, self._with_defaults = overlay, tokenizer, with_defaults
        self._passed: dict[str, None] = {}

    def load(self, artifact: DeltaArtifact, *, planes: int | None = None) -> Delta:
        """As the overlay does; raises as `read_text` too."""
        delta = self._overlay.load(artifact, planes=planes)
        if delta.side_files and delta.version not in self._passed:
            try:
                of_tenant = cast(TenantDelta, delta)
                text = read_text(self._tokenizer, of_tenant, with_defaults=self._with_defaults)
                if has_tokenizer(delta.side_files):
                    try_words(text.tokenizer, of_tenant)
                read_ends(delta.side_folder, delta.side_files)
            except BaseException:
                delta.close()
                raise
            while len(self._passed) >= _MOST_PASSED:
                self._passed.pop(next(iter(self._passed)), None)
            self._passed[delta.version] = None
        return delta

    def publish(self, delta: Any, /) -> int:
        """As the overlay does."""
        return self._overlay.publish(delta)

    def retire(self, slot: int, /) -> Delta:
        """As the overlay does."""
        return self._overlay.retire(slot)
