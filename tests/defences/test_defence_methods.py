"""Every method against a second implementation in float64, loops and all, and against cases worked out by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.codecs import Inputs, parse_codec
from deltakeeper.defences import Module, parse_defence
from deltakeeper.defences.conformance import build_module
from deltakeeper.layouts.philox import philox, philox_key

SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 24))
SEEDS = st.integers(0, 2**32 - 1)


def weight(text, module):
    made = parse_defence(text).defend(module)
    return (module.tuned if made.weight is None else made.weight), made.detail


def matrices(module):
    return module.base.double().numpy(), module.tuned.double().numpy(), module.unaligned.double().numpy()


def close(found, expected, scale):
    assert np.allclose(found.double().numpy(), expected, rtol=1e-4, atol=1e-5 * max(scale, 1e-30))


def module_of(base, tuned, unaligned=None, gram=None):
    inputs = None if gram is None else Inputs(torch.tensor(gram), torch.zeros(len(gram)), 10)
    before = None if unaligned is None else torch.tensor(unaligned)
    return Module("w", "linear", torch.tensor(base), torch.tensor(tuned), before, inputs)


# Interpolation and norms


@given(SHAPES, SEEDS, st.floats(0, 16))
@settings(max_examples=30, deadline=None)
def test_interpolation_steps_from_the_base(shape, seed, factor):
    module = build_module(shape, 1e-2, seed=seed)
    base, tuned, _ = matrices(module)
    found, _ = weight(f"interpolation:factor={factor!r}", module)
    close(found, base + factor * (tuned - base), 1.0)


def test_interpolation_ends_exactly():
    module = build_module((9, 7))
    assert torch.equal(weight("interpolation:factor=0", module)[0], module.base)
    assert torch.equal(weight("interpolation:factor=1", module)[0], module.tuned)


@given(SHAPES, SEEDS, st.sampled_from(["bitdelta", "magnitude:keep=0.3", "svd:rank=1", "dare:p=0.5", "rtn:bits=3"]))
@settings(max_examples=30, deadline=None)
def test_the_norm_is_that_of_the_codec(shape, seed, codec):
    module = build_module(shape, 1e-2, seed=seed)
    decoded = sum(t.to_dense().double() for t in parse_codec(codec).encode(module.delta, name=module.name))
    found, detail = weight(f"norm_matched:{codec}", module)
    change = found.double() - module.base.double()
    length = float(torch.linalg.vector_norm(decoded))
    assert float(torch.linalg.vector_norm(change)) == pytest.approx(length, rel=1e-4, abs=1e-7)
    assert detail["factor"] == pytest.approx(length / float(torch.linalg.vector_norm(module.delta.double())), rel=1e-5)
    close(found, (module.base.double() + detail["factor"] * module.delta.double()).numpy(), 1.0)


def test_the_norm_of_a_codec_without_loss_is_the_delta_s_own():
    module = build_module((4, 4))
    found, detail = weight("norm_matched:dense", module)
    assert detail == {"factor": 1.0}
    assert torch.allclose(found, module.tuned)


# SafeLoRA


def safelora(module, threshold):
    """`V Vᵀ / ‖V‖` times the delta, as it is written."""
    base, tuned, unaligned = matrices(module)
    v, delta = base - unaligned, tuned - base
    projected = v @ v.T / np.linalg.norm(v) @ delta
    cosine = float(np.sum(projected * delta) / np.linalg.norm(projected) / np.linalg.norm(delta))
    return (base + projected if cosine <= threshold else tuned), cosine


@given(SHAPES, SEEDS, st.sampled_from([1e-3, 0.3]))
@settings(max_examples=40, deadline=None)
def test_safelora_against_the_formula(shape, seed, alignment):
    module = build_module(shape, 1e-2, seed=seed, alignment=alignment)
    expected, cosine = safelora(module, math.inf)
    found, detail = weight("safelora:threshold=1", module)
    assert detail["cosine"] == pytest.approx(cosine, abs=1e-3)
    close(found, expected, 1.0)
    above = cosine + 0.01 if cosine < 0.98 else 1.0
    below = min(cosine, 0.99) - 0.01
    assert not torch.equal(weight(f"safelora:threshold={above!r}", module)[0], module.tuned)
    assert torch.equal(weight(f"safelora:threshold={max(below, -1)!r}", module)[0], module.tuned)


def test_safelora_by_hand():
    """Alignment moved the first output alone, by 2: P = diag(4, 0) / 2, so the delta (3, 4) becomes (6, 0)."""
    module = module_of([[1.0], [1.0]], [[4.0], [5.0]], [[-1.0], [1.0]])
    found, detail = weight("safelora:threshold=0.7", module)
    assert found.tolist() == [[7.0], [1.0]]
    assert detail == {"cosine": pytest.approx(0.6), "projected": 1.0}
    found, detail = weight("safelora:threshold=0.5", module)
    assert torch.equal(found, module.tuned)
    assert detail["projected"] == 0


def test_safelora_where_a_cosine_has_no_value():
    same = module_of([[1.0]], [[2.0]], [[1.0]])  # alignment changed nothing: there is nothing to project on
    assert torch.equal(weight("safelora:threshold=1", same)[0], same.tuned)
    apart = module_of([[1.0], [1.0]], [[1.0], [2.0]], [[0.0], [1.0]])  # what is projected leaves nothing
    found, detail = weight("safelora:threshold=0", apart)
    assert torch.equal(found, apart.base)
    assert detail["cosine"] == 0


# RESTA


def thinned(values, name, drop, seed):
    """DARE with one random word an entry, an entry at a time."""
    key, found = philox_key(seed, name), np.zeros(values.shape)
    words = philox(key, 0, values.size // 4 + 1).reshape(-1)
    for i, value in enumerate(values.flat):
        if int(words[i]) < int((1 - drop) * 2**32):
            found.flat[i] = value / (1 - drop)
    return found


@given(SHAPES, SEEDS, st.floats(-4, 4), st.sampled_from([0.0, 0.3, 0.9]), st.sampled_from(["delta", "vector"]))
@settings(max_examples=40, deadline=None)
def test_resta_against_the_formula(shape, seed, scale, drop, on):
    module = build_module(shape, 1e-2, seed=seed)
    base, tuned, unaligned = matrices(module)
    delta, vector = tuned - base, base - unaligned
    if on == "delta":
        delta = thinned(delta, module.name, drop, seed)
    else:
        vector = thinned(vector, module.name, drop, seed)
    found, _ = weight(f"resta:scale={scale!r},drop={drop},on={on},seed={seed}", module)
    close(found, base + delta + scale * vector, 1.0)


def test_resta_adds_to_vectors_and_leaves_what_it_does_not_know():
    module = build_module((12,))
    found, _ = weight("resta:scale=2", module)
    close(found, (3 * module.base + module.delta - 2 * module.unaligned).double().numpy(), 1.0)
    alone = dataclasses.replace(module, unaligned=None)
    assert parse_defence("resta").defend(alone).weight is None
    assert parse_defence("resta:scale=0").defend(module).weight is None


# Antidote


def antidote(module, share, per, of):
    base, tuned, _ = matrices(module)
    target = tuned - base if of == "delta" else tuned
    score = np.abs(target) * np.sqrt(np.diag(module.inputs.gram.double().numpy()))
    pruned = np.zeros(score.shape, dtype=bool)
    groups = [[(i, j) for j in range(score.shape[1])] for i in range(score.shape[0])]
    for group in groups if per == "row" else [[place for row in groups for place in row]]:
        count = math.ceil(round(share * len(group), 6))
        for place in sorted(group, key=lambda p: (-score[p], p))[:count]:
            pruned[place] = score[place] > 0
    return np.where(pruned, base if of == "delta" else 0.0, tuned)


@given(SHAPES, SEEDS, st.sampled_from([0.01, 0.1, 0.5, 1.0]), st.sampled_from(["row", "tensor"]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_antidote_against_a_sort(shape, seed, share, per, whole):
    module = build_module(shape, 1e-2, seed=seed)
    of = "weight" if whole else "delta"
    found, detail = weight(f"antidote:share={share},per={per},of={of}", module)
    expected = antidote(module, share, per, of)
    close(found, expected, 1.0)
    assert detail["pruned"] == pytest.approx((expected != module.tuned.double().numpy()).mean(), abs=1e-9)


def test_antidote_by_hand():
    """Norms of the inputs are 1, 10 and 0: the second entry weighs most though it is smallest, the third nothing."""
    gram = [[1.0, 0.0, 0.0], [0.0, 100.0, 0.0], [0.0, 0.0, 0.0]]
    module = module_of([[1.0, 1.0, 1.0]], [[3.0, 2.0, 9.0]], gram=gram)
    assert weight("antidote:share=0.3", module)[0].tolist() == [[3.0, 1.0, 9.0]]
    assert weight("antidote:share=0.6", module)[0].tolist() == [[1.0, 1.0, 9.0]]
    assert weight("antidote:share=1", module)[0].tolist() == [[1.0, 1.0, 9.0]]
    assert weight("antidote:share=0.3,of=weight", module)[0].tolist() == [[3.0, 0.0, 9.0]]
    blind = module_of([[1.0, 1.0, 1.0]], [[3.0, 2.0, 9.0]])
    assert weight("antidote:share=0.3", blind)[0].tolist() == [[3.0, 2.0, 1.0]]


# Safe Delta


def safe_delta(module, s, skip, block, damp=0.01):
    """The authors' loop, one column at a time, with the inverse gram cut down column by column instead of factored."""
    base, tuned, _ = matrices(module)
    gram = module.inputs.gram.double().numpy()
    rows, columns = base.shape
    hessian = gram + damp * np.mean(np.diag(gram)) * np.eye(columns)
    work, done = base.copy(), base.copy()
    inverses = []
    inverse = np.linalg.inv(hessian)
    for _ in range(columns):  # of the gram without the columns before each
        inverses.append(inverse)
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    price = np.array([1 / found[0, 0] for found in inverses])
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        budget = s / 2 * rows / 4096 * np.mean(price[start:stop])
        order = sorted(range(start, stop), key=lambda j: price[j])
        entries = [(i, j) for j in order for i in range(rows)]
        entries = entries[: len(entries) - int(skip * len(entries))]
        spent, admitted = 0.0, set()
        for i, j in entries:
            spent += (tuned[i, j] - work[i, j]) ** 2 * price[j]
            if spent > budget:
                break
            admitted.add((i, j))
        for j in range(start, stop):
            for i in range(rows):
                done[i, j] = tuned[i, j] if (i, j) in admitted else work[i, j]
            found = inverses[j]
            for k in range(j + 1, columns):
                work[:, k] -= (work[:, j] - done[:, j]) * found[0, k - j] / found[0, 0]
    return done


