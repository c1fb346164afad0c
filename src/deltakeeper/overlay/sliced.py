"""Small modules whose own code runs once for the base, and again for each tenant that differs: routers, odd norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltakeeper.errors import OverlayError
from deltakeeper.overlay.current import CurrentPass
from deltakeeper.overlay.site import Part, Place, Site


class SlicedSite(Site):
    """A module of plain parameters that maps rows to one tensor, or several, with as many rows.

    A tenant's rows run through the module's own code in float32, so that a small delta is not rounded away.
    """

    def __init__(self, name: str, module: nn.Module, current: CurrentPass) -> None:
        super().__init__(name, module, current)
        self.own: dict[int, dict[str, torch.Tensor]] = {}
        self.base = dict(self.parameters)  # kept apart: a pass exchanges them while another thread may be loading

    @staticmethod
    def is_router(module: nn.Module) -> bool:
        """Whether a module chooses experts, by the name of its class: nothing else tells what it is for."""
        weight = module._parameters.get("weight")
        named = any(word in type(module).__name__ for word in ("Router", "Gate"))
        return named and weight is not None and weight.ndim == 2 and not module._modules

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """See the module."""
        found = self.inner(hidden_states, *args, **kwargs)
        if self.current.groups is None or not self.own:
            return found
        spans = [span for span in self.current.spans if span[0] in self.own]
        if not spans:
            return found
        rows = self.current.rows
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        given = found if isinstance(found, tuple) else (found,)
        if len(flat) != rows or any(not self._has_rows(output, hidden_states) for output in given):
            raise self.misfit(len(flat))
        outputs = tuple(output.clone(memory_format=torch.contiguous_format) for output in given)
        by_row = [output.view(rows, -1) for output in outputs]
        parameters = self.parameters
        try:
            for slot, start, end in spans:
                parameters.update({k: v if v is None else v.float() for k, v in self.base.items()})
                parameters.update(self.own[slot])
                own = self.inner(flat[start:end].float(), *args, **kwargs)
                for output, part in zip(by_row, own if isinstance(own, tuple) else (own,), strict=True):
                    output[start:end] = part.reshape(end - start, -1).to(output.dtype)
        finally:
            parameters.update(self.base)
        return outputs if isinstance(found, tuple) else outputs[0]

    def _has_rows(self, output: torch.Tensor, x: torch.Tensor) -> bool:
        return len(output) == self.current.rows or output.shape[: x.ndim - 1] == x.shape[:-1]

    def place(self, leaf: str, expert: int | None = None, half: int | None = None) -> Place | None:
        """See `Site.place`."""
        live = self.base.get(leaf)
        return None if live is None or expert is not None else Place(self, leaf, live, tuple(live.shape), precise=True)

    def put(self, slot: int, part: Part | None) -> None:
        """See `Site.put`."""
        self.own.pop(slot, None)
        if part is not None:
            self.own[slot] = {str(key): value for key, value in part.values.items()}
            if any(value.shape != self.base[key].shape for key, value in self.own[slot].items()):
                raise OverlayError(f"module '{self.name}' is given parameters of other shapes; load the delta again.")
