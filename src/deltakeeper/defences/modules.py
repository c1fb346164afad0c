"""The tensors that a defence treats, read one at a time: base, fine-tune, the model before alignment, and inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from deltakeeper.calibration import Calibration
from deltakeeper.checkpoint import Checkpoint
from deltakeeper.codecs import Inputs
from deltakeeper.codecs.matrices import peak
from deltakeeper.defences.base import Defence, Module, Side
from deltakeeper.delta import DeltaPair
from deltakeeper.errors import CheckpointError
from deltakeeper.plan import in_order


class Modules:
    """What a defence covers, by name, in the order that needs the fewest passes over the rows.

    Attributes:
        models: base and fine-tune.
        names: names in the fine-tune; aliases are left out.
    """

    def __init__(
        self,
        defence: Defence,
        models: DeltaPair,
        *,
        twin: DeltaPair | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """Choose the tensors; nothing is read yet.

        Args:
            defence: says what it covers.
            models: base and fine-tune.
            twin: the model before alignment as the base, and the base as its fine-tune.
            calibration: inputs of the layers of the base or of the fine-tune, as the defence asks.
        """
        self.models = models
        self._twin, self._calibration, self._side = twin, calibration, defence.runs
        found = in_order(n for n in models.names() if n not in models.tied and defence.covers(models, n))
        ranks = {name: i for i, name in enumerate(() if calibration is None else calibration.names)}
        self.names: list[str] = sorted(found, key=lambda n: ranks.get(self._origin(n), len(ranks)))

    def parts(self, name: str) -> Iterator[Module]:
        """The modules of one tensor: itself, oriented `(out, in)`, or one for each expert of a stacked tensor.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        read = self.models.tensor(name)
        assert read.base is not None  # or no defence would cover it
        rows = read.shared_rows
        base = widened(read.base[:rows], name, self.models.base)
        tuned = widened(read.tuned[:rows], name, self.models.tuned)
        before = self._unaligned(name, base)
        if read.transposed:
            base, tuned = base.T.contiguous(), tuned.T.contiguous()
            before = None if before is None else before.T.contiguous()
        if base.ndim != 3:
            yield Module(name, read.role, base, tuned, before, self._inputs(name))
            return
        for i in range(len(base)):
            yield Module(f"{name}[{i}]", read.role, base[i], tuned[i], None if before is None else before[i])

    def join(self, name: str, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """What `parts` took apart: the tensor in the fine-tune's dtype and shape, rounded once, with its added rows.

        Args:
            name: of the tensor.
            weights: one for each part, float32.
        """
        info, models = self.models.tuned.tensors[name], self.models
        whole = weights[0] if len(info.shape) != 3 else torch.stack(list(weights))
        whole = (whole.T if models.transposed(name) else whole).to(info.dtype).contiguous()
        added = info.shape[0] - len(whole)
        return whole if not added else torch.cat([whole, models.tuned.read(name)[-added:].to(info.dtype)])

    def _origin(self, name: str) -> str:
        return name if self._side == "tuned" else self.models.base_name(name) or name

    def _inputs(self, name: str) -> Inputs | None:
        return None if self._calibration is None else self._calibration.inputs(self._origin(name))

    def _unaligned(self, name: str, base: torch.Tensor) -> torch.Tensor | None:
        """The tensor before alignment over the rows of `base`; rows that it does not have count as unaltered."""
        origin = None if self._twin is None else self._twin.base_name(self.models.base_name(name) or name)
        if self._twin is None or origin is None:
            return None
        before = widened(self._twin.base.read(origin)[: len(base)], origin, self._twin.base)
        return before if len(before) == len(base) else torch.cat([before, base[len(before) :]])


def widened(tensor: torch.Tensor, name: str, model: Checkpoint) -> torch.Tensor:
    """A finite tensor as float32.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    found = tensor.to(torch.float32)
    if found.numel() and not abs(peak(found)) < float("inf"):
        raise CheckpointError(
            f"tensor '{name}' of {model.name_or_path} holds NaN or infinity; repair this model or leave it out."
        )
    return found


def kept(models: DeltaPair, name: str, side: Side) -> tuple[torch.Tensor, bool]:
    """A tensor that no defence treats, in the fine-tune's dtype and shape, and whether it is the base's.

    Rows that the fine-tune added and tensors that it brought stay in any case: the model would not load without them.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    info, read = models.tuned.tensors[name], models.tensor(name)
    if read.tuned.is_floating_point():
        widened(read.tuned, name, models.tuned)
    tuned = read.tuned.to(info.dtype)
    if side == "tuned" or read.base is None or read.base.shape[1:] != tuned.shape[1:] or tuned.ndim == 0:
        return tuned, False
    rows = min(len(tuned), len(read.base))
    if read.base.is_floating_point():
        widened(read.base, name, models.base)
    return torch.cat([read.base[:rows].to(info.dtype), tuned[rows:]]), True
