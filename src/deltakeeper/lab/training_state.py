"""The saved state of an interrupted fine-tune: weights, Adam moments and counters in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deltakeeper.errors import RunError


def save_state(
    path: Path,
    identity: str,
    step: int,
    losses: Sequence[float],
    tokens: int,
    weights: Sequence[torch.nn.Parameter],
    optimiser: torch.optim.Optimizer,
) -> None:
    """Write the state to `path` + `.safetensors` under a temporary name, then rename."""
    tensors = {}
    for i, weight in enumerate(weights):
        moments = optimiser.state.get(weight, {})
        tensors[f"{i}.weight"] = weight.detach().contiguous()
        for key in ("exp_avg", "exp_avg_sq"):
            if key in moments:
                tensors[f"{i}.{key}"] = moments[key]
    target = path.with_suffix(".safetensors")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(".partial")
    counters = {"step": step, "losses": list(losses), "tokens": tokens}
    save_file(tensors, scratch, metadata={"identity": identity, "counters": json.dumps(counters)})
    scratch.rename(target)


def restore_state(
    path: Path,
    identity: str,
    weights: Sequence[torch.nn.Parameter],
    optimiser: torch.optim.Optimizer,
) -> tuple[int, list[float], int]:
    """Load a saved state into the weights and the optimiser; gives (step, losses, tokens), zeros if there is none.

    Raises:
        RunError: the state was written by a run with other data or settings.
    """
    target = path.with_suffix(".safetensors")
    if not target.is_file():
        return 0, [], 0
    with safe_open(target, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("identity") != identity:
            raise RunError(f"{target} belongs to a run with other data or settings; delete it to start again.")
        counters = json.loads(metadata["counters"])
        for i, weight in enumerate(weights):
            at = weight.device
            weight.data.copy_(file.get_tensor(f"{i}.weight"))
            if f"{i}.exp_avg" in file.keys():  # noqa: SIM118 - safe_open is no mapping
                optimiser.state[weight] = {
                    "step": torch.tensor(float(counters["step"]), device=at),
                    "exp_avg": file.get_tensor(f"{i}.exp_avg").to(at),
                    "exp_avg_sq": file.get_tensor(f"{i}.exp_avg_sq").to(at),
                }
    return counters["step"], counters["losses"], counters["tokens"]
