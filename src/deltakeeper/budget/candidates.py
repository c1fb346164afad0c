"""Candidates for one tensor: what each would store, and its error, measured on the delta."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from deltakeeper.budget.ladders import RANKS, families, ladder
from deltakeeper.budget.parts import Part, squared
from deltakeeper.budget.spectrum import rank_errors
from deltakeeper.codecs import BitDelta, Codec, SumCodec, Svd
from deltakeeper.errors import CodecError, LayoutError
from deltakeeper.layouts import Layout
from deltakeeper.layouts.signs import Signs
from deltakeeper.manifest import TermRecord

COUNTS = {"nnz", "gap_bytes"}
"""Settings of layouts that count entries, and so grow with the rows."""

FINE_RANKS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Ranks of a low-rank term that fills what whole bits leave over."""


@dataclass(frozen=True)
class Found:
    """One candidate for one tensor.

    Attributes:
        codec: the codec with its settings.
        terms: what it would store.
        error: squared error, weighted by inputs where there are any.
        exact: whether the size of the terms is certain; otherwise it was scaled up from a sample.
    """

    codec: Codec
    terms: tuple[TermRecord, ...]
    error: float
    exact: bool


def measure(parts: list[Part], codec: Codec, limit: int, fine: bool) -> list[Found]:
    """The curve of a codec's family on a tensor.

    Args:
        parts: matrices of the tensor.
        codec: the codec that was asked for, or `auto`.
        limit: the largest rank worth trying.
        fine: whether to try a low-rank term on top of whole bits.
    """
    limit = min(limit, *(min(part.shape) for part in parts))
    found: list[Found] = []
    for family in families(codec):
        if isinstance(family, Svd):
            found += spectral(parts, (), family, _ranks(limit), limit)
        elif isinstance(family, SumCodec) and isinstance(family.parts[-1], Svd):
            found += _sums(parts, family, limit)
        elif isinstance(family, BitDelta):
            found += _planes(parts, family)
        elif family.name != "dense":  # the plain value is a candidate of every tensor
            found += tried(parts, ladder(family, limit))
    fine = fine and not codec.unbiased
    whole_bits = [item.codec for item in found if hasattr(item.codec, "bits") and fine]
    return found + fill(parts, whole_bits, limit)