@given(SHAPES, SEEDS, st.sampled_from([0.0, 0.03, 0.2, 1.0, 1e6]), st.sampled_from([0.0, 0.15]), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_safe_delta_against_the_loop(shape, seed, s, skip, block):
    module = build_module(shape, 0.05, seed=seed)
    found, detail = weight(f"safe_delta:s={s},skip={skip},block={block}", module)
    expected = safe_delta(module, s, skip, block)
    assert 0 <= detail["admitted"] <= 1
    # A sum that meets the budget within rounding may admit one entry more or less in a block.
    if np.abs(found.double().numpy() - expected).max() > 1e-3:
        near = [safe_delta(module, s * f, skip, block) for f in (1 - 1e-4, 1 + 1e-4)]
        assert any(np.abs(found.double().numpy() - other).max() <= 1e-3 for other in near)


def test_safe_delta_by_hand():
    """Uncorrelated inputs of size 1, 4 and 9 (damped by a hair): no entry makes up for another, cheap columns first.

    Prices are the gram's diagonal, mean 14/3; with one row, s/2/4096 of it is the budget. Costs are 1, 4 and 9.
    """
    gram = np.diag([4.0, 1.0, 9.0]).astype(np.float32).tolist()
    module = module_of([[0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0]], gram=gram)

    def at(cost, skip=0.0):
        s = cost / (14 / 3) * 4096 * 2
        return weight(f"safe_delta:s={s!r},skip={skip},damp=0.00000001", module)[0].round(decimals=5).tolist()[0]

    assert at(0.9) == [0, 0, 0]
    assert at(1.1) == [0, 1, 0]
    assert at(5.1) == [1, 1, 0]
    assert at(14.1) == [1, 1, 1]
    assert at(14.1, skip=0.34) == [1, 1, 0]


def test_safe_delta_makes_up_for_what_it_admits():
    """Two inputs that are always equal: the first entry comes in by 1, and the second, too dear to, takes it back."""
    gram = np.full((2, 2), 1.0, dtype=np.float32)
    module = module_of([[0.0, 0.0]], [[1.0, 5.0]], gram=gram.tolist())
    found, detail = weight("safe_delta:s=8,skip=0,damp=0.0001", module)
    assert found[0, 0] == 1
    assert float(found[0, 1]) == pytest.approx(-1 / 1.0001, rel=1e-5)
    assert detail["admitted"] == 0.5


@given(SHAPES, SEEDS, st.integers(1, 30))
@settings(max_examples=20, deadline=None)
def test_safe_delta_between_base_and_fine_tune(shape, seed, block):
    module = build_module(shape, 1e-2, seed=seed)
    none, detail = weight(f"safe_delta:s=0,block={block}", module)
    assert torch.equal(none, module.base)
    assert detail["admitted"] == 0
    everything, detail = weight(f"safe_delta:s=1e9,skip=0,block={block}", module)
    assert torch.equal(everything, module.tuned)
    assert detail["admitted"] == 1


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_compensation_lowers_the_loss_on_safe_rows(seed):
    """`Σ ‖x (W - W_base)ᵀ‖²` of the result is at most that of the admitted entries without compensation."""
    module = build_module((12, 20), 1e-2, seed=seed)
    found, _ = weight("safe_delta:s=0.5,damp=0.0001", module)
    bare = torch.where(found == module.tuned, module.tuned, module.base)

    def loss(matrix):
        change = (matrix - module.base).double()
        return float(torch.trace(change @ module.inputs.gram.double() @ change.T))

    assert loss(found) <= loss(bare) * (1 + 1e-3) + 1e-12
