"""Experts that transformers keeps in two 3-D parameters: each expert's rows, tenant by tenant."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deltakeeper.kernels.products import add_terms_, linear
from deltakeeper.kernels.rows import RowGroups
from deltakeeper.overlay.current import CurrentPass, spans_of
from deltakeeper.overlay.site import Part, Place, Site

GATE, UP, BOTH, DOWN = range(4)
"""What a lane of an expert holds terms of: gate and up apart, as most checkpoints have them, or as one matrix."""
PARAMETERS = ("gate_up_proj", "down_proj")
_FORM = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
    "_is_expert_parallel": False,
}


class ExpertsSite(Site):
    """A module called as `(hidden_states, top_k_index, top_k_weights)` with plain gated experts."""

    def __init__(self, name: str, module: nn.Module, current: CurrentPass) -> None:
        super().__init__(name, module, current)
        experts, rows, _ = self.parameters["gate_up_proj"].shape
        self.experts, self.half = experts, rows // 2
        self.lanes = 4 * experts
        self.table = torch.zeros(experts, 4, 1, 1, dtype=torch.int64)
        self.matrices: dict[tuple[int, int], dict[int, torch.Tensor]] = {}
        self._gate: Any = module._apply_gate

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether this is such a module."""
        weights = [module._parameters.get(leaf) for leaf in PARAMETERS]
        if len(module._parameters) != len(weights) or any(w is None or w.ndim != 3 for w in weights):
            return False
        if any(w is None or type(w.data) is not torch.Tensor or not w.is_floating_point() for w in weights):
            return False  # quantised
        return hasattr(module, "_apply_gate") and all(getattr(module, k, None) == v for k, v in _FORM.items())

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`(rows, width)`, `(rows, k)`, `(rows, k)` to `(rows, width)`."""
        groups = self.current.groups
        if groups is None:
            return self.inner(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
        rows, k = top_k_index.shape
        if rows != self.current.rows:
            raise self.misfit(rows)
        chosen = top_k_index.reshape(-1)
        order = torch.argsort(chosen, stable=True)  # by expert, rows ascending, so that a tenant's stay together
        tokens = order // k
        x = hidden_states.index_select(0, tokens)  # (rows * k, width)
        slots = groups.row_slots.index_select(0, tokens)
        out = torch.empty_like(x)
        start = 0
        for expert, count in enumerate(torch.bincount(chosen, minlength=self.experts).tolist()[: self.experts]):
            if count:
                end = start + count
                out[start:end] = self._expert(expert, x[start:end], RowGroups.of(slots[start:end]))
                start = end
        out *= top_k_weights.reshape(-1).index_select(0, order).unsqueeze(-1)
        back = torch.empty_like(out)
        back[order] = out
        return back.view(rows, k, -1).sum(1)

    def _expert(self, expert: int, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        weights, table = self.parameters["gate_up_proj"][expert], self.table[expert]
        gate = self._product(x, weights[: self.half], (expert, GATE), table[GATE], groups)
        up = self._product(x, weights[self.half :], (expert, UP), table[UP], groups)
        both = torch.cat((gate, up), -1)  # (rows, 2 * inner)
        if not groups.base_only:
            add_terms_(both, x, table[BOTH], groups)
            self._replace(both, x, (expert, BOTH), groups)
        inner = self._gate(both).contiguous()
        return self._product(inner, self.parameters["down_proj"][expert], (expert, DOWN), table[DOWN], groups)

    def _product(
        self, x: torch.Tensor, weight: torch.Tensor, key: tuple[int, int], table: torch.Tensor, groups: RowGroups
    ) -> torch.Tensor:
        y = linear(x, weight, None, table, groups, merge_from=self.current.merge_from)
        if key in self.matrices:
            self._replace(y, x, key, groups)
        return y

    def _replace(self, y: torch.Tensor, x: torch.Tensor, key: tuple[int, int], groups: RowGroups) -> None:
        by_slot = self.matrices.get(key)
        for slot, start, end in spans_of(groups) if by_slot else ():
            matrix = by_slot.get(slot) if by_slot else None
            if matrix is not None:
                y[start:end] = F.linear(x[start:end], matrix.to(x.dtype))

    def place(self, leaf: str, expert: int | None = None, half: int | None = None) -> Place | None:
        """See `Site.place`; without an expert the place is the whole parameter, which values alone can fill."""
        if leaf not in PARAMETERS or (expert is not None and not 0 <= expert < self.experts):
            return None
        live = self.parameters[leaf]
        if expert is None:
            return Place(self, leaf, live, tuple(live.shape))
        if leaf == "down_proj":
            kind, rows = DOWN, live[expert]
            if half is not None:
                return None
        elif half is None:
            kind, rows = BOTH, live[expert]
        else:
            kind, rows = (GATE, UP)[half], live[expert, half * self.half : (half + 1) * self.half]
        return Place(self, (expert, kind), rows, tuple(rows.shape), 4 * expert + kind)

    def grow(self, lanes: torch.Tensor, slots: int) -> None:
        """See `Site.grow`."""
        self.slots, self.table = slots, lanes.view(self.experts, 4, *lanes.shape[1:])

    def put(self, slot: int, part: Part | None) -> None:
        """See `Site.put`."""
        for by_slot in self.matrices.values():
            by_slot.pop(slot, None)
        self.matrices = {key: by_slot for key, by_slot in self.matrices.items() if by_slot}
        for key, value in ({} if part is None else part.values).items():
            if isinstance(key, tuple):
                self.matrices.setdefault(key, {})[slot] = value
                continue
            kind = DOWN if key == "down_proj" else BOTH  # a whole parameter: a matrix for every expert
            for expert, matrix in enumerate(value):
                self.matrices.setdefault((expert, kind), {})[slot] = matrix
