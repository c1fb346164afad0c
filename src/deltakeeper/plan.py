"""What is done with each tensor of a fine-tune, told from headers alone; only "unchanged" needs the bytes as well."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch

from deltakeeper.codecs import Codec, parse_codec
from deltakeeper.codecs.auto import Auto
from deltakeeper.delta import DeltaPair, TensorDelta
from deltakeeper.errors import CodecError

Treatment = Literal["terms", "value", "unchanged", "tied"]
Planned = Literal["terms", "value", "base", "tied"]
Group = Literal["embedding", "head", "linear", "norms"]

TINY = 1024
"""Tensors of fewer entries are stored as they are: a packed term would hardly be smaller."""

ENCODED = {torch.float32, torch.float16, torch.bfloat16}
"""Dtypes whose difference float32 can hold: integers, as quantised models pack them, and float64 would be altered."""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Choice:
    """What is done with one tensor.

    Attributes:
        treatment: `terms` (its delta is encoded), `value` (stored as the fine-tune has it), `base` (taken from the base
            though the fine-tune may differ) or `tied` (an alias of another tensor).
        codec: what encodes it, None for every treatment but `terms`.
    """

    treatment: Planned
    codec: Codec | None = None


@dataclass(frozen=True)
class Rules:
    """How a compression treats each kind of tensor.

    Attributes:
        codec: what encodes every matrix that has a base.
        embeddings: of input embeddings and heads: `codec` (as other matrices), `dense` (stored as the fine-tune has
            them), `base` (taken from the base), or the spelling of a codec of their own, such as `rtn:bits=4`.
        norms: of norms, biases and other vectors: `dense` or `base`.
    """

    codec: Codec
    embeddings: str = "codec"
    norms: str = "dense"
    _embedding_codec: Codec | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.norms not in ("dense", "base"):
            raise CodecError(f"norms cannot be stored as '{self.norms}'; choose dense or base.")
        own = self.codec if self.embeddings == "codec" else None
        if self.embeddings not in ("codec", "dense", "base"):
            try:
                own = parse_codec(self.embeddings)
            except CodecError as error:
                raise CodecError(
                    f"embeddings cannot be stored as '{self.embeddings}'; choose codec, dense, base or a codec: {error}"
                ) from error
        object.__setattr__(self, "_embedding_codec", own)

    @property
    def codecs(self) -> tuple[Codec | None, Codec | None]:
        """What encodes embeddings and heads, None where no codec does, and what encodes all other matrices."""
        return self._embedding_codec, self.codec

    def decide(self, pair: DeltaPair, name: str) -> Choice:
        """What to do with the tensor `name` of the fine-tune.

        Raises:
            CodecError: it was to be taken from the base, which does not have it in this shape.
        """
        if name in pair.tied:
            return Choice("tied")
        group = group_of(pair, name)
        rule = self.norms if group == "norms" else self.embeddings if group in ("embedding", "head") else "codec"
        if rule == "base" and len(pair.tuned.tensors[name].shape) <= 2:
            _check_base(pair, name, "norms" if group == "norms" else "embeddings")
            return Choice("base")
        if rule == "dense" or not encodable(pair, name):
            return Choice("value")
        return Choice("terms", self._embedding_codec if group in ("embedding", "head") else self.codec)


def choose_codec(text: str, *, budgeted: bool = False) -> Codec:
    """The codec of a spelling, or with a budget also `auto`: the best of several for each tensor.

    Raises:
        CodecError: it is no spelling of a codec, or `auto` without a budget.
    """
    if text.strip() != "auto":
        parts = text.split("+")
        if budgeted:  # the rank is what the budget turns, so it need not be given
            parts = ["svd:rank=1" if part.strip() == "svd" else part for part in parts]
        return parse_codec("+".join(parts))
    if not budgeted:
        raise CodecError("codec 'auto' chooses by a budget; give --target-size or --target-ratio as well.")
    return Auto()


def in_order(names: Iterable[str]) -> list[str]:
    """Names in the order of their layers, in which an artifact holds them: layer 10 comes after layer 9."""
    return sorted(names, key=lambda n: [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", n)])


def group_of(pair: DeltaPair, name: str) -> Group:
    """The group of tensors that one rule holds for: `norms` are all vectors, `linear` all other matrices."""
    role = pair.role(name)
    if role == "embedding" or role == "head":
        return role
    return "linear" if len(pair.tuned.tensors[name].shape) >= 2 else "norms"


def encodable(pair: DeltaPair, name: str) -> bool:
    """Whether a tensor is a matrix (or a stack of them) with a base, of a dtype and size that a codec can work on.

    Base and fine-tune of a matrix may differ in their number of rows, as vocabularies grow.
    """
    base_name = pair.base_name(name)
    if base_name is None:
        return False
    ours, theirs = pair.tuned.tensors[name], pair.base.tensors[base_name]
    if not {ours.dtype, theirs.dtype} <= ENCODED or len(ours.shape) not in (2, 3) or ours.numel < TINY:
        return False
    if len(ours.shape) != len(theirs.shape) or ours.shape[1:] != theirs.shape[1:] or not theirs.numel:
        return False
    return len(ours.shape) == 2 or ours.shape == theirs.shape


def unchanged(pair: DeltaPair, delta: TensorDelta) -> bool:
    """Whether the loaded tensors of base and fine-tune have the same dtype, shape and bytes."""
    ours, theirs = delta.tuned, delta.base
    if theirs is None or theirs.shape != ours.shape or theirs.dtype != pair.tuned.tensors[delta.name].dtype:
        return False
    words = _WORDS[theirs.dtype.itemsize]  # compared as whole numbers: 0 is not -0, and NaN is itself
    return torch.equal(theirs.contiguous().view(words), ours.to(theirs.dtype).contiguous().view(words))


def treat(pair: DeltaPair, delta: TensorDelta) -> Treatment:
    """Decide one loaded tensor by the default rules: every matrix that has a base is encoded, embeddings too.

    Norms, biases and other vectors, tensors that are new or of another width, tiny ones, integers and float64
    are stored as values.
    """
    if delta.name in pair.tied:
        return "tied"
    if unchanged(pair, delta):
        return "unchanged"
    return "terms" if encodable(pair, delta.name) else "value"


def _check_base(pair: DeltaPair, name: str, option: str) -> None:
    base_name = pair.base_name(name)
    if base_name is None:
        raise CodecError(f"'{name}' cannot be taken from the base, which lacks it; store {option} otherwise.")
    ours, theirs = pair.tuned.tensors[name].shape, pair.base.tensors[base_name].shape
    if ours != theirs:
        grown = len(ours) == len(theirs) and ours[1:] == theirs[1:] and ours[:1] > theirs[:1]
        how = f"the fine-tune added {ours[0] - theirs[0]} rows to it" if grown else f"it is {theirs} there, {ours} here"
        raise CodecError(f"'{name}' cannot be taken from the base, since {how}; store {option} otherwise.")
