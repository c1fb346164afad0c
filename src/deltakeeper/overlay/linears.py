"""Linear layers: the base's product plus each row's packed terms, and biases and whole matrices of tenants."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deltakeeper.kernels.products import add_terms_, linear
from deltakeeper.kernels.rows import RowGroups
from deltakeeper.overlay.current import CurrentPass, Span
from deltakeeper.overlay.site import Part, Place, Site, Stack


class LinearSite(Site):
    """A linear layer of plain weights `(out, in)`."""

    lanes = 1
    resizable = False
    transposed = False

    def __init__(self, name: str, module: nn.Module, current: CurrentPass) -> None:
        super().__init__(name, module, current)
        self.out, self.width = self.sizes()
        self.table = torch.zeros(1, 1, dtype=torch.int64)
        self.matrices: dict[int, torch.Tensor] = {}
        self.biases: Stack | None = None

    def sizes(self) -> tuple[int, int]:
        """Outputs and inputs."""
        out, width = self.parameters["weight"].shape
        return out, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., in)` to `(..., out)`."""
        current = self.current
        groups = current.groups
        if groups is None:
            return self.inner(x)  # type: ignore[no-any-return]
        shape = x.shape
        flat = x if len(shape) == 2 else x.reshape(-1, self.width)  # (rows, in)
        if flat.shape[0] != current.rows:
            raise self.misfit(flat.shape[0])
        y = self.product(flat if flat.is_contiguous() else flat.contiguous(), groups)
        if self.matrices:
            self.replace_rows(y, flat, current.spans)
        if self.biases is not None:
            y.add_(self.biases.vectors.index_select(0, groups.row_slots))
        if len(shape) == 3:
            return y.view(shape[0], shape[1], self.out)
        return y if len(shape) == 2 else y.view(*shape[:-1], self.out)

    def product(self, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """Base and packed terms, `(rows, in)` to `(rows, out)`; base rows run through the same code in any company."""
        parameters, merge_from = self.parameters, self.current.merge_from
        return linear(x, parameters["weight"], parameters["bias"], self.table, groups, merge_from=merge_from)

    def replace_rows(self, y: torch.Tensor, x: torch.Tensor, spans: list[Span]) -> None:
        """Write the rows of tenants that have a whole matrix of their own."""
        bias = self.parameters.get("bias")
        for slot, start, end in spans:
            matrix = self.matrices.get(slot)
            if matrix is not None:
                y[start:end] = F.linear(x[start:end], matrix.to(x.dtype), bias)

    def place(self, leaf: str, expert: int | None = None, half: int | None = None) -> Place | None:
        """See `Site.place`."""
        live = self.parameters.get(leaf)
        if expert is not None or (leaf != "weight" and (leaf != "bias" or live is None)):
            return None
        if leaf == "bias":
            return Place(self, leaf, live, (self.out,), precise=True, resizable=self.resizable)
        shape = (self.width, self.out) if self.transposed else (self.out, self.width)
        return Place(self, leaf, live, shape, 0, transposed=self.transposed, resizable=self.resizable)

    def grow(self, lanes: torch.Tensor, slots: int) -> None:
        """See `Site.grow`."""
        self.slots, self.table = slots, lanes[0]
        if self.biases is not None:
            self.biases.grow(slots)

    def put(self, slot: int, part: Part | None) -> None:
        """See `Site.put`."""
        matrix = None if part is None else part.values.get("weight")
        if matrix is None:
            self.matrices.pop(slot, None)
        else:
            self.matrices[slot] = matrix
        self.put_bias(slot, None if part is None else part.values.get("bias"))

    def put_bias(self, slot: int, bias: torch.Tensor | None) -> None:
        """Hold how a slot's bias differs from the base's: rows of the base then add a zero, on the same path."""
        if self.biases is None:
            if bias is None:
                return
            self.biases = Stack(torch.zeros(self.out), self.slots)
        difference = None if bias is None else bias - self.parameters["bias"].detach().float()
        if not self.biases.put(slot, difference):
            self.biases = None


class OtherLinearSite(LinearSite):
    """A linear layer that multiplies in its own way (quantised, or stored `(in, out)`); terms are added to that."""

    def sizes(self) -> tuple[int, int]:
        """Outputs and inputs."""
        module: Any = self.module
        if hasattr(module, "in_features"):
            return int(module.out_features), int(module.in_features)
        self.transposed = True  # Conv1D
        width, out = self.parameters["weight"].shape
        return out, width

    def product(self, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """See `LinearSite.product`."""
        y: torch.Tensor = self.inner(x).contiguous()
        if not groups.base_only:
            add_terms_(y, x, self.table, groups)
        return y
