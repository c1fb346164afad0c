"""A PEFT LoRA adapter as terms: the exact factors, with the scaling as their gain, and whole tensors as values."""

from __future__ import annotations

from typing import ClassVar

import torch

from deltakeeper.errors import CheckpointError
from deltakeeper.importing.source import ForeignDelta, Imported
from deltakeeper.layouts import Dense, Lowrank
from deltakeeper.layouts.settings import FLOAT_DTYPES, dtype_name
from deltakeeper.lora import LoraCheckpoint


class Adapter(ForeignDelta):
    """LoRA with its rank and alpha patterns, rank-stabilised scaling and `modules_to_save`."""

    kind: ClassVar[str] = "peft"

    def __init__(self, adapter: LoraCheckpoint) -> None:
        self.adapter = adapter
        self.path, self.name_or_path = adapter.path, adapter.name_or_path
        self.tensors = adapter.tensors

    def read(self, name: str) -> Imported | None:
        """See `ForeignDelta.read`; a value is rounded to the base's dtype, factors are kept as they are."""
        value = self.adapter.replaced(name)
        if value is not None:
            rounded = value.to(self.tensors[name].dtype).contiguous()
            return Imported([Dense(self.tensors[name].shape, "value", rounded)])
        found = self.adapter.factors(name)
        if found is None:
            return None
        left, right = (factor.contiguous() for factor in found)
        scaling = self.adapter.scaling(name)
        if scaling == 0 or not left.any() or not right.any():
            return None  # as for a module that was wrapped and not trained
        if left.dtype != right.dtype or left.dtype not in FLOAT_DTYPES.values():
            left, right = left.float(), right.float()
        shape = (left.shape[0], right.shape[1])
        if left.shape[1] > min(shape):  # no layout holds more directions than a matrix has: multiply them out
            left, right = (left.float() @ right.float(), torch.eye(shape[1]))
            left, right = (left, right) if shape[1] <= shape[0] else (torch.eye(shape[0]), left)
        settings = {"rank": left.shape[1], "factors": dtype_name(left.dtype)}
        gain = torch.tensor([scaling], dtype=torch.float32)
        tensors = {"delta_U": left, "delta_V": right, "delta_gain": gain}
        for part in tensors.values():
            if not torch.isfinite(part).all():
                raise CheckpointError(f"{self.path}: the factors of '{name}' are not finite; get the adapter again.")
        return Imported([Lowrank.from_tensors(shape, settings, tensors)], self.adapter.transposed(name))
