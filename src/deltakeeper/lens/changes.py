"""Variants as changes of a base's tensors by name, and mixtures: one variant with some tensors of another."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn

from deltakeeper.attach import Change
from deltakeeper.checkpoint import Checkpoint
from deltakeeper.errors import LensError
from deltakeeper.lens.restored import Place


def weights_of(tuned: Checkpoint | nn.Module) -> list[Change]:
    """All weights of a fine-tune, for `Variants(whole=...)`: as much memory as it has bytes.

    Args:
        tuned: its checkpoint; or the fine-tune in memory, for families whose experts transformers fuses on loading.
    """
    if isinstance(tuned, nn.Module):
        return [Change(name, "value", value.detach()) for name, value in tuned.named_parameters()]
    return [Change(name, "value", tuned.read(name)) for name in tuned.tensors]


def mix(receiver: Sequence[Change], donor: Sequence[Change], names: Collection[str]) -> list[Change]:
    """The receiver's changes, but the donor's for the tensors of these names; the base's where the donor has none."""
    chosen = set(names)
    return [c for c in receiver if c.name not in chosen] + [c for c in donor if c.name in chosen]


def mixtures(
    changes: Mapping[str, Sequence[Change]], donor: str, receiver: str, tensors: Mapping[Place, Collection[str]]
) -> Iterator[tuple[Place, list[Change]]]:
    """The receiver with the donor's tensors of each place in turn.

    Args:
        changes: of each variant by its name; none for the base.
        donor: name of the variant that gives.
        receiver: name of the variant that is patched.
        tensors: names of tensors by place, from `deltakeeper.lens.modules`.

    Raises:
        LensError: there is no such variant.
    """
    for name in (donor, receiver):
        if name not in changes:
            raise LensError(f"there is no variant '{name}'; name one of {', '.join(changes)}.")
    for place, names in tensors.items():
        yield place, mix(changes[receiver], changes[donor], names)
