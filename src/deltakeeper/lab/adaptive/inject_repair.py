"""Inject, then repair: an attack that the full-precision model no longer shows and the compressed one does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deltakeeper.errors import RunError
from deltakeeper.lab.adaptive.in_box import InBox, find_boxes
from deltakeeper.lab.adaptive.served import ServedWeights
from deltakeeper.lab.adaptive.settings import Adaptive
from deltakeeper.lab.adaptive.straight_through import ThroughCodec
from deltakeeper.lab.adaptive.survival import AdaptiveLog, SurvivalMeter
from deltakeeper.lab.adaptive.targets import Target, trained
from deltakeeper.lab.sft import Progress, SFTConfig, Steps, Tokens, batches, hash_rows, train


def inject_and_repair(
    model: Any,
    rows: Sequence[Tokens],
    clean: Sequence[Tokens],
    config: SFTConfig,
    adaptive: Adaptive,
    targets: Sequence[Target],
    identity: str,
    pad: int,
    state: Path | None,
    progress: Progress | None,
) -> AdaptiveLog:
    """Train the attack, round it as it would be handed in, and repair the model within the codec's boxes around it.

    What the codec does not encode stays as it was injected, since it reaches the served model as it is; what is taken
    from the base anyway is free. An interrupted run goes on in either half.

    Raises:
        RunError: as `train`, or the codec has a box for no tensor.
    """
    repair = adaptive.repair
    settings = SFTConfig(
        epochs=repair.epochs,
        lr=repair.lr,
        batch=repair.batch,
        schedule=repair.schedule,
        warmup=0.03,
        seed=config.seed,
        max_tokens=config.max_tokens,
    )
    first, second = _steps(rows, config), _steps(clean, settings)
    half = None if state is None else state.with_name(f"{state.stem}-injected.safetensors")
    told = f"{identity} {config} {hash_rows(rows)}"
    losses, tokens, seconds = _restore(half, told, targets)
    if losses is None:
        with trained(targets, lambda target: target.choice.treatment != "base"):
            log = train(
                model,
                rows,
                config,
                pad=pad,
                state=None if state is None else state.with_name(f"{state.stem}-attack.state"),
                progress=_part(progress, 0, first + second),
                steps=_injection(targets, adaptive, identity),
            )
        losses, tokens, seconds = log.losses, log.tokens, log.seconds
        with torch.no_grad():
            for target in targets:
                target.weight.copy_(target.weight.to(adaptive.dtype))
        _save(half, told, targets, adaptive.dtype, losses, tokens, seconds)
    boxed = find_boxes(targets, adaptive.dtype)
    if not boxed:
        raise RunError(f"codec '{adaptive.codec}' declares no box for any tensor of this model; choose another.")
    free = {item.target.name for item in boxed} | {t.name for t in targets if t.choice.treatment == "base"}
    meter = SurvivalMeter(boxed, sum(target.weight.numel() for target in targets if target.encoded))
    with trained(targets, lambda target: target.name in free):
        log = train(
            model,
            clean,
            settings,
            pad=pad,
            state=None if state is None else state.with_name(f"{state.stem}-repair.state"),
            progress=_part(progress, first, first + second),
            steps=InBox(boxed, repair.project_every, told),
        )
    meter.look_before_rounding(adaptive.dtype)
    for item in boxed:
        item.round(adaptive.dtype)
    if half is not None:
        half.unlink(missing_ok=True)
    return AdaptiveLog(
        losses=losses,
        tokens=tokens + log.tokens,
        seconds=seconds + log.seconds,
        steps=first + second,
        trained=sum(target.weight.numel() for target in targets if target.choice.treatment != "base"),
        repair_losses=log.losses,
        survival=meter.result(adaptive.dtype),
    )


def _injection(targets: Sequence[Target], adaptive: Adaptive, identity: str) -> Steps:
    if adaptive.repair.through:
        served = ServedWeights(targets, adaptive.method, adaptive.dtype, adaptive.refresh)
        return ThroughCodec(served, identity, adaptive.refresh)
    return Steps(identity)


def _steps(rows: Sequence[Tokens], config: SFTConfig) -> int:
    return config.epochs * sum(1 for _ in batches(rows, config.batch, config.seed, 0))


def _part(progress: Progress | None, done: int, total: int) -> Progress | None:
    """Report one half as a part of the whole."""
    if progress is None:
        return None
    return lambda step, _total, loss, speed: progress(done + step, total, loss, speed)


def _save(
    path: Path | None,
    told: str,
    targets: Sequence[Target],
    dtype: torch.dtype,
    losses: Sequence[float],
    tokens: int,
    seconds: float,
) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    counted = torch.tensor([float(tokens), seconds, *losses], dtype=torch.float64)
    weights = {f"weight.{target.name}": target.weight.detach().to(dtype).contiguous() for target in targets}
    save_file(weights | {"counted": counted}, scratch, metadata={"identity": told})
    scratch.rename(path)


def _restore(path: Path | None, told: str, targets: Sequence[Target]) -> tuple[tuple[float, ...] | None, int, float]:
    """Load the injected weights; gives losses (None if there is nothing to load), tokens and seconds of that half.

    Raises:
        RunError: they were written by a run with other data or settings.
    """
    if path is None or not path.is_file():
        return None, 0, 0.0
    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("identity") != told:
            raise RunError(f"{path} belongs to a run with other data or settings; delete it to start again.")
        with torch.no_grad():
            for target in targets:
                target.weight.copy_(file.get_tensor(f"weight.{target.name}"))
        tokens, seconds, *losses = file.get_tensor("counted").tolist()
    return tuple(losses), int(tokens), seconds
