"""Products with a term whose values are trained, without making it dense where its layout allows that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from deltakeeper.layouts import Layout, Lowrank, Signs
from deltakeeper.layouts.bits import unpack_bits

Values = Mapping[str, torch.Tensor]


class _SignedProduct(torch.autograd.Function):
    """`x @ signsᵀ` for int8 signs, which are widened when they are used and never kept wide."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(signs)
        return F.linear(x, signs.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (signs,) = ctx.saved_tensors
        return grads[0] @ signs.to(grads[0].dtype), None


def _signed(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = _SignedProduct.apply(x, signs)  # type: ignore[no-untyped-call]
    return found


FAST = (Signs, Lowrank)
"""Layouts that need not be made dense."""


class Product:
    """One term of a delta, multiplied and looked up with other values in the place of its own.

    Sign planes are unpacked once, to a byte a weight, and scales multiply what goes in or comes out; factors are
    multiplied one after the other. Every other layout is made dense for each product, and again in the backward pass;
    or once for each dtype, where no values are given.
    """

    def __init__(self, term: Layout) -> None:
        self.term = term
        self._planes: list[torch.Tensor] | None = None
        self._dense: dict[torch.dtype, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, values: Values) -> torch.Tensor:
        """`x @ termᵀ`: `(..., in) -> (..., out)`, differentiable in `x` and in the values."""
        if isinstance(self.term, Signs):
            return self._signed(self.term, x, values)
        if isinstance(self.term, Lowrank) and self.term.packed is None:
            left, right = values["delta_U"], values["delta_V"].to(x.device) * self.term.gain.to(x.device)
            return F.linear(F.linear(x, right.to(x)), left.to(x))
        if not values:
            return F.linear(x, self._as(x))
        found: torch.Tensor = checkpoint(self._dense_product, x, values, use_reentrant=False)
        return found

    def rows(self, ids: torch.Tensor, values: Values) -> torch.Tensor:
        """Rows of the term, float32 `(*ids, in)`, differentiable in the values."""
        if isinstance(self.term, Signs):
            return self._signed_rows(self.term, ids, values)
        if isinstance(self.term, Lowrank) and self.term.packed is None:
            left, right = values["delta_U"].to(ids.device), values["delta_V"].to(ids.device)
            return F.embedding(ids, left) @ (right * self.term.gain.to(ids.device))
        if not values:
            return F.embedding(ids, self._as(torch.zeros(0, device=ids.device)))
        found: torch.Tensor = checkpoint(self._dense_rows, ids, values, use_reentrant=False)
        return found

    def _signed(self, term: Signs, x: torch.Tensor, values: Values) -> torch.Tensor:
        total: torch.Tensor | None = None
        for k, signs in enumerate(self._unpacked(term, x.device)):
            scale = values[f"delta_scale.{k}"].to(x.device)
            if term.scale == "column":
                part = _signed(x * scale.flatten().to(x.dtype), signs)
            else:
                part = _signed(x, signs) * scale.flatten().to(x.dtype)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _signed_rows(self, term: Signs, ids: torch.Tensor, values: Values) -> torch.Tensor:
        total: torch.Tensor | None = None
        for k, signs in enumerate(self._unpacked(term, ids.device)):
            scale = values[f"delta_scale.{k}"].to(ids.device)
            scale = F.embedding(ids, scale) if term.scale == "row" else scale.flatten()
            part = signs[ids].float() * scale
            total = part if total is None else total + part
        assert total is not None
        return total

    def _unpacked(self, term: Signs, device: torch.device) -> list[torch.Tensor]:
        if self._planes is None:
            columns = term.shape[1]
            present = None if term.nonzero is None else unpack_bits(term.nonzero, columns)
            planes = [unpack_bits(words, columns).to(torch.int8).mul_(2).sub_(1) for words in term.packed]
            self._planes = [(p if present is None else p.mul_(present)).to(device) for p in planes]
        return self._planes

    def _dense_product(self, x: torch.Tensor, values: Values) -> torch.Tensor:
        return F.linear(x, self.term.dense_from(values).to(x))

    def _dense_rows(self, ids: torch.Tensor, values: Values) -> torch.Tensor:
        return F.embedding(ids, self.term.dense_from(values).to(ids.device))

    def _as(self, like: torch.Tensor) -> torch.Tensor:
        if like.dtype not in self._dense:
            self._dense[like.dtype] = self.term.to_dense().to(like)
        return self._dense[like.dtype]