def _ranks(limit: int) -> list[int]:
    """Every rank of small matrices; of large ones small ranks and about fifty steps."""
    step = -(-limit // 48)
    return sorted({*(rank for rank in RANKS if rank <= limit), *range(step, limit + 1, step), limit})


def fill(parts: list[Part], codecs: Iterable[Codec], limit: int) -> list[Found]:
    """Each of up to four codecs with a low-rank term of small rank for what it leaves over."""
    heads = [codec for codec in codecs if not isinstance(codec, SumCodec | Svd)][:4]
    ranks = [rank for rank in FINE_RANKS if rank <= limit]
    return [found for head in heads for found in spectral(parts, (head,), Svd(rank=1), ranks, max(ranks))]


def _sums(parts: list[Part], codec: SumCodec, limit: int) -> list[Found]:
    *heads, tail = codec.parts
    steps = ladder(heads[0] if len(heads) == 1 else SumCodec(tuple(heads)), limit)[:4]
    found = tried(parts, steps)
    for step in steps:
        head = step.parts if isinstance(step, SumCodec) else (step,)
        if isinstance(tail, Svd):
            found += spectral(parts, head, tail, _ranks(limit), limit)
    return found


def spectral(parts: list[Part], head: tuple[Codec, ...], codec: Svd, ranks: Iterable[int], limit: int) -> list[Found]:
    """Ranks of a low-rank term for what the codecs before it leave over, from one decomposition."""
    before: list[list[Layout]] = []
    errors: list[list[float]] = []
    for part in parts:
        matrix, terms = part.full(), []
        try:
            for one in head:
                terms += (encoded := one.encode(matrix, name=part.label, inputs=part.inputs))
                for term in encoded:
                    matrix = matrix - term.to_dense()
            errors.append(rank_errors(part, matrix, codec, limit))
        except CodecError:
            return []
        before.append(terms)
    found = []
    for rank in ranks:
        turned = replace(codec, rank=rank, energy=None)
        settings = {"rank": rank, "factors": codec.factors}
        terms_ = tuple(
            record
            for part, terms in zip(parts, before, strict=True)
            for record in (*_records(part, terms), TermRecord("lowrank", settings, part.index))
        )
        whole = SumCodec((*head, turned)) if head else turned
        found.append(Found(whole, terms_, sum(error[rank] for error in errors), True))
    return found


def _planes(parts: list[Part], codec: BitDelta) -> list[Found]:
    """All numbers of planes from one fit of eight, since each plane is fitted to what those before it left over.

    The zero rule is written down where it was chosen on a sample: the size must not hang on choosing it again.
    """
    if codec.zero == "auto" and not all(part.whole for part in parts):
        codec = replace(codec, zero=_zero_rule(parts, codec))
    errors, settings = [0.0] * 8, []
    for part in parts:
        try:
            (term,) = replace(codec, bits=8).encode(part.rows, name=part.label)
        except CodecError:
            return []
        if not isinstance(term, Signs):
            raise TypeError("bitdelta gives one term of signs")
        settings.append(term.settings())
        left = part.rows.clone()
        for plane in range(8):
            one = replace(term, packed=term.packed[plane : plane + 1], scales=term.scales[plane : plane + 1])
            left -= one.to_dense()
            errors[plane] += part.error(left)
    found = []
    for planes, error in enumerate(errors, 1):
        each = zip(parts, settings, strict=True)
        terms = tuple(TermRecord("signs", {**setting, "planes": planes}, part.index) for part, setting in each)
        found.append(Found(replace(codec, bits=planes), terms, error, True))
    return found


def _zero_rule(parts: list[Part], codec: BitDelta) -> Literal["plus", "zero"]:
    """The rule that the first matrix with a delta would get."""
    for part in parts:
        if bool(part.rows.any()):
            (term,) = replace(codec, bits=1).encode(part.rows, name=part.label)
            return "zero" if term.settings()["zero"] == "zero" else "plus"
    return "zero"


def tried(parts: list[Part], codecs: Iterable[Codec], whole: bool = False) -> list[Found]:
    """Codecs measured by encoding: on the sample where their rows are independent, else on the whole tensor."""
    found = []
    for codec in codecs:
        try:
            found.append(_try(parts, codec, whole or not codec.row_by_row))
        except LayoutError:  # settings that cannot be scaled up from a sample
            found.append(_try(parts, codec, True))
        except CodecError:  # a step that this tensor does not take, such as a scale that underflows
            continue
    return found


def _try(parts: list[Part], codec: Codec, whole: bool) -> Found:
    records: list[TermRecord] = []
    error, exact = 0.0, True
    for part in parts:
        matrix = part.full() if whole else part.rows
        terms = codec.encode(matrix, name=part.label, inputs=part.inputs)
        left = matrix.clone()
        for term in terms:
            left -= term.to_dense()
        error += squared(left, part.inputs) if whole else part.error(left)
        exact = exact and (len(matrix) == part.shape[0] or codec.payload_bytes(part.shape) is not None)
        records += _records(part, terms)
    return Found(codec, tuple(records), error, exact)


def _records(part: Part, terms: Iterable[Layout]) -> list[TermRecord]:
    """Records of terms for the whole matrix; counts of entries are scaled up where they were fitted to a sample.

    Raises:
        LayoutError: the settings of a term that was fitted to a sample make no sense for the matrix.
    """
    records = []
    for term in terms:
        settings = term.settings()
        if term.shape[0] != part.shape[0]:
            for key in COUNTS & set(settings):
                settings[key] = round(settings[key] * part.shape[0] / term.shape[0])
            type(term).expect(part.shape, settings)
        records.append(TermRecord(term.name, settings, part.index))
    return records
