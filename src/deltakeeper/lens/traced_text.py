"""One prompt as it is traced: what stands beside its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltakeeper.lens.trace import TraceMeta


@dataclass(frozen=True)
class TracedText:
    """One prompt as all variants read it.

    Attributes:
        metas: where each variant's trace comes from, by name.
        positions: rising places in `tokens`; as many in every prompt.
        tokens: the text, token by token.
        produced: token that each variant would say next at each position; a target of its own.
    """

    metas: Mapping[str, TraceMeta]
    positions: Sequence[int]
    tokens: Sequence[str]
    produced: Mapping[str, Sequence[int]] | None = None
