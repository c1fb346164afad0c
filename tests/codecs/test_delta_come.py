import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.codecs import DeltaCome, Inputs, parse_codec
from deltakeeper.errors import CodecError

PAPER = {"refine": False, "search": False, "damp": 0.01}


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decaying(out, columns, seed=0):
    """A delta such as fine-tuning makes: a few strong directions and a broad floor."""
    return gaussian(out, columns, seed=seed) + 8 * gaussian(out, 3, seed=seed + 1) @ gaussian(3, columns, seed=seed + 2)


def inputs_of(columns, tokens=400, seed=0):
    x = gaussian(tokens, columns, seed=seed) @ (torch.eye(columns) + 0.5 * gaussian(columns, columns, seed=99))
    x *= torch.linspace(0.1, 3, columns)
    return Inputs(x.T @ x / tokens, x.mean(0), tokens)


def decode(terms):
    return sum(term.to_dense() for term in terms)


def relative(codec, delta, inputs=None):
    return float((decode(codec.encode(delta, name="w", inputs=inputs)) - delta).norm() / delta.norm())


def weighted(error, inputs):
    return float(((error.double() @ inputs.gram.double()) * error.double()).sum()) ** 0.5


def eleven_bits(number):
    mantissa, exponent = np.frexp(number)
    return np.ldexp(np.round(mantissa * 2048) / 2048, exponent)


