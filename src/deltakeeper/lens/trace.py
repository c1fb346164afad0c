"""What the lens saw of one variant on one prompt: numbers and tokens, small enough to store and to send.

A cell is a layer × position. All arrays are read-only; absent numbers are NaN. Nothing here knows how the numbers were
computed (`trace_builder`), stored (`trace_file`) or drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltakeeper.errors import DataError

Numbers = NDArray[np.float32]
Whole = NDArray[np.int32]

DECODES = ("own", "base")
"""Whose tail turned streams into logits: the variant's own, or the base's for all variants."""
SHIFT_PARTS = ("dot", "tuned_square", "remainder_square", "cosine_base", "cosine_tuned")
"""What is known of a stream h beside those of base b and fine-tune f (`metrics.StreamShift`, `metrics.cosine`)."""
PRODUCED = "produced"
"""Name of the target that differs by position: the token that the variant itself would say next."""

MOST_LAYERS = 1024
MOST_POSITIONS = 8192
MOST_TOP = 100
MOST_CELLS = 1 << 18
MOST_TOKENS = 1 << 20
MOST_WIDE = 1 << 13


@dataclass(frozen=True)
class TraceMeta:
    """Where a trace comes from.

    Attributes:
        variant: name of the variant, unique beside those it was traced with.
        base: id and revision of the base model.
        prompt: hash of the prompt's tokens, the same for all variants that were traced on them.
        text: whose text the tokens after the prompt are (all variants read one common text), or "prompt" for none.
        decode: one of `DECODES`.
        decoder: "logit lens", or the name and hash of a tuned lens.
        site: what was decoded: "block", "attention" or "mlp" outputs.
        dtype: dtype of the forward pass.
        identity_error: largest |lens(last layer) − logits| that was met, in logits; None where the last is not there.
        delta: hash of the delta; None for the base.
        codec: how the delta was compressed, as on the command line.
        planes: how many planes of it were served; None for all.
        template: hash of the chat template; None without one.
    """

    variant: str
    base: str
    prompt: str
    text: str = "prompt"
    decode: str = "own"
    decoder: str = "logit lens"
    site: str = "block"
    dtype: str = "float32"
    identity_error: float | None = None
    delta: str | None = None
    codec: str | None = None
    planes: int | None = None
    template: str | None = None


@dataclass(frozen=True, eq=False)
class Target:
    """How a named set of tokens fared in every cell.

    Attributes:
        ids: the tokens; for `PRODUCED` one a position.
        rank: int32 (layers, positions), how many tokens of the vocabulary beat the best of the set.
        log_prob: float32 (layers, positions), log of the summed probability, in nats.
    """

    ids: tuple[int, ...]
    rank: Whole
    log_prob: Numbers


@dataclass(frozen=True, eq=False)
class LensTrace:
    """One variant × one prompt.

    Attributes:
        meta: where it comes from.
        layers: int32 (L,), rising numbers of the blocks whose output was decoded.
        positions: int32 (P,), rising places in `tokens`.
        tokens: the whole text that was read, token by token.
        top_ids: int32 (L, P, k), likeliest first.
        top_probs: float32 (L, P, k).
        entropy: float32 (L, P), in nats.
        kl_final: float32 (L, P), KL(final ‖ cell) in nats, where final is this variant's last layer at this position.
        kl: by reference variant, float32 (L, P): KL(reference ‖ this) of the same cell in nats.
        js: the same with JS.
        targets: by name of a set of tokens.
        shift: by `SHIFT_PARTS`, float32 (L, P); empty where no streams were given.
        trajectories: for each position, by token id, float32 (L,): the probability at every layer of every token that
            is in the top k at any, or in the last top k of a variant beside it, rounded to 1e-5.
        words: spelling of every token id that occurs.

    Raises:
        DataError: parts do not fit each other, or a number is out of its range.
    """

    meta: TraceMeta
    layers: Whole
    positions: Whole
    tokens: tuple[str, ...]
    top_ids: Whole
    top_probs: Numbers
    entropy: Numbers
    kl_final: Numbers
    kl: Mapping[str, Numbers] = field(default_factory=dict)
    js: Mapping[str, Numbers] = field(default_factory=dict)
    targets: Mapping[str, Target] = field(default_factory=dict)
    shift: Mapping[str, Numbers] = field(default_factory=dict)
    trajectories: tuple[Mapping[int, Numbers], ...] = ()
    words: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("kl", "js", "targets", "shift", "words"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        object.__setattr__(self, "trajectories", tuple(MappingProxyType(dict(t)) for t in self.trajectories))
        self._check_axes()
        self._check_top()
        self._check_cells()
        for array in self._arrays():
            array.flags.writeable = False

    @property
    def cells(self) -> tuple[int, int]:
        """Number of layers and of positions."""
        return len(self.layers), len(self.positions)

    def word(self, token: int) -> str:
        """Spelling of a token, or its number in brackets where it is not known."""
        return self.words.get(token, f"[{token}]")

    def refuse(self, why: str) -> DataError:
        """The error that says why this trace of a variant cannot be used."""
        return DataError(f"the lens trace of {self.meta.variant!r} cannot be used: {why}; trace it again.")

    def _check_axes(self) -> None:
        places, layers = self.positions, self.layers
        if self.meta.decode not in DECODES:
            raise self.refuse(f"its decode is {self.meta.decode!r}, not one of {', '.join(DECODES)}")
        for name, axis in (("layers", layers), ("positions", places)):
            if axis.ndim != 1 or not len(axis) or axis[0] < 0 or (np.diff(axis) <= 0).any():
                raise self.refuse(f"its {name} are not rising whole numbers from 0")
        if places[-1] >= len(self.tokens):
            raise self.refuse(f"position {places[-1]} lies outside its {len(self.tokens)} tokens")

    def _check_top(self) -> None:
        ids, probs = self.top_ids, self.top_probs
        if ids.ndim != 3 or ids.shape != probs.shape or ids.shape[:2] != self.cells or not 0 < ids.shape[2] <= MOST_TOP:
            raise self.refuse("its top tokens are not layers × positions × k")
        if (ids < 0).any() or not ((probs >= 0) & (probs <= 1)).all() or (np.diff(probs) > 0).any():
            raise self.refuse("its top probabilities are not falling numbers from 1 to 0")
        if self.trajectories and len(self.trajectories) != len(self.positions):
            raise self.refuse("it does not have one set of trajectories a position")
        for place, curves in enumerate(self.trajectories):
            if missing := set(ids[:, place].ravel().tolist()) - set(curves):
                raise self.refuse(f"token {min(missing)} has no trajectory at position {self.positions[place]}")
            shapes = {curve.shape for curve in curves.values()}
            together = np.stack(list(curves.values())) if shapes == {self.layers.shape} else np.full(1, np.nan)
            if curves and not ((together >= 0) & (together <= 1)).all():
                raise self.refuse("a trajectory is not one probability a layer")

    def _check_cells(self) -> None:
        if odd := set(self.shift) - set(SHIFT_PARTS):
            raise self.refuse(f"its shift has the unknown part {min(odd)!r}")
        zero_up = [self.entropy, self.kl_final, *self.kl.values(), *self.js.values()]
        zero_up += [self.shift[name] for name in ("tuned_square", "remainder_square") if name in self.shift]
        below = [target.log_prob for target in self.targets.values()]
        ranks = [target.rank for target in self.targets.values()]
        if any(array.shape != self.cells for array in (*zero_up, *below, *ranks, *self.shift.values())):
            raise self.refuse("a statistic is not layers × positions")
        if any((array < 0).any() for array in (*zero_up, *ranks)) or any((array > 0).any() for array in below):
            raise self.refuse("a statistic is out of its range")
        produced = self.targets.get(PRODUCED)
        if produced is not None and len(produced.ids) != len(self.positions):
            raise self.refuse("it does not have one produced token a position")

    def _arrays(self) -> list[NDArray[Any]]:
        found: list[NDArray[Any]] = [self.layers, self.positions, self.top_ids, self.top_probs, self.entropy]
        found += [self.kl_final, *self.kl.values(), *self.js.values(), *self.shift.values()]
        found += [array for target in self.targets.values() for array in (target.rank, target.log_prob)]
        return found + [curve for curves in self.trajectories for curve in curves.values()]
