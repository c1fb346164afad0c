"""Which settings of a codec a budget turns, and the steps that it tries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deltakeeper.codecs import CODECS, BitDelta, Codec, Magnitude, SumCodec, Svd
from deltakeeper.codecs.auto import Auto
from deltakeeper.codecs.fields import settings_of
from deltakeeper.errors import CodecError

Kind = Literal["bits", "rank", "keep", "drop", "rate", "ratio"]

DIALS: dict[str, Kind] = {
    "rank": "rank",
    "keep": "keep",
    "density": "keep",
    "p": "drop",
    "sparsity": "drop",
    "bpw": "rate",
    "cr": "ratio",
    "bits": "bits",
}
"""Settings that trade bytes for error, the one to turn first; a codec with none of them has no budget."""

BITS = tuple(range(1, 9))
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
DOUBLED = tuple(2**power for power in range(13))
"""Ranks of codecs that need a decomposition for each of them."""

RATES = (0.125, 0.177, 0.25, 0.354, 0.5, 0.707, 1.0, 1.41, 2.0, 2.83, 4.0)
"""Bits a weight, of codecs that are told how many, or by what ratio."""

KEPT = tuple(round(2.0 ** (-step / 2), 4) for step in range(17))
"""Shares of the entries to keep, 1 down to 1/256."""


@dataclass(frozen=True)
class Dial:
    """The setting of a codec that a budget turns."""

    setting: str
    kind: Kind

    def turn(self, codec: Codec, value: float) -> Codec | None:
        """The codec at another step (a share kept, a rank, bits or bits a weight), None where it does not take that."""
        turned: float = round(1.0 - value, 6) if self.kind == "drop" else value
        if self.kind == "ratio":
            turned = round(16.0 / value, 6)
        try:
            return dataclasses.replace(codec, **{self.setting: turned})
        except CodecError:
            return None

    def at(self, codec: Codec) -> float:
        """The step that a codec is at."""
        value = float(getattr(codec, self.setting) or 0)
        return 1.0 - value if self.kind == "drop" else 16.0 / value if self.kind == "ratio" else value


def dial_of(codec: Codec) -> Dial | None:
    """What can be turned on a codec, or None."""
    known = set() if isinstance(codec, SumCodec) else set(settings_of(type(codec)))
    if getattr(codec, "pattern", None) == "2:4":
        known -= {"keep"}  # half of the entries, whatever it says
    return next((Dial(name, kind) for name, kind in DIALS.items() if name in known), None)


def families(codec: Codec) -> list[Codec]:
    """The codecs whose ladders compete: the one that was asked for, or several for `auto`.

    Raises:
        CodecError: nothing can be turned on the codec.
    """
    if isinstance(codec, Auto):
        own = CODECS.get("rtn")
        return [BitDelta(), *([own()] if own else []), Svd(rank=8), Magnitude()]
    if isinstance(codec, SumCodec):
        if not any(dial_of(part) for part in codec.parts):
            raise CodecError("no part of this sum has a setting that a budget could turn; name another codec.")
    elif codec.control or (dial_of(codec) is None and codec.name != "dense"):
        raise CodecError(f"codec '{codec.name}' has no setting that a budget could turn; name another, or auto.")
    if codec.surveys and "step" in settings_of(type(codec)):
        return [dataclasses.replace(codec, **{"step": 0.0})]  # the budget itself compares tensors with each other
    return [codec]


def ladder(codec: Codec, limit: int) -> list[Codec]:
    """The steps of a codec, coarse to fine.

    Args:
        codec: any codec, a sum among them: its last part that has a dial is turned, and before it whole parts are
            left out from the end.
        limit: the largest rank worth trying.
    """
    if isinstance(codec, SumCodec):
        return _sum_ladder(codec, limit)
    dial = dial_of(codec)
    if dial is None:
        return [codec]
    turned = (dial.turn(codec, value) for value in _rungs(codec, dial, limit))
    return [found for found in turned if found is not None]


def _rungs(codec: Codec, dial: Dial, limit: int) -> Sequence[float]:
    if dial.kind == "rank":
        return (*(rank for rank in (RANKS if isinstance(codec, Svd) else DOUBLED) if rank < limit), limit)
    return BITS if dial.kind == "bits" else RATES if dial.kind in ("rate", "ratio") else KEPT[::-1]


def _sum_ladder(codec: SumCodec, limit: int) -> list[Codec]:
    """The four coarsest steps of the first part, alone and with every step of the rest."""
    first, *rest = codec.parts
    found: list[Codec] = []
    tails = ladder(rest[0] if len(rest) == 1 else SumCodec(tuple(rest)), limit)
    for head in ladder(first, limit)[:4]:
        found.append(head)
        for tail in tails:
            found.append(SumCodec((head, *(tail.parts if isinstance(tail, SumCodec) else (tail,)))))
    return found


def finer(codec: Codec, limit: int) -> list[Codec]:
    """Up to seven steps between a codec and the next rung of its ladder; of a sum, for each part that has a dial."""
    if isinstance(codec, SumCodec):
        return [
            SumCodec((*codec.parts[:i], step, *codec.parts[i + 1 :]))
            for i, part in enumerate(codec.parts)
            for step in finer(part, limit)
        ]
    dial = dial_of(codec)
    if dial is None or dial.kind == "bits":
        return []
    now = dial.at(codec)
    above = min((rung for rung in _rungs(codec, dial, limit) if rung > now), default=now)
    values = [now + (above - now) * i / 8 for i in range(1, 8)]
    if dial.kind == "rank":
        values = sorted({int(value) for value in values} - {int(now)})
    turned = (dial.turn(codec, value if dial.kind == "rank" else round(value, 6)) for value in values if value > now)
    return [found for found in turned if found is not None]