def rounded(vector, bits, group):
    """Round a vector to whole numbers times a scale for each group, from its largest entry."""
    found = np.zeros_like(vector)
    for start in range(0, len(vector), group):
        piece = vector[start : start + group]
        scale = eleven_bits(np.abs(piece).max() / (2 ** (bits - 1) - 0.5))
        for i, entry in enumerate(piece):
            found[start + i] = min(max(np.round(entry / scale), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) * scale
    return found


def by_feedback(rows, gram, damp, quantise):
    """GPTQ column by column, with the inverse of the gram of the free columns computed anew each time."""
    damped = gram + damp * np.mean(np.diag(gram)) * np.eye(len(gram))
    work, done = rows.copy(), np.zeros_like(rows)
    for j in range(rows.shape[1]):
        inverse = np.linalg.inv(damped[j:, j:])
        done[:, j] = quantise(work, j)
        work[:, j:] -= np.outer((work[:, j] - done[:, j]) / inverse[0, 0], inverse[0])
    return done


def paper_bands(delta, bands, group, gram=None, damp=0.01):
    """The paper's formulas in float64 loops: bands of the delta's singular vectors, V against x, U against x Vᵀ Σ."""
    scale = float(delta.abs().max())
    u, s, vt = (part.double().numpy() for part in torch.linalg.svd(delta / scale, full_matrices=False))
    total, start = np.zeros(delta.shape), 0
    for bits, count in bands:
        left, right = u[:, start : start + count], s[start : start + count, None] * vt[start : start + count]
        if gram is None:
            v = np.stack([rounded(row, bits, group) for row in right])
            columns = [rounded(column, bits, group) for column in left.T]
        else:
            v = np.zeros_like(right)
            scales = {}

            def neighbour(work, j, bits=bits, scales=scales):
                if j % group == 0:
                    widest = np.abs(work[:, j : j + group]).max(axis=1)
                    scales[j // group] = eleven_bits(widest / (2 ** (bits - 1) - 0.5))
                step = scales[j // group]
                return np.clip(np.round(work[:, j] / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step

            v = by_feedback(right, gram.double().numpy(), damp, neighbour)
            fed = v @ gram.double().numpy() @ v.T
            columns = by_feedback(left, fed, damp, lambda work, j, bits=bits: rounded(work[:, j], bits, group)).T
        total += np.stack(columns, axis=1) @ v * scale
        start += count
    return torch.from_numpy(total).float()


@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("group", [16, 128])
def test_the_papers_formula(weigh, group):
    delta, inputs = decaying(40, 56) * 1e-3, inputs_of(56) if weigh else None
    codec = DeltaCome(rank8=2, rank3=5, rank2=9, group=group, **PAPER)
    found = decode(codec.encode(delta, name="w", inputs=inputs))
    wanted = paper_bands(delta, [(8, 2), (3, 5), (2, 9)], group, inputs.gram if weigh else None)
    assert float((wanted - delta).norm() / delta.norm()) > 0.1
    assert float((found - wanted).norm() / delta.norm()) < 0.01  # one code that rounds the other way is allowed


def refined_band(left_over, scale, bits, count, group):
    """One band of what is left over: V rounded, U refitted to the rounded V, and rounded with feedback."""
    left_over = left_over / scale
    _, s, vt = (part.double().numpy() for part in torch.linalg.svd(left_over, full_matrices=False))
    v = np.stack([rounded(row, bits, group) for row in s[:count, None] * vt[:count]])
    u = left_over.double().numpy() @ np.linalg.pinv(v)
    u = by_feedback(u, v @ v.T, 0.01, lambda work, j: rounded(work[:, j], bits, group))
    return torch.from_numpy(u @ v * scale).float()


def test_refined_bands_encode_what_is_left_over():
    left_over = decaying(40, 56) * 1e-3
    scale = float(left_over.abs().max())
    codec = DeltaCome(rank8=2, rank3=5, rank2=9, group=16, search=False, damp=0.01)
    for term, (bits, count) in zip(codec.encode(left_over, name="w"), [(8, 2), (3, 5), (2, 9)], strict=True):
        found, wanted = term.to_dense(), refined_band(left_over, scale, bits, count, 16)
        assert float((found - wanted).norm() / wanted.norm()) < 0.02  # one code that rounds the other way is allowed
        left_over = left_over - found


def test_refinement_lowers_the_error():
    delta = decaying(60, 80)
    for search in (False, True):
        refined = relative(DeltaCome(bpw=4, search=search), delta)
        assert refined < 0.7 * relative(DeltaCome(bpw=4, search=search, refine=False), delta)


def test_searched_scales_lower_the_error():
    delta = decaying(60, 80)
    for refine in (False, True):
        searched = relative(DeltaCome(bpw=2, refine=refine), delta)
        assert searched < 0.95 * relative(DeltaCome(bpw=2, refine=refine, search=False), delta)


@pytest.mark.parametrize("refine", [False, True])
def test_known_inputs_lower_the_error_they_see(refine):
    delta, seen, other = decaying(60, 48), inputs_of(48), inputs_of(48, seed=7)
    codec = DeltaCome(bpw=2, refine=refine, damp=0.01)
    blind = decode(codec.encode(delta, name="w")) - delta
    weighed = decode(codec.encode(delta, name="w", inputs=seen)) - delta
    share = 0.85 if refine else 0.95
    assert weighted(weighed, seen) < share * weighted(blind, seen)
    assert weighted(weighed, other) < share * weighted(blind, other)


def test_inputs_are_optional_and_may_be_turned_off():
    delta, inputs = decaying(60, 48), inputs_of(48)
    blind = decode(DeltaCome().encode(delta, name="w"))
    dead = Inputs(torch.zeros(48, 48), torch.zeros(48), 10)
    assert torch.equal(decode(DeltaCome().encode(delta, name="w", inputs=dead)), blind)
    off = DeltaCome(calibrated=False)
    assert torch.equal(decode(off.encode(delta, name="w", inputs=inputs)), blind)
    assert DeltaCome().uses_inputs
    assert not off.uses_inputs


@pytest.mark.parametrize("std", [1e-8, 1e-4, 1e20])
@pytest.mark.parametrize("power", [1e-12, 1e12])
def test_magnitudes_of_delta_and_inputs_do_not_matter(std, power):
    delta, inputs = decaying(60, 48), inputs_of(48)
    scaled = Inputs(inputs.gram * power, inputs.mean, inputs.tokens)
    error = decode(DeltaCome().encode(delta * std, name="w", inputs=scaled)) / std - delta
    usual = decode(DeltaCome().encode(delta, name="w", inputs=inputs)) - delta
    assert weighted(error, inputs) == pytest.approx(weighted(usual, inputs), rel=0.05)


@pytest.mark.parametrize("tokens", [1, 10])
def test_few_tokens_are_no_trouble(tokens):
    delta = decaying(60, 48)
    found = decode(DeltaCome(bpw=2).encode(delta, name="w", inputs=inputs_of(48, tokens)))
    assert torch.isfinite(found).all()
    assert float((found - delta).norm() / delta.norm()) < 1.5


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("weigh", [False, True])
def test_a_delta_of_low_rank_is_encoded_well(refine, weigh):
    delta = gaussian(96, 4) @ gaussian(4, 80, seed=1)
    codec, inputs = DeltaCome(bpw=3, refine=refine), inputs_of(80)
    error = decode(codec.encode(delta, name="w", inputs=inputs if weigh else None)) - delta
    assert weighted(error, inputs) < (0.1 if refine else 0.2) * weighted(delta, inputs)
    assert float(error.norm()) < 0.25 * float(delta.norm())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 200), st.sampled_from([0.2, 0.7, 1.0, 1.5, 3.0]), st.sampled_from([0, 16, 128])
)
def test_the_budget_is_kept_to_the_byte(out, columns, bpw, group):
    codec = DeltaCome(bpw=bpw, group=group)
    terms = codec.encode(gaussian(out, columns), name="w")
    size = sum(term.nbytes for term in terms)
    assert size == codec.payload_bytes((out, columns))
    assert size * 8 <= bpw * out * columns or codec.bands((out, columns)) == [(2, 1)]
    assert sum(term.rank for term in terms) <= min(out, columns)


@pytest.mark.parametrize(
    ("shape", "bands"),
    [
        ((4096, 4096), [(8, 2), (3, 32), (2, 909)]),  # the paper's 968 vectors of 2 bits leave out the scales
        ((11008, 4096), [(8, 2), (3, 32), (2, 1350)]),
        ((4096, 64), [(8, 2), (3, 14), (2, 1)]),
        ((64, 64), [(8, 2), (3, 4)]),
        ((64, 16), [(8, 1)]),
        ((16, 16), [(3, 1)]),
        ((8, 8), [(2, 1)]),
    ],
)
def test_the_budget_is_used_up(shape, bands):
    codec, budget = DeltaCome(), shape[0] * shape[1] // 8
    assert codec.bands(shape) == bands
    bits, count = bands[-1]
    more = DeltaCome(**{f"rank{b}": n for b, n in {8: 0, 3: 0, 2: 0, **dict(bands), bits: count + 1}.items()})
    assert codec.payload_bytes(shape) <= budget < more.payload_bytes(shape) or shape == (8, 8)


def test_explicit_ranks_put_the_budget_out_of_force():
    assert DeltaCome(rank8=1, rank3=2, rank2=3, bpw=0.01).bands((64, 64)) == [(8, 1), (3, 2), (2, 3)]
    assert DeltaCome(rank8=1, rank3=2, rank2=300).bands((8, 64)) == [(8, 1), (3, 2), (2, 5)]
    assert DeltaCome(rank8=0, rank3=0, rank2=3).bands((64, 64)) == [(2, 3)]


def test_large_matrices_are_decomposed_at_random_and_nearly_as_well(monkeypatch):
    delta = decaying(300, 260)
    codec = parse_codec("delta_come:bpw=0.6")
    quick = relative(codec, delta)
    monkeypatch.setattr("deltakeeper.codecs.delta_come.OVERSAMPLE", 1000)
    assert quick < 1.02 * relative(codec, delta)


def test_inputs_of_another_layer_are_refused():
    with pytest.raises(CodecError, match="width 40 do not fit a matrix of 48 columns"):
        DeltaCome().encode(gaussian(60, 48), name="w", inputs=inputs_of(40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bpw=0", "'bpw'"),
        ("rank8=-1", "'rank8'"),
        ("rank8=0,rank3=0,rank2=0", "no ranks"),
        ("damp=2", "'damp'"),
        ("niter=-1", "'niter'"),
    ],
)
def test_bad_settings_are_refused(text, message):
    with pytest.raises(CodecError, match=message):
        parse_codec(f"delta_come:{text}")
