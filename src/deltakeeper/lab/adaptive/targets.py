"""What a compression will do with each weight of a model: the tensors an attacker may go through, around or past."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from deltakeeper.checkpoint import Checkpoint
from deltakeeper.delta import pair
from deltakeeper.errors import RunError
from deltakeeper.plan import Choice, Rules


@dataclass(frozen=True, eq=False)
class Target:
    """One weight of the model in training.

    Attributes:
        name: its name in the model and in the checkpoint.
        weight: the parameter, float32.
        base: the base's tensor, in its own dtype, oriented as in the checkpoint, on the weight's device.
        choice: what a compression does with it.
        transposed: whether it is stored `(in, out)`.
    """

    name: str
    weight: torch.nn.Parameter
    base: torch.Tensor
    choice: Choice
    transposed: bool

    @property
    def encoded(self) -> bool:
        """Whether the codec encodes it."""
        return self.choice.treatment == "terms"

    def slices(self, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Matrices `(out, in)` of a tensor of this shape, with the names that codecs know them by; views."""
        if tensor.dim() == 3:
            return [(f"{self.name}[{i}]", part) for i, part in enumerate(tensor)]
        return [(self.name, tensor.T if self.transposed else tensor)]

    def delta(self) -> torch.Tensor:
        """What the weight has moved, float32."""
        return self.weight.detach() - self.base.float()


def find_targets(model: Any, base: Checkpoint, rules: Rules) -> list[Target]:
    """Every weight of a model that starts at `base`, with what `compress` would do with it; tied ones once.

    Raises:
        RunError: a weight is not in the base under the same name, in the same shape.
        CodecError: the rules do not fit a tensor.
    """
    both = pair(base, base)  # the fine-tune will have the base's names, shapes and ties
    found = []
    for name, weight in model.named_parameters():
        info = base.tensors.get(name)
        if info is None or info.shape != tuple(weight.shape):
            raise RunError(
                f"weight '{name}' of the model is not in {base.name_or_path} in this shape, so it is not known how it "
                "would be compressed; train a plain decoder that starts at this base."
            )
        if weight.dtype != torch.float32:
            raise RunError(f"weight '{name}' is {weight.dtype}; load the model in float32 to train it.")
        choice = rules.decide(both, name)
        found.append(Target(name, weight, base.read(name).to(weight.device), choice, both.transposed(name)))
    return found


@contextmanager
def trained(targets: Sequence[Target], wanted: Callable[[Target], bool]) -> Iterator[None]:
    """Train only the weights that are wanted, for a while.

    Raises:
        RunError: none is.
    """
    before = [target.weight.requires_grad for target in targets]
    chosen = [target for target in targets if wanted(target)]
    if not chosen:
        raise RunError("no weight is left to train with this codec and these rules; choose others.")
    for target in targets:
        target.weight.requires_grad_(False)
    for target in chosen:
        target.weight.requires_grad_(True)
    try:
        yield
    finally:
        for target, flag in zip(targets, before, strict=True):
            target.weight.requires_grad_(flag)
