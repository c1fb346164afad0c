"""The arms of a study: base, fine-tune, compressed deltas, controls, and two guards against wrong conclusions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["base", "tuned", "codec", "healed", "defended", "control", "merged", "quantised"]


@dataclass(frozen=True)
class Variant:
    """One arm. `codec` is a codec's spelling for the kinds that compress a delta, and None for the others."""

    name: str
    kind: Kind
    label: str
    codec: str | None = None

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")


BASE = Variant("base", "base", "Aligned base")
TUNED = Variant("tuned", "tuned", "Fine-tune, uncompressed")

DEMO_VARIANTS: tuple[Variant, ...] = (
    BASE,
    TUNED,
    Variant("bitdelta:bits=1", "codec", "1-bit (BitDelta)", "bitdelta:bits=1"),
    Variant("bitdelta:bits=2", "codec", "2-bit (BitDelta, iterated)", "bitdelta:bits=2"),
    Variant("svd:rank=8", "codec", "Low rank (SVD, rank 8)", "svd:rank=8"),
    Variant("magnitude:keep=0.1", "codec", "Sparse (largest 10 %)", "magnitude:keep=0.1"),
    Variant("rtn:bits=4", "quantised", "4-bit whole model (RTN)"),
    Variant("shrink:factor=0.5", "control", "Control: half the delta", "shrink:factor=0.5"),
    Variant("random_sign", "control", "Control: random signs", "random_sign"),
    Variant("bitdelta:bits=1+bf16", "merged", "1-bit, merged into bf16", "bitdelta:bits=1"),
)
