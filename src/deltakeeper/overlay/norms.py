"""Norms of any family: vectors of tenants are gathered row by row and stand in for the module's in its own formula."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deltakeeper.kernels.pointwise import rms_norm
from deltakeeper.kernels.rows import RowGroups
from deltakeeper.overlay.current import CurrentPass
from deltakeeper.overlay.site import Part, Place, Site, Stack
from deltakeeper.overlay.sliced import SlicedSite

PROBE_ROWS = 8


class NormSite(Site):
    """A module of vectors alone that multiplies or adds them entry by entry, whatever else it does.

    The formula is the module's: its parameters are exchanged for the length of a call. Every entry is then computed as
    before, so rows of the base keep their bits in any company.
    """

    def __init__(self, name: str, module: nn.Module, current: CurrentPass) -> None:
        super().__init__(name, module, current)
        self.stacks: dict[str, Stack] = {}
        # Kept apart: while a pass exchanges the module's parameters, another thread may be loading a tenant.
        self.base = {leaf: value for leaf, value in self.parameters.items() if value is not None}
        self.leaves = list(self.base)
        self.width = len(self.base[self.leaves[0]])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """`(..., width)` of any arrangement of rows, to what the module gives."""
        groups = self.current.groups
        if groups is None or not self.stacks or groups.base_only:
            return self.inner(x, *args, **kwargs)
        shape, parameters = self.shape_for(x), self.parameters
        for leaf, stack in self.stacks.items():
            parameters[leaf] = stack.vectors.index_select(0, groups.row_slots).view(shape)
        try:
            return self.inner(x, *args, **kwargs)
        finally:
            parameters.update(self.base)

    def shape_for(self, x: torch.Tensor) -> tuple[int, ...]:
        """How gathered vectors `(rows, width)` have to lie to meet the rows of `x`: ones stand for heads.

        Raises:
            OverlayError: `x` has other rows than the pass was told of.
        """
        rows, shape = self.current.rows, x.shape
        if x.ndim == 4 and shape[0] * shape[2] == rows and (shape[0] * shape[1] != rows or x.stride(1) < x.stride(2)):
            return shape[0], 1, shape[2], self.width  # (batch, heads, tokens, width)
        count = 1
        for axis, size in enumerate(shape[:-1]):
            count *= size
            if count == rows:
                return (*shape[: axis + 1], *(1 for _ in shape[axis + 1 : -1]), self.width)
        raise self.misfit(x.numel() // shape[-1])

    def place(self, leaf: str, expert: int | None = None, half: int | None = None) -> Place | None:
        """See `Site.place`."""
        if leaf not in self.leaves or expert is not None:
            return None
        live = self.base[leaf]
        return Place(self, leaf, live, tuple(live.shape))

    def grow(self, lanes: torch.Tensor, slots: int) -> None:
        """See `Site.grow`."""
        self.slots = slots
        for stack in self.stacks.values():
            stack.grow(slots)

    def put(self, slot: int, part: Part | None) -> None:
        """See `Site.put`."""
        values = {} if part is None else part.values
        for leaf in self.leaves:
            value = values.get(leaf)
            if leaf not in self.stacks:
                if value is None:
                    continue
                self.stacks[leaf] = Stack(self.base[leaf].detach(), self.slots)
            if not self.stacks[leaf].put(slot, value):
                del self.stacks[leaf]


class RmsNormSite(NormSite):
    """A norm that was seen to be `x / rms(x) * weight`, rounded in between as torch's own does: three operations."""

    def __init__(self, name: str, module: nn.Module, current: CurrentPass, epsilon: float) -> None:
        super().__init__(name, module, current)
        self.epsilon = epsilon
        self.sizes = tuple(self.parameters["weight"].shape)

    def rows(self, groups: RowGroups) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights `(known, width)` and which of them each row takes, int64 `(rows,)`."""
        if self.stacks:
            return self.stacks["weight"].vectors, groups.row_slots
        return self.parameters["weight"].unsqueeze(0), groups.base_slots

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """See `NormSite.forward`."""
        groups = self.current.groups
        weight = self.parameters["weight"]
        if groups is None or args or kwargs or x.dtype != weight.dtype:
            return super().forward(x, *args, **kwargs)
        stacks = self.stacks
        known, rows = self.rows(groups)
        count, width = self.current.rows, x.shape[-1]
        if x.is_contiguous() and x.numel() == count * width and x.device.type == "cpu":
            return rms_norm(x.view(count, width), known, rows, self.epsilon).view(x.shape)
        if stacks and not groups.base_only:
            weight = known.index_select(0, groups.row_slots).view(self.shape_for(x))
        return F.rms_norm(x, self.sizes, None, self.epsilon) * weight


class FusedNormSite(NormSite):
    """`nn.LayerNorm` and `nn.RMSNorm`, which take one vector for all rows: rows with their own are computed apart.

    Rows of tenants are scaled in float32 and rounded once, and all others are the module's.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """See `NormSite.forward`."""
        y = self.inner(x, *args, **kwargs)
        groups, module = self.current.groups, self.module
        if groups is None or not self.stacks or groups.base_only:
            return y
        shape, sizes = self.shape_for(x), x.shape[-1:]
        if isinstance(module, nn.LayerNorm):
            own = F.layer_norm(x.float(), sizes, None, None, module.eps)
        else:
            epsilon: Any = module.eps
            own = F.rms_norm(x.float(), sizes, None, torch.finfo(x.dtype).eps if epsilon is None else epsilon)
        changed = None
        for leaf in self.leaves:
            stack = self.stacks.get(leaf)
            vectors = self.parameters[leaf]
            if stack is not None:
                vectors = stack.vectors.index_select(0, groups.row_slots).view(shape)
                changed = stack.changed if changed is None else changed | stack.changed
            own = own * vectors if leaf == "weight" else own + vectors
        assert changed is not None
        mask = changed.index_select(0, groups.row_slots).view(*shape[:-1], 1)
        return torch.where(mask, own.to(y.dtype), y)


