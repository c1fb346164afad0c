"""Conformance checks for codecs and layouts, built-in or third-party, in the manner of scikit-learn's estimator checks.

Each failure is an AssertionError whose message is a sentence about the codec or layout.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from deltakeeper.codecs import Codec, Inputs, parse_codec, spell
from deltakeeper.errors import LayoutError
from deltakeeper.layouts import LAYOUTS, Layout, TensorSpec

SHAPES = ((1, 1), (1, 70), (70, 1), (3, 35), (35, 33), (64, 64))
STDS = (1e-8, 1e-6, 1e-4, 1e-2, 1e30)
NAME = "model.layers.0.self_attn.q_proj.weight"
_INPUT_SLACK = 0.05  # a method that goes column by column is greedy
_SLACK = 0.02  # of the relative error: a randomised method may lose this much between steps of a ladder


def check_codec(
    codec: Codec,
    *,
    ladder: Sequence[Codec] = (),
    shapes: Sequence[tuple[int, int]] = SHAPES,
    seed_matters: bool | None = None,
    inputs_help: bool = True,
) -> None:
    """Check that a codec keeps the contract of `Codec`.

    Args:
        codec: the codec with its settings.
        ladder: codecs in order of growing byte budget; sizes must not fall and errors must not rise along them.
        shapes: matrices that must work.
        seed_matters: whether another seed must give other bytes; by default iff the codec has a `seed`.
        inputs_help: whether a codec that uses the inputs of a layer must not do worse on them than without them.

    Raises:
        AssertionError: with a sentence that says what is broken.
    """
    for shape in shapes:
        _check_one_shape(codec, shape)
    _check_random_numbers(codec)
    _check_scales(codec)
    _check_seed(codec, seed_matters)
    if codec.uses_inputs:
        _check_inputs(codec, inputs_help)
    _check_ladder(ladder)
    _require(parse_codec(spell(codec)) == codec, codec, "does not survive its own spelling")


def check_layout(term: Layout) -> None:
    """Check that a packed term keeps the contract of `Layout`: payload, settings, refusals, dense form and product.

    Raises:
        AssertionError: with a sentence that says what is broken.
    """
    cls, tensors, settings = type(term), term.tensors(), term.settings()
    _require(LAYOUTS.get(term.name) is cls, term, "is not registered under its name")
    _require(
        all(t.is_contiguous() and t.device.type == "cpu" for t in tensors.values()),
        term,
        "gives a payload tensor that is not contiguous on the CPU",
    )
    specs = {suffix: TensorSpec(t.dtype, tuple(t.shape)) for suffix, t in tensors.items()}
    _require(cls.expect(term.shape, settings) == specs, term, "expects another payload than it gives")
    _require(json.loads(json.dumps(settings)) == settings, term, "has settings that JSON changes")

    stored = save(tensors)
    header = 8 + int.from_bytes(stored[:8], "little")
    _require(len(stored) - header == term.nbytes, term, "reports another size than it takes on disk")
    again = cls.from_tensors(term.shape, json.loads(json.dumps(settings)), load(stored))
    dense = term.to_dense()
    _require(_same_bits(again.to_dense(), dense), term, "decodes differently after safetensors")
    _require(again.settings() == settings, term, "changes its settings when read back")

    _require(tuple(dense.shape) == tuple(term.shape), term, "becomes dense in another shape")
    _require(term.replaces or dense.dtype == torch.float32, term, "becomes dense in another dtype than float32")
    kept = dense.clone()
    dense.fill_(7)
    _require(_same_bits(term.to_dense(), kept), term, "hands out its own memory as the dense form")
    _require(_bytes([term]) == _bytes([again]), term, "is changed by becoming dense")
    _check_product(term, kept)
    _check_continuous(term, kept)
    _check_refusals(term)


def _check_continuous(term: Layout, dense: torch.Tensor) -> None:
    """What may be trained decodes as it is stored, takes gradients, and can be packed again."""
    values = {suffix: value.float().clone().requires_grad_() for suffix, value in term.continuous().items()}
    if not values or not dense.numel():
        return
    trained = term.dense_from(values)
    found, stored = trained.detach(), dense.float()
    if term.exact:
        same = torch.equal(found, stored)
    else:
        same = torch.allclose(found, stored, rtol=1e-5, atol=float(stored.abs().max()) * 1e-5)
    _require(same, term, "decodes its continuous values to something else than it stores")
    weights = gaussian(tuple(found.shape), 1.0)
    torch.autograd.backward((trained * weights).sum())
    for suffix, value in values.items():
        grad = value.grad
        flows = grad is not None and grad.shape == value.shape
        _require(flows, term, "gives no gradient to its continuous values")
        assert grad is not None
        # Decoding is linear in each of them, so the difference quotient is the slope whatever the distance.
        step = gaussian(tuple(value.shape), 0.25, seed=1) * value.detach().abs()
        with torch.no_grad():
            ends = [term.dense_from(values | {suffix: value + sign * step}).double() * weights for sign in (0.5, -0.5)]
        slope, rounding = float((grad.double() * step).sum()), 1e-5 * float(sum(end.abs().sum() for end in ends))
        right = abs(slope - float((ends[0] - ends[1]).sum())) <= rounding
        _require(right, term, "gives wrong gradients to its continuous values")
    again = term.replace_continuous({suffix: value.detach() for suffix, value in values.items()})
    _require(_same_bits(again.to_dense(), dense), term, "changes when its own continuous values are put back")


def _check_one_shape(codec: Codec, shape: tuple[int, int]) -> None:
    where = f" on shape {shape}"
    delta = gaussian(shape, 1e-3)
    given = delta.clone()
    terms = codec.encode(delta, name=NAME)
    _require(_same_bits(delta, given), codec, "modifies the delta" + where)
    for term in terms:
        _require(tuple(term.shape) == shape, codec, "changes the shape" + where)
        _require(not term.replaces, codec, "stores a value although none was given" + where)
        _require(bool(torch.isfinite(term.to_dense()).all()), codec, "decodes to NaN or infinity" + where)
        check_layout(term)
    _require(_bytes(terms) == _bytes(codec.encode(delta, name=NAME)), codec, "is not deterministic" + where)
    strided = gaussian((shape[1], shape[0]), 1e-3).T
    copied = strided.clone(memory_format=torch.contiguous_format)
    _require(
        _bytes(codec.encode(strided, name=NAME)) == _bytes(codec.encode(copied, name=NAME)),
        codec,
        "reads a transposed view differently from its copy" + where,
    )
    nothing = codec.encode(torch.zeros(shape), name=NAME)
    for term in nothing:
        check_layout(term)
    _require(not _decode(nothing, shape).any(), codec, "does not decode an all-zero delta to zero" + where)
    _check_tuned(codec, delta, where)


def _check_tuned(codec: Codec, delta: torch.Tensor, where: str) -> None:
    tuned = (gaussian(tuple(delta.shape), 0.02, 1) + delta).to(torch.bfloat16)
    given = tuned.clone()
    terms = codec.encode(delta, name=NAME, tuned=tuned)
    _require(_same_bits(tuned, given), codec, "modifies the fine-tuned tensor" + where)
    for term in terms:
        check_layout(term)
        exact = not term.replaces or (len(terms) == 1 and _same_bits(term.to_dense(), tuned))
        _require(exact, codec, "stores a value that is not the fine-tuned tensor alone" + where)


def _check_random_numbers(codec: Codec) -> None:
    delta = gaussian((64, 64), 1e-3)
    before = _random_states()
    found = _bytes(codec.encode(delta, name=NAME))
    _require(_random_states() == before, codec, "draws from a global random number generator")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)
        again = _bytes(codec.encode(delta, name=NAME))
    _require(again == found, codec, "depends on the global random seed")


def _check_seed(codec: Codec, seed_matters: bool | None) -> None:
    seed = getattr(codec, "seed", None)
    if seed_matters is None:
        seed_matters = isinstance(seed, int)
    delta = gaussian((64, 64), 1e-3)
    if not seed_matters:
        return
    _require(isinstance(seed, int), codec, "has no setting 'seed'")
    other: Any = dataclasses.replace(codec, **{"seed": (seed or 0) + 1})
    found = _bytes(codec.encode(delta, name=NAME))
    _require(_bytes(other.encode(delta, name=NAME)) != found, codec, "gives the same bytes for another seed")
    _require(_bytes(codec.encode(delta, name="b")) != found, codec, "gives the same bytes for another tensor name")


def _check_inputs(codec: Codec, must_help: bool) -> None:
    delta = gaussian((48, 64), 1e-3)
    for tokens, what in ((512, "strongly correlated"), (3, "few"), (0, "all-zero")):
        x = gaussian((tokens, 64), 1.0, 3) * torch.linspace(2, 0.02, 64) @ gaussian((64, 64), 1.0, 4)
        gram = x.T @ x / max(1, tokens)
        inputs = Inputs(gram.clone(), x.sum(0) / max(1, tokens), tokens)
        terms = codec.encode(delta, name=NAME, inputs=inputs)
        again = codec.encode(delta, name=NAME, inputs=inputs)
        _require(_same_bits(inputs.gram, gram), codec, f"modifies the gram of {what} inputs")
        found = _decode(terms, (48, 64))
        _require(bool(torch.isfinite(found).all()), codec, f"decodes to NaN or infinity on {what} inputs")
        _require(_bytes(again) == _bytes(terms), codec, f"is not deterministic on {what} inputs")
        for term in terms:
            check_layout(term)
        nothing = codec.encode(torch.zeros(48, 64), name=NAME, inputs=inputs)
        _require(not _decode(nothing, (48, 64)).any(), codec, f"does not keep an all-zero delta on {what} inputs")
        free = _decode(codec.encode(delta, name=NAME), (48, 64))
        error, usual = (float((x @ (term - delta).T).norm()) for term in (found, free))
        _require(
            not must_help or error <= (1 + _INPUT_SLACK) * usual,
            codec,
            f"makes an error of {error:.3g} in the outputs on {what} inputs but {usual:.3g} without knowing them",
        )


def _check_scales(codec: Codec) -> None:
    unit = gaussian((64, 48), 1.0)
    usual = relative_error(codec, unit * 1e-3)
    for std in STDS:
        error = relative_error(codec, unit * std)
        _require(
            abs(error - usual) <= 0.01 * (1 + usual),
            codec,
            f"has a relative error of {error:.3f} on deltas of standard deviation {std:g} but {usual:.3f} at 0.001",
        )


def _check_ladder(ladder: Sequence[Codec]) -> None:
    for seed in (0, 1):
        delta = gaussian((64, 96), 1e-3, seed)
        delta += gaussian((64, 2), 1e-3, seed) @ gaussian((2, 96), 2.0, seed + 9)
        steps = [(c, sum(t.nbytes for t in c.encode(delta, name=NAME)), relative_error(c, delta)) for c in ladder]
        for (_, size, error), (codec, next_size, next_error) in pairwise(steps):
            _require(next_size >= size, codec, f"takes {next_size} bytes but the coarser step before it {size}")
            _require(
                next_error <= error + _SLACK * error,
                codec,
                f"has a relative error of {next_error:.4f} but the coarser step before it {error:.4f}",
            )


def _check_product(term: Layout, dense: torch.Tensor) -> None:
    if term.replaces or dense.dim() != 2:
        return
    x = gaussian((3, term.shape[1]), 1.0, 5)
    wanted = x.double() @ dense.double().T
    bound = 1e-5 * float(x.double().norm()) * float(dense.double().norm())
    _require(bool(((term.matmul(x) - wanted).abs() <= bound).all()), term, "multiplies differently from its dense form")


def _check_refusals(term: Layout) -> None:
    cls, tensors, settings = type(term), term.tensors(), term.settings()
    for what, bad in _wrong_settings(settings):
        _refuses(term, what, lambda bad=bad: cls.expect(term.shape, bad))
    for shape in ((2**62, 2**62), (-1, 3), (True, 3)):
        _refuses(term, f"shape {shape}", lambda shape=shape: cls.expect(shape, settings))
    damaged = {f"no '{suffix}'": {k: v for k, v in tensors.items() if k != suffix} for suffix in tensors}
    damaged["an unexpected tensor"] = {**tensors, "delta_more": torch.zeros(1)}
    for suffix, tensor in tensors.items():
        damaged[f"'{suffix}' as complex numbers"] = {**tensors, suffix: tensor.to(torch.complex64)}
        damaged[f"'{suffix}' in another shape"] = {**tensors, suffix: tensor[None]}
        if tensor.is_floating_point() and tensor.numel():
            damaged[f"NaN in '{suffix}'"] = {**tensors, suffix: torch.full_like(tensor, float("nan"))}
    for what, payload in damaged.items():
        _refuses(term, what, lambda payload=payload: cls.from_tensors(term.shape, settings, payload))


def _wrong_settings(settings: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings with one fault each, and what it is; settings inside settings take their turn too."""
    for key, value in settings.items():
        wrong: list[Any] = [None, [], {}]
        wrong += [7] if isinstance(value, str) else ["1", "false", "nan"]
        wrong += [] if isinstance(value, bool) else [True]
        wrong += [-1, 2**70, 0.5] if type(value) is int else []
        wrong += [float("nan"), float("inf")] if isinstance(value, float) else []
        wrong += [bad for _, bad in _wrong_settings(value)] if isinstance(value, dict) else []
        without = {name: kept for name, kept in settings.items() if name != key}
        for bad in [without, *({**settings, key: one} for one in wrong)]:
            yield f"setting '{key}' as in {bad}", bad


