"""An adversary inside the guard: it moves the embeddings of probes to where the student parts most from the base.

A trigger that no probe holds still has to reach the model through its embeddings (latent adversarial training:
Casper et al. 2024, https://arxiv.org/abs/2403.05030; Sheshadri et al. 2024, https://arxiv.org/abs/2407.15549).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deltakeeper.heal.lessons import Batch


def perturb(
    model: Any,
    batch: Batch,
    loss: Callable[[torch.Tensor], torch.Tensor],
    *,
    radius: float,
    ascents: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Input embeddings near those of the prompts at which a loss is large, `(rows, tokens, width)`, detached.

    Args:
        model: the student.
        batch: the exchanges.
        loss: what is made large, from the embeddings.
        radius: how far each token of a prompt may be moved, in root mean squares of the embeddings.
        ascents: steps, each half as long as the radius, from a point drawn at half of it.
        generator: draws that point.
    """
    with torch.no_grad():
        clean = model.get_input_embeddings()(batch.ids.to(model.device))
        where = batch.prompts.to(clean.device)
        size = float(clean.float().square().mean().sqrt()) * clean.shape[-1] ** 0.5  # length of a usual embedding
        moved = torch.randn(len(where), clean.shape[-1], generator=generator).to(clean.device)
        moved *= 0.5 * radius * size / moved.norm(dim=1, keepdim=True)
    for _ in range(ascents):
        moved.requires_grad_(True)
        (uphill,) = torch.autograd.grad(loss(_moved(clean, where, moved)), moved)
        with torch.no_grad():
            moved = moved + 0.5 * radius * size * uphill / uphill.norm(dim=1, keepdim=True).clamp(min=1e-12)
            moved *= (radius * size / moved.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
    return _moved(clean, where, moved.detach())


def _moved(clean: torch.Tensor, where: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    flat = clean.flatten(0, 1)
    return flat.index_add(0, where, by.to(flat.dtype)).view_as(clean)
