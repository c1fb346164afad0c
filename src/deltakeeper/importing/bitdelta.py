"""BitDelta's own file: a dictionary saved by `torch.save`, read without unpickling code.

Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit", 2024, https://arxiv.org/abs/2402.10193. For a linear
layer `m` of `(out, in)` the file holds `m.mask`, int32 `(in/32, out)`, whose bit `j` of word `[i, o]` is set where the
delta of output `o` and input `32 i + j` is not negative, and `m.coeff`, the one scale. All other tensors are whole.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch

from deltakeeper.checkpoint import Checkpoint, TensorInfo
from deltakeeper.delta import HEAD_NAMES
from deltakeeper.errors import CheckpointError
from deltakeeper.importing.source import ForeignDelta, Imported
from deltakeeper.layouts import Dense, Signs

_SETTINGS = {"planes": 1, "scale": "tensor", "zero": "plus"}


class BitDeltaFile(ForeignDelta):
    """A `diff.pt`; all shapes are compared with the base's before a tensor is copied out of the file."""

    kind: ClassVar[str] = "bitdelta"

    def __init__(self, path: Path, base: Checkpoint) -> None:
        self.path, self.name_or_path = path, str(path)
        self._held = _load(path)
        self._check(base)
        self.tensors = dict(base.tensors)
        for name, held in self._held.items():
            if not name.endswith((".mask", ".coeff")):
                dtype = base.tensors[name].dtype if name in base.tensors else held.dtype
                self.tensors[name] = TensorInfo(name, dtype, tuple(held.shape))
        self.tensors = dict(sorted(self.tensors.items()))

    def read(self, name: str) -> Imported | None:
        """See `ForeignDelta.read`; a value is rounded to the base's dtype, as BitDelta itself loads it."""
        info = self.tensors[name]
        module = name.removesuffix(".weight")
        if name in self._held:
            value = self._held[name].to(info.dtype).contiguous()
            self._check_finite(name, value)
            return Imported([Dense(info.shape, "value", value)])
        if name == module or f"{module}.mask" not in self._held:
            return None
        scale = self._held[f"{module}.coeff"].float().reshape(1).contiguous()
        self._check_finite(f"{module}.coeff", scale)
        words = self._held[f"{module}.mask"].T.contiguous()
        return Imported([Signs.from_tensors(info.shape, _SETTINGS, {"delta_packed.0": words, "delta_scale.0": scale})])

    def _check(self, base: Checkpoint) -> None:
        size = self.path.stat().st_size
        for name, held in self._held.items():
            module, _, kind = name.rpartition(".")
            target = f"{module}.weight" if kind in ("mask", "coeff") else name
            if target not in base.tensors and not (kind == "weight" and name.endswith(HEAD_NAMES)):
                raise CheckpointError(
                    f"{self.path} changes '{target}', which {base.name_or_path} does not have; give the base of it."
                )
            shape = base.tensors[target].shape if target in base.tensors else tuple(held.shape)
            if kind == "mask":
                wanted = len(shape) == 2 and shape[1] % 32 == 0 and tuple(held.shape) == (shape[1] // 32, shape[0])
                if not wanted or held.dtype != torch.int32 or f"{module}.coeff" not in self._held:
                    raise self._misfit(name, held, f"the mask of a matrix {shape}, with its coeff")
            elif kind == "coeff":
                if held.numel() != 1 or not held.is_floating_point() or f"{module}.mask" not in self._held:
                    raise self._misfit(name, held, "one number, with its mask")
            else:
                grown = held.ndim == 2 and held.ndim == len(shape) and tuple(held.shape[1:]) == shape[1:]
                fits = tuple(held.shape) == shape or grown
                if not fits or not held.is_floating_point() or held.numel() * held.element_size() > size:
                    raise self._misfit(name, held, f"floating-point numbers {shape}, as in the base")

    def _misfit(self, name: str, held: torch.Tensor, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: '{name}' is {held.dtype} {tuple(held.shape)} but must be {wanted}; get the file again, or "
            "give the base that it was made from."
        )

    def _check_finite(self, name: str, tensor: torch.Tensor) -> None:
        if not math.isfinite(float(tensor.sum(dtype=torch.float32))) and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{self.path}: '{name}' is not finite; get the file again.")


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        held: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # the reader raises many kinds; each means that the file is not to be read
        raise CheckpointError(  # without torch's own words, which say how to run the code in the file
            f"{path} is no file of tensors that torch reads without running code ({type(error).__name__}); give the "
            "diff.pt that BitDelta wrote."
        ) from error
    if not isinstance(held, dict) or not held:
        raise CheckpointError(f"{path} is no dictionary of tensors; give the diff.pt that BitDelta wrote.")
    for name, tensor in held.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        if not isinstance(name, str) or not plain or tensor.is_meta or tensor.is_complex():
            raise CheckpointError(f"{path}: '{name}' is no plain tensor; give the diff.pt that BitDelta wrote.")
    return {name: tensor.detach() for name, tensor in held.items()}