def gaussian(shape: tuple[int, ...], std: float, seed: int = 0) -> torch.Tensor:
    """Seeded float32 Gaussian numbers, drawn without touching any global generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def relative_error(codec: Codec, delta: torch.Tensor) -> float:
    """`‖decoded - delta‖ / ‖delta‖` in float64."""
    exact = delta.double()
    found = _decode(codec.encode(delta, name=NAME), tuple(delta.shape))
    return float((found.double() - exact).norm() / exact.norm())


def _decode(terms: Sequence[Layout], shape: tuple[int, ...]) -> torch.Tensor:
    total = torch.zeros(shape)
    for term in terms:
        total += term.to_dense()
    return total


def _bytes(terms: Sequence[Layout]) -> list[tuple[str, str, bytes]]:
    return [(term.name, json.dumps(term.settings(), sort_keys=True), save(term.tensors())) for term in terms]


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    same_kind = left.dtype == right.dtype and left.shape == right.shape
    return same_kind and save({"t": left.contiguous()}) == save({"t": right.contiguous()})


def _random_states() -> tuple[bytes, str, str]:
    return bytes(torch.get_rng_state().numpy()), repr(np.random.get_state()), repr(random.getstate())


def _refuses(term: Layout, what: str, attempt: Any) -> None:
    try:
        attempt()
    except LayoutError:
        return
    raise AssertionError(f"layout '{term.name}' accepts {what} but must refuse it with a LayoutError.")


def _require(holds: bool, thing: Codec | Layout, fault: str) -> None:
    if not holds:
        kind, about = ("codec", thing) if isinstance(thing, Codec) else ("layout", thing.settings())
        raise AssertionError(f"{kind} '{thing.name}' {fault} ({about}).")
