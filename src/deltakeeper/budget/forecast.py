"""What an artifact will take, group by group: from headers alone, or with the errors that an allocation measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from deltakeeper.budget.allocation import Allocation
from deltakeeper.budget.texts import Stored, stored, total_bytes
from deltakeeper.codecs import Codec, spell
from deltakeeper.delta import DeltaPair
from deltakeeper.errors import DeltakeeperError
from deltakeeper.layouts import Layout
from deltakeeper.manifest import TermRecord
from deltakeeper.plan import Choice, Group, Rules, group_of

GROUPS: tuple[Group, ...] = ("embedding", "head", "linear", "norms")


@dataclass(frozen=True)
class GroupForecast:
    """One kind of tensors.

    Attributes:
        tensors: how many there are, aliases left out.
        bytes: payload bytes that are foreseen.
        full_bytes: bytes of the fine-tune's own tensors.
        certain: whether settings and shapes alone decide the bytes, or they were measured.
        known: whether anything can be said; otherwise `bytes` leaves out the tensors whose size only the data tell.
        error: predicted relative error `|D' - D| / |D|` (of layer outputs where inputs were given), None without an
            allocation.
        stored: codecs and treatments with the number of tensors, the commonest first.
    """

    tensors: int
    bytes: int
    full_bytes: int
    certain: bool
    known: bool
    error: float | None
    stored: dict[str, int]

    @property
    def ratio(self) -> float:
        """How many times smaller the group becomes; infinite where nothing is stored."""
        return self.full_bytes / self.bytes if self.bytes else math.inf


@dataclass(frozen=True)
class Forecast:
    """What an artifact will take.

    Attributes:
        codec: spelling of the codec.
        groups: by kind of tensors, those that the fine-tune has.
        file_bytes: manifest, report, headers and configuration files.
        total_bytes: the whole artifact.
        full_bytes: the fine-tune, aliases counted once.
        target_bytes: the budget, if there is one.
    """

    codec: str
    groups: dict[str, GroupForecast]
    file_bytes: int
    total_bytes: int
    full_bytes: int
    target_bytes: int | None = None

    @property
    def certain(self) -> bool:
        """Whether every size is."""
        return all(group.certain for group in self.groups.values())

    def to_json(self) -> dict[str, Any]:
        """The forecast as a JSON object."""
        groups = {
            name: {
                "tensors": group.tensors,
                "bytes": group.bytes,
                "full_bytes": group.full_bytes,
                "ratio": group.ratio if group.bytes else None,
                "certain": group.certain,
                "known": group.known,
                "error": group.error,
                "stored": group.stored,
            }
            for name, group in self.groups.items()
        }
        return {
            "codec": self.codec,
            "groups": groups,
            "file_bytes": self.file_bytes,
            "bytes": self.total_bytes,
            "full_bytes": self.full_bytes,
            "ratio": self.full_bytes / self.total_bytes,
            "certain": self.certain,
            "target_bytes": self.target_bytes,
        }


def forecast(pair: DeltaPair, rules: Rules, allocation: Allocation | None = None) -> Forecast:
    """What compressing a pair will give, without reading a tensor.

    Args:
        pair: base and fine-tune.
        rules: what is done with each kind of tensor.
        allocation: what a budget chose instead, with its measured errors.

    Raises:
        CodecError: a tensor was to be taken from the base, which does not have it in this shape.
    """
    tensors: dict[str, Stored] = {}
    sizes: dict[str, tuple[int | None, bool]] = {}
    choices: dict[str, Choice] = {}
    for name in pair.names():
        choices[name] = rules.decide(pair, name) if allocation is None else allocation.choices[name]
        tensors[name], size, certain = _foresee(pair, name, rules, choices[name])
        sizes[name] = (size, certain)
    written = sum(item.payload for item in tensors.values())
    files = total_bytes(pair, rules.codec, tensors) - written
    if allocation is not None:
        sizes = {name: (plan.bytes, True) for name, plan in allocation.predicted.items()}
        files = allocation.total_bytes - sum(plan.bytes for plan in allocation.predicted.values())
    groups: dict[str, GroupForecast] = {}
    for group in GROUPS:
        names = [name for name in pair.names() if name not in pair.tied and group_of(pair, name) == group]
        if names:
            groups[group] = _gather(pair, names, {n: sizes[n] for n in names}, choices, allocation)
    payload = sum(group.bytes for group in groups.values())
    full = sum(group.full_bytes for group in groups.values())
    target = None if allocation is None else allocation.target_bytes
    return Forecast(spell(rules.codec), groups, files, files + payload, full, target)


def _gather(
    pair: DeltaPair,
    names: list[str],
    sizes: dict[str, tuple[int | None, bool]],
    choices: dict[str, Choice],
    allocation: Allocation | None,
) -> GroupForecast:
    counts: dict[str, int] = {}
    for name in names:
        codec, value = choices[name].codec, choices[name].treatment == "value"
        label = spell(codec) if codec is not None else "dense" if value else "base"
        if value and allocation is not None and not allocation.predicted[name].bytes:
            label = "unchanged"
        counts[label] = counts.get(label, 0) + 1
    error = None
    if allocation is not None:
        energy = math.fsum(allocation.predicted[name].energy for name in names)
        left = math.fsum(allocation.predicted[name].error for name in names)
        error = math.sqrt(left / energy) if energy else 0.0
    return GroupForecast(
        tensors=len(names),
        bytes=sum(size or 0 for size, _ in sizes.values()),
        full_bytes=sum(pair.tuned.tensors[name].nbytes for name in names),
        certain=all(certain for _, certain in sizes.values()),
        known=all(size is not None for size, _ in sizes.values()),
        error=error,
        stored=dict(sorted(counts.items(), key=lambda item: -item[1])),
    )


def _foresee(pair: DeltaPair, name: str, rules: Rules, choice: Choice) -> tuple[Stored, int | None, bool]:
    """As far as headers tell: how a tensor would lie in the artifact, its payload bytes, whether they are certain."""
    if choice.codec is None or choice.codec.name == "dense":
        item = stored(pair, name, rules.codec, Choice("value", choice.codec) if choice.codec else choice)
        return item, item.payload, True
    shape = pair.tuned.tensors[name].shape
    base_name = pair.base_name(name) or name
    matrix = (min(shape[-2], pair.base.tensors[base_name].shape[-2]), shape[-1])
    out, columns = matrix[::-1] if pair.transposed(name) else matrix
    experts = shape[0] if len(shape) == 3 else 1
    terms = tuple(
        TermRecord(term.name, term.settings(), i if len(shape) == 3 else None)
        for i in range(experts)
        for term in _probe(choice.codec)
    )
    try:
        item = stored(pair, name, rules.codec, choice, terms)
    except DeltakeeperError:
        item = stored(pair, name, rules.codec, Choice("base", choice.codec))
    added = (shape[0] - matrix[0]) * columns * pair.tuned.tensors[name].dtype.itemsize if len(shape) == 2 else 0
    exact = choice.codec.payload_bytes((out, columns))
    size = exact if exact is not None else choice.codec.expected_bytes((out, columns))
    return item, None if size is None else experts * size + added, exact is not None


@cache
def _probe(codec: Codec) -> list[Layout]:
    """Terms of a small matrix, for what the manifest says of them."""
    try:
        return codec.encode(torch.linspace(-1, 1, 64 * 128).reshape(64, 128), name="probe")
    except DeltakeeperError:
        return []
