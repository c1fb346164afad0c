"""SafeLoRA: deltas that point away from what alignment changed are projected onto it.

Hsu et al., "Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language Models", NeurIPS
2024, https://arxiv.org/abs/2405.16833. Rule and settings are those of the authors' code, which pairs modules by the
order in which it meets them; here they are paired by name. The paper projects the factor B of a LoRA delta BA, which
is the same as projecting the product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from deltakeeper.defences.base import Defence, Defended, Module, Side, register_defence
from deltakeeper.defences.settings import check_settings
from deltakeeper.errors import DataError

if TYPE_CHECKING:
    from deltakeeper.defences.modules import Modules

_THRESHOLD = 0.5


@register_defence()
@dataclass(frozen=True)
class SafeLora(Defence):
    """`delta -> P delta` with `P = V Vᵀ / ‖V‖` and `V = aligned - unaligned`, where `cos(P delta, delta)` is small.

    `P` is no projection in the strict sense: it has the squared singular values of `V` over their root sum, so its
    size depends on how far alignment went. Where alignment changed nothing (`V = 0`) there is nothing to project on,
    and the delta stays, as in the authors' code.

    Attributes:
        threshold: project where the cosine is at most this, -1 to 1.
        lowest: project this many modules, those of the lowest cosines (all of equal cosine at the edge), instead of
            going by the threshold. The authors' default is 10.
        rest: tensors that are no linear layer's matrix: the fine-tune's (as published, where adapters have none), or
            the base's.
    """

    name: ClassVar[str] = "safelora"
    title: ClassVar[str] = "SafeLoRA"
    summary: ClassVar[str] = "projects deltas that point away from what alignment changed onto it"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.16833"

    threshold: float = _THRESHOLD
    lowest: int | None = None
    rest: Literal["tuned", "base"] = "tuned"

    def __post_init__(self) -> None:
        check_settings(self, threshold=(-1, 1), lowest=(1, 1_000_000))
        if self.lowest is not None and self.threshold != _THRESHOLD:
            raise DataError("defence 'safelora' takes 'threshold' or 'lowest', not both; leave one out.")

    @property
    def uses_unaligned(self) -> bool:
        """See `Defence.uses_unaligned`."""
        return True

    @property
    def others(self) -> Side:
        """See `Defence.others`."""
        return self.rest

    def spread(self, modules: Modules) -> dict[str, Defence]:
        """See `Defence.spread`; `lowest` becomes the threshold that it amounts to, or one below all cosines."""
        if self.lowest is None:
            return dict.fromkeys(modules.names, self)
        found = (_cosine(part) for name in modules.names for part in modules.parts(name))
        cosines = sorted(cosine for cosine in found if cosine is not None)
        edge = cosines[min(self.lowest, len(cosines)) - 1] if cosines else -1.0
        return dict.fromkeys(modules.names, replace(self, threshold=edge, lowest=None))

    def defend(self, module: Module) -> Defended:
        """See `Defence.defend`."""
        cosine = _cosine(module)
        if cosine is None:
            return Defended(None)
        detail = {"cosine": cosine, "projected": float(cosine <= self.threshold)}
        if cosine > self.threshold:
            return Defended(None, detail)
        direction, length = _direction(module)
        return Defended(torch.add(module.base, _through(direction, module.delta), alpha=length), detail)


def _cosine(module: Module) -> float | None:
    """`cos(P delta, delta)`: 0 where the projection is zero, None where alignment or fine-tune changed nothing."""
    direction, length = _direction(module)
    delta = module.delta
    size = _length(delta)
    if length == 0 or size == 0:
        return None
    projected = _through(direction, delta)
    reach = _length(projected)
    if reach == 0:
        return 0.0
    return min(1.0, float(torch.sum(projected.double() * delta.double())) / reach / size)


def _direction(module: Module) -> tuple[torch.Tensor, float]:
    """`V / ‖V‖` and `‖V‖`, so that no square of a small number is lost; zeros where there is no `V`."""
    safety = module.safety
    if safety is None:
        return torch.zeros_like(module.base), 0.0
    length = _length(safety)
    return (safety / length if length else safety), length


def _through(direction: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """`V Vᵀ delta` by way of the smaller of the two products."""
    if direction.shape[0] < direction.shape[1]:
        return (direction @ direction.T) @ delta
    return direction @ (direction.T @ delta)


def _length(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
