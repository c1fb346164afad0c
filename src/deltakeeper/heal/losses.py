"""What healing makes small: how far the student's logits are from the teacher's on one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

Loss = Literal["logit_mse"]
LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def logit_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of logits, float32 `(rows, tokens, vocabulary)` both, over every position."""
    return (student - teacher).square().mean()


LOSSES: dict[str, LossFunction] = {"logit_mse": logit_mse}
"""Losses by name; each takes the student's and the teacher's logits and gives a scalar with a gradient."""