def norm_site(name: str, module: nn.Module, current: CurrentPass) -> Site | None:
    """The site for a module of vectors alone, by what it is seen to compute; None if it takes no rows."""
    values = [value for value in module._parameters.values() if value is not None]
    if not values or any(value.ndim != 1 or value.shape != values[0].shape for value in values):
        return None
    if type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return FusedNormSite(name, module, current)
    site = NormSite(name, module, current)
    if not _acts_by_entry(site):
        sliced = SlicedSite(name, module, current)
        return sliced if _acts_by_row(sliced, values[0]) else None
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if site.leaves == ["weight"] and isinstance(epsilon, float):
        fast = RmsNormSite(name, module, current, epsilon)
        if _same_bits(fast):
            return fast
    return site


def _probe(width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(PROBE_ROWS, width, generator=generator).to(dtype)


@torch.no_grad()
def _acts_by_entry(site: NormSite) -> bool:
    """Whether two rows with vectors of their own come out as each does alone, to the bit."""
    parameters = site.parameters
    first = {leaf: value.detach() for leaf, value in site.base.items()}
    other = {leaf: value * 1.5 + 0.25 for leaf, value in first.items()}
    value = next(iter(first.values()))
    x = _probe(len(value), value.dtype)[:2]
    try:
        rows = []
        for row, vectors in enumerate((first, other)):
            parameters.update(vectors)
            rows.append(site.inner(x[row : row + 1]))
        parameters.update({leaf: torch.stack([first[leaf], other[leaf]]) for leaf in site.leaves})
        both = site.inner(x)
        return isinstance(both, torch.Tensor) and torch.equal(both, torch.cat(rows)) and not torch.equal(*rows)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    finally:
        parameters.update(site.base)


@torch.no_grad()
def _acts_by_row(site: SlicedSite, vector: torch.Tensor) -> bool:
    """Whether rows come out as each does alone, at least nearly."""
    x = _probe(len(vector), vector.dtype)[:2]
    try:
        both, rows = site.inner(x), torch.cat([site.inner(x[:1]), site.inner(x[1:])])
        return both.shape == x.shape and torch.allclose(both, rows, rtol=1e-2)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False


@torch.no_grad()
def _same_bits(site: RmsNormSite) -> bool:
    weight = site.parameters["weight"]
    x = _probe(len(weight), weight.dtype)
    return torch.equal(F.rms_norm(x, site.sizes, None, site.epsilon) * weight, site.inner(x))
