"""Boxes: what a codec cannot tell from a delta is encoded like it, whatever noise was projected there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.codecs import CODECS, SumCodec, parse_codec
from deltakeeper.codecs.box import Guarded, to_grid
from deltakeeper.codecs.box_table import box_table, has_box
from deltakeeper.codecs.cells import Cells
from deltakeeper.codecs.spaces import Unseen, clip_spectrum, estimate_norm

INTERVALS = [
    "bitdelta",
    "bitdelta:zero=plus",
    "bitdelta:zero=minus,scale=row",
    "bitdelta:zero=zero,scale=column",
    "bitdelta:bits=2",
    "bitdelta:bits=3,scale=row,zero=plus",
    "bitdelta:bits=2,scale=column,zero=zero",
    "magnitude",
    "magnitude:keep=0.4,per=row,values=float32",
    "magnitude:keep=0.9,rescale=true",
    "dare:p=0.6",
    "dare:p=0.5,values=int4",
    "dare:p=0.5,fit_q=error,values=int8",
    "compeft:keep=0.3",
    "rtn:bits=2",
    "rtn:bits=4,group=7",
    "rtn:bits=3,group=16,symmetric=false",
    "rtn:bits=4,group=0,scale=float32",
    "ultradelta:p=0.5",
    "ultradelta:p=0.3,bits=3,rescale=none",
    "deltazip",
    "deltazip:bits=2",
    "deltazip:pattern=unstructured,keep=0.3",
    "rtn:bits=3+magnitude:keep=0.2",
    "bitdelta:zero=plus+rtn:bits=2",
]
SPACES = {  # with the error that is allowed: a code that turns over by rounding costs a step, and later bands follow it
    "svd:rank=3": 2e-3,
    "svd:rank=4,method=exact": 2e-3,
    "delta_come:bpw=0.3": 0.1,
    "delta_come:rank8=2,rank3=6,rank2=0,refine=false": 0.02,
    "impart:cr=200": 2e-3,
}
NAME = "model.layers.0.mlp.up_proj.weight"


def gaussian(shape, std=1.0, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def decode(codec, delta):
    return sum(term.to_dense() for term in codec.encode(delta, name=NAME))


def distance(left, right):
    size = float(right.double().norm())
    return float((left.double() - right.double()).norm()) / (size or 1.0)


def decaying(out, columns, seed=0):
    """A delta with a spectrum that falls like those of fine-tunes."""
    u = torch.linalg.qr(gaussian((out, out), seed=seed)).Q[:, :columns]
    v = torch.linalg.qr(gaussian((columns, columns), seed=seed + 1)).Q
    return (u[:, : v.shape[0]] * (torch.arange(1, columns + 1) ** -0.7)) @ v * 1e-3


@st.composite
def deltas(draw):
    """Matrices of several shapes, sizes, shares of zeros and numbers of levels."""
    shape = draw(st.sampled_from([(1, 1), (3, 5), (16, 40), (33, 20)]))
    delta = gaussian(shape, draw(st.sampled_from([1e-7, 1e-3, 10.0])), draw(st.integers(0, 999)))
    if draw(st.booleans()):  # few levels, as deltas of bfloat16 weights have
        step = float(delta.abs().mean()) / 2
        delta = (delta / step).round() * step
    return delta


@pytest.mark.parametrize("text", INTERVALS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(delta=deltas(), noise=st.sampled_from([1e-3, 0.3, 3.0]), seed=st.integers(0, 99))
def test_members_of_intervals_are_encoded_alike(text, delta, noise, seed):
    codec = parse_codec(text)
    box = codec.box(delta, name=NAME)
    size = float(delta.abs().mean())
    candidate = delta + gaussian(delta.shape, noise * size, seed)
    found = box.project(candidate)
    assert torch.equal(box.project(delta), delta)
    assert distance(decode(codec, found), decode(codec, delta)) <= 2e-4
    assert torch.allclose(box.project(found), found, rtol=1e-5, atol=1e-5 * size)
    assert box.share_inside(found) >= 0.999
    assert box.share_inside(delta) == 1.0
    assert distance(found, candidate) <= distance(delta, candidate) * 1.5 + 1e-6


@pytest.mark.parametrize("text", SPACES)
@pytest.mark.parametrize("noise", [0.1, 3.0])
def test_members_of_spaces_are_encoded_alike(text, noise):
    codec = parse_codec(text)
    delta, seed = (decaying(360, 300), 0) if noise < 1 else (gaussian((300, 360), 1e-3), 1)
    box = codec.box(delta, name=NAME)
    size = float(delta.abs().mean())
    candidate = delta + gaussian(delta.shape, noise * size, seed + 7)
    found = box.project(candidate)
    assert torch.equal(box.project(delta), delta)
    assert distance(decode(codec, found), decode(codec, delta)) <= SPACES[text]
    assert distance(box.project(found), found) <= 1e-3
    assert box.share_inside(found) >= 0.999
    assert float((found - delta).norm()) > 0.05 * float((candidate - delta).norm())
    assert distance(decode(codec, candidate), decode(codec, delta)) > 2 * SPACES[text] or noise < 1


def test_boxes_leave_room():
    """A box that held the centre alone would pass all that is asked above."""
    delta = gaussian((64, 96), 1e-3)
    candidate = delta + gaussian(delta.shape, 5e-4, 1)
    for text in INTERVALS:
        moved = parse_codec(text).box(delta, name=NAME).project(candidate) - delta
        assert float(moved.norm()) > 0.05 * float((candidate - delta).norm()), text


def test_the_box_of_a_sign_plane_is_as_the_definition_says():
    delta = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    box = parse_codec("bitdelta:zero=plus").box(delta, name="w")
    found = box.project(torch.tensor([[-1.0, -2.0, 9.0, 4.0]]))
    assert torch.equal(torch.sign(found[0, 1:]), torch.tensor([-1.0, 1.0, -1.0]))
    assert float(found[0, 0]) >= 0
    assert float(found.abs().sum()) == pytest.approx(10.0, rel=1e-6)


def test_magnitude_keeps_what_it_stores_and_lets_the_rest_move_below_it():
    delta = torch.tensor([[4.0, 1.0, -3.0, 0.5]])
    box = parse_codec("magnitude:keep=0.5").box(delta, name="w")
    found = box.project(torch.tensor([[9.0, -2.0, 0.0, 50.0]]))
    assert found[0, :3].tolist() == [4.0, -2.0, -3.0]
    assert 2.9 < float(found[0, 3]) < 3.0


def test_dropped_entries_of_a_known_seed_are_free():
    delta = gaussian((20, 30))
    codec = parse_codec("dare:p=0.5")
    kept = decode(codec, delta) != 0
    candidate = delta + 100
    found = codec.box(delta, name=NAME).project(candidate)
    assert torch.equal(found[~kept], candidate[~kept])
    assert torch.equal(found[kept], delta[kept])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text", ["bitdelta", "bitdelta:bits=2,scale=row", "magnitude", "rtn:bits=3", "dare:p=0.5"])
def test_members_on_a_grid_survive_being_stored(text, dtype):
    base = gaussian((64, 96), 0.05).to(torch.bfloat16)
    delta = to_grid(base, gaussian((64, 96), 5e-4, 1), dtype) - base.float()
    codec = parse_codec(text)
    box = codec.box(delta, name=NAME)
    candidate = delta + gaussian(delta.shape, 5e-4, 2)
    stored = (base.float() + box.round(candidate, base, dtype)).to(dtype)
    found = stored.float() - base.float()
    assert box.share_inside(found) == 1.0
    coarse = 0.03 if dtype == torch.bfloat16 and "row" in text else 2e-3  # a step of the grid is 2 % of a row's mean
    assert distance(decode(codec, found), decode(codec, delta)) <= coarse
    assert torch.equal(box.round(delta, base, dtype), delta)
    grid = box.on_grid(base, dtype)
    rounded = to_grid(base, grid.project(candidate), dtype) - base.float()
    assert box.share_inside(rounded) == 1.0


def test_rounding_without_the_grid_leaves_the_box():
    base = gaussian((64, 96), 0.05).to(torch.bfloat16)
    delta = to_grid(base, gaussian((64, 96), 5e-4, 1), torch.bfloat16) - base.float()
    box = parse_codec("bitdelta").box(delta, name=NAME)
    loose = to_grid(base, box.project(delta + gaussian(delta.shape, 5e-4, 2)), torch.bfloat16) - base.float()
    assert box.share_inside(loose) < 0.99


def test_a_box_whose_rule_may_turn_is_guarded():
    delta = gaussian((40, 50)) * (gaussian((40, 50), seed=1) > 0)
    assert isinstance(parse_codec("bitdelta").box(delta, name=NAME), Guarded)
    assert isinstance(parse_codec("bitdelta").box(gaussian((40, 50)), name=NAME), Cells)
    inner = parse_codec("bitdelta:zero=zero").box(delta, name=NAME)
    never = Guarded(inner, lambda _: False)
    assert torch.equal(never.project(delta + 1), delta)
    assert torch.equal(never.round(delta + 1, torch.zeros(40, 50), torch.float32), delta)


def test_settings_that_look_at_everything_have_no_box():
    delta = gaussian((30, 40))
    for text in ("svd:energy=0.5", "compeft:scale=std", "ultradelta:rescale=trace", "deltazip:search=true", "impart"):
        assert parse_codec(text).box(delta, name=NAME) is None
    assert parse_codec("bitdelta+svd:rank=2").box(delta, name=NAME) is None
    assert parse_codec("bitdelta+compeft").box(delta, name=NAME) is None
    assert parse_codec("svd:rank=2").box(torch.zeros(30, 40), name=NAME) is None


def test_every_codec_declares_a_box_or_says_why_not():
    tested = {parse_codec(text).name for text in [*INTERVALS, *SPACES]} - {"sum"}
    assert {name for name, codec in CODECS.items() if has_box(codec)} == tested
    assert has_box(SumCodec)
    table = box_table()
    page = Path(__file__).parents[2] / "docs" / "adaptive.md"
    assert table in page.read_text(encoding="utf-8"), "the table of boxes in docs/adaptive.md is stale"
    for name, codec in CODECS.items():
        assert f"| `{name}` |" in table
        assert has_box(codec) or (codec.boxless in table and codec.boxless != "it is not declared")


def test_spectra_are_estimated_and_clipped():
    for matrix in (gaussian((40, 60), 1e-3), gaussian((60, 40), 1e-3), decaying(60, 40)):
        sizes = torch.linalg.svdvals(matrix)
        assert float(sizes[0]) * 0.9 <= estimate_norm(matrix) <= float(sizes[0]) * 1.0001
        limit = float(sizes[3])
        clipped = clip_spectrum(matrix, limit)
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        assert torch.allclose(clipped, (u * s.clamp(max=limit)) @ vt, atol=1e-5 * float(sizes[0]))


def test_changes_stay_below_what_was_kept():
    delta = decaying(60, 40)
    box = parse_codec("svd:rank=2,method=exact").box(delta, name=NAME)
    assert isinstance(box, Unseen)
    found = box.project(delta + gaussian(delta.shape, 1.0, 3))
    wanted, sizes = torch.linalg.svdvals(delta), torch.linalg.svdvals(found)
    assert torch.allclose(sizes[:2], wanted[:2], rtol=1e-4)
    assert float(sizes[2]) <= float(wanted[1]) * 1.0001
