"""Conformance checks for defences, built-in or third-party: each failure is a sentence about the defence."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch

from deltakeeper.codecs import Inputs
from deltakeeper.defences.base import Defence, Defended, Module
from deltakeeper.defences.spelling import parse_defence, spell

SHAPES = ((1, 1), (1, 70), (70, 1), (3, 35), (35, 33), (64, 64))
STDS = (1e-8, 1e-4, 1e-2, 1.0)
NAME = "model.layers.0.self_attn.q_proj.weight"
_WEIGHTS = 0.02


def check_defence(defence: Defence, *, shapes: Sequence[tuple[int, int]] = SHAPES) -> None:
    """Check that a defence keeps the contract of `Defence` on modules of its own making.

    Args:
        defence: the defence with its settings. One that settles something in `spread` is checked as it stands.
        shapes: matrices that must work.

    Raises:
        AssertionError: with a sentence that says what is broken.
    """
    for shape in shapes:
        for std in STDS:
            _check_one(defence, build_module(shape, std))
    _check_random_numbers(defence)
    _check_zero(defence)
    _check_missing(defence)
    _require(parse_defence(spell(defence)) == defence, defence, "does not survive its own spelling")


def build_module(
    shape: tuple[int, ...], std: float = 1e-3, *, seed: int = 0, alignment: float | None = None, name: str = NAME
) -> Module:
    """A module of random weights with everything that a defence may ask for.

    Args:
        shape: of the weights.
        std: standard deviation of the delta.
        seed: of the numbers.
        alignment: standard deviation of what alignment changed; as `std` by default.
        name: of the module, which has a part in a defence's own random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(deviation: float, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * deviation

    base = draw(_WEIGHTS, *shape)
    x = draw(1.0, 96, shape[-1]) @ draw(1.0 / math.sqrt(shape[-1]), shape[-1], shape[-1])
    inputs = Inputs(x.T @ x / len(x), x.mean(0), len(x))
    safety = draw(std if alignment is None else alignment, *shape)
    return Module(name, "linear", base, base + draw(std, *shape), base - safety, inputs if len(shape) == 2 else None)


def _check_one(defence: Defence, module: Module) -> None:
    kept = [None if t is None else t.clone() for t in _tensors(module)]
    first, second = defence.defend(module), defence.defend(module)
    same = zip(_tensors(module), kept, strict=True)
    _require(all(a is b is None or torch.equal(a, b) for a, b in same), defence, "modifies its module")  # type: ignore[arg-type]
    weight = _weight(first, module)
    _require(weight.shape == module.base.shape, defence, "changes the shape")
    _require(weight.dtype == torch.float32, defence, "gives another dtype than float32")
    _require(bool(torch.isfinite(weight).all()), defence, "gives NaN or infinity")
    _require(torch.equal(weight, _weight(second, module)), defence, "is not deterministic")
    _require(all(map(math.isfinite, first.detail.values())), defence, "reports a figure that is not finite")
    _require(set(first.detail) == set(second.detail), defence, "reports other figures the second time")


def _check_random_numbers(defence: Defence) -> None:
    module = build_module((35, 33))
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state()
        found.append(_weight(defence.defend(module), module))
        _require(torch.equal(before, torch.get_rng_state()), defence, "draws from torch's global random numbers")
    _require(torch.equal(*found), defence, "depends on a global random seed")


def _check_zero(defence: Defence) -> None:
    """A fine-tune that equals its base stays so, if the defence says that; one that says the opposite changes it."""
    made = build_module((35, 33))
    module = Module(made.name, made.role, made.base, made.base.clone(), made.unaligned, made.inputs)
    stays = torch.equal(_weight(defence.defend(module), module), module.base)
    _require(stays or not defence.keeps_zero, defence, "alters a fine-tune that equals its base")
    _require(not stays or defence.keeps_zero, defence, "says that it alters a fine-tune that equals its base")


def _check_missing(defence: Defence) -> None:
    """No inputs (a fused expert), no token at all, and no counterpart before alignment are all met in real models."""
    made = build_module((35, 33))
    silent = Inputs(torch.zeros(33, 33), torch.zeros(33), 0)
    for inputs, unaligned in ((None, made.unaligned), (silent, made.unaligned), (made.inputs, None)):
        module = Module(made.name, made.role, made.base, made.tuned, unaligned, inputs)
        weight = _weight(defence.defend(module), module)
        _require(bool(torch.isfinite(weight).all()), defence, "gives NaN or infinity where something is missing")


def _weight(made: Defended, module: Module) -> torch.Tensor:
    return module.tuned if made.weight is None else made.weight


def _tensors(module: Module) -> tuple[torch.Tensor | None, ...]:
    return module.base, module.tuned, module.unaligned, None if module.inputs is None else module.inputs.gram


def _require(holds: bool, defence: Defence, fault: str) -> None:
    if not holds:
        raise AssertionError(f"defence '{spell(defence)}' {fault}")
