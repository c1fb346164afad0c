"""From names in a checkpoint to parameters of a live model, through the renaming that transformers does on loading."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Location:
    """Where a checkpoint's tensor lies in the live model.

    Attributes:
        parameter: name of the live parameter or buffer.
        expert: index along its first dimension, where the checkpoint has a tensor for every expert.
        half: which of the matrices that are stacked there, None if it is one alone.
    """

    parameter: str
    expert: int | None = None
    half: int | None = None


class LiveNames:
    """Names of a model's parameters and buffers, found by the names that they have in checkpoints.

    Attributes:
        tensors: parameters and buffers by name, those that are shared under each of their names.
    """

    def __init__(self, model: nn.Module, modules: Collection[str] = ()) -> None:
        self.tensors: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
        self.tensors |= dict(model.named_buffers(remove_duplicate=False))
        # A quantised layer may keep its weight under names of its own, and is found by that of its module.
        self._weights = {f"{module}.weight" for module in modules} | set(self.tensors)
        self._prefix = getattr(model, "base_model_prefix", None) or ""
        self._conversions = _conversions(model)

    def locate(self, name: str) -> Location | None:
        """Where a tensor of a checkpoint lies, or None if the model does not have it (or in a form of its own)."""
        if name in self._weights:
            return Location(name)
        renamed = name
        for conversion in self._conversions:
            if not hasattr(conversion, "operations"):
                renamed, _ = conversion.rename_source_key(renamed)
        for conversion in self._conversions:
            if hasattr(conversion, "operations"):
                target, pattern = conversion.rename_source_key(renamed)
                if pattern is not None:
                    return self._fused(renamed, target, pattern, conversion)
        known = self._known(renamed)
        return None if known is None else Location(known)

    def _known(self, name: str) -> str | None:
        options = [name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")]
        return next((option for option in options if option in self._weights), None)

    def _fused(self, source: str, target: str, pattern: str, conversion: Any) -> Location | None:
        """A matrix of one expert that the live model keeps in a 3-D parameter, one below the other with its twin."""
        steps = [type(step).__name__ for step in conversion.operations]
        dims = [getattr(step, "dim", None) for step in conversion.operations]
        plain = (steps, dims) in ((["MergeModulelist"], [0]), (["MergeModulelist", "Concatenate"], [0, 1]))
        index = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), source)
        known = self._known(target)
        if not plain or index is None or not index.groups() or known is None:
            return None
        stacked = len(steps) > 1
        if stacked and len(conversion.source_patterns) != 2:
            return None
        half = list(conversion.source_patterns).index(pattern) if stacked else None
        return Location(known, int(index.group(1)), half)


def _conversions(model: nn.Module) -> list[Any]:
    """What transformers does to names (and to some tensors) between a checkpoint of this model and its modules."""
    own = getattr(model, "_weight_conversions", None)
    if own is not None:
        return list(own)
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []
    if not isinstance(model, PreTrainedModel):
        return []
    # A renaming that adds or drops a prefix whatever is there belongs to one way of loading, which this was not.
    found = get_model_conversion_mapping(model, add_legacy=False)
    return [conversion for conversion in found if type(conversion).__name__ != "PrefixChange"]
