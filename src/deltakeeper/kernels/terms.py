"""Packed terms made ready for products: checked once, then known by a number that a product looks up.

A table of such numbers says which terms a tenant has at a module, so one registered operator serves any number of
tenants of any layouts without a new graph. A number that is not known is refused; a term that is released while a
product runs stays in memory until that product is done.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field

import torch

from deltakeeper.errors import LayoutError
from deltakeeper.kernels import library
from deltakeeper.kernels.prepare import prepare
from deltakeeper.layouts import Layout

_plain: dict[int, Layout] = {}
_numbers = itertools.count(1)
_alive: set[int] = set()


@dataclass(frozen=True, eq=False)
class HeldTerm:
    """A term that products may use until it is released, also by garbage collection.

    Attributes:
        id: its number, above 0.
        layout: name of its layout.
        shape: `(out, in)`.
        nbytes: bytes that it holds, those of a repacked form included.
    """

    id: int
    layout: str
    shape: tuple[int, int]
    nbytes: int
    _finalizer: weakref.finalize[[int], HeldTerm] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _alive.add(self.id)
        object.__setattr__(self, "_finalizer", weakref.finalize(self, _let_go, self.id))

    def release(self) -> None:
        """Give the memory back; more than once does no harm."""
        self._finalizer()


def hold(term: Layout) -> HeldTerm:
    """Make a term ready for products.

    Args:
        term: of two dimensions, an addend.

    Raises:
        LayoutError: it replaces its tensor, or is no matrix.
    """
    if term.replaces or len(term.shape) != 2:
        raise LayoutError(
            f"a term of layout '{term.name}' and shape {tuple(term.shape)} is no matrix that can be added to a "
            "product; use its dense value instead."
        )
    shape = (term.shape[0], term.shape[1])
    if library.compiled():
        id = prepare(term)
        nbytes = int(torch.ops.deltakeeper.held_bytes(id))
    else:
        id, nbytes = next(_numbers), term.nbytes
        _plain[id] = term
    return HeldTerm(id, term.name, shape, nbytes)


def held_terms() -> int:
    """Number of terms held, of whatever model."""
    return len(_alive)


def plain_term(id: int) -> Layout:
    """The layout behind a number, where products run in plain torch.

    Raises:
        LayoutError: there is none.
    """
    if id not in _plain:
        raise LayoutError(f"term {id} is not held; it was released while a table still named it.")
    return _plain[id]


def _let_go(id: int) -> None:
    _alive.discard(id)
    if _plain.pop(id, None) is None:
        torch.ops.deltakeeper.release(id)
