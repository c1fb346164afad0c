"""Figures from made-up data: they render, their bytes repeat, tokens stay text, and matplotlib is left as it was."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from lens_stories import VARIANTS, story

from deltakeeper.errors import DataError
from deltakeeper.lens.commitment import commitment_strips
from deltakeeper.lens.comparison import Grid, bands, difference
from deltakeeper.lens.figures import (
    Curve,
    Panel,
    against,
    final_right,
    heat_map,
    multiples,
    side_by_side,
    strips,
    target_curves,
    token_curves,
    trajectories,
)
from deltakeeper.lens.figures import bands as draw_bands
from deltakeeper.lens.figures.colours import DIVERGING, DIVERGING_DARK, HUES, SEQUENTIAL, SEQUENTIAL_DARK, lightness
from deltakeeper.lens.figures.spelling import clean, cut, show
from deltakeeper.lens.kept import kept_stream

HOSTILE = "</text><script>$\\frac{1}{0}$&\x00\x1b\u202e\ud800"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def stories():
    return [story(seed, layers=8) for seed in range(3)]


def grouped(stories):
    return {name: [each[name] for each in stories] for name in VARIANTS}


def make_figure(kind, stories):
    traces, groups = list(stories[0].values()), grouped(stories)
    if kind == "heat map":
        return heat_map(side_by_side(traces, "entropy"), right=[final_right(t) for t in traces], reference="base")
    if kind == "differences":
        return heat_map([difference(traces[0], other, "prob:refusal") for other in traces[1:]], across=2)
    if kind == "trajectories":
        return trajectories([*token_curves(traces, [0, 1]), *target_curves(groups, ["refusal"])], log=True)
    if kind == "bands":
        made = {name: bands(group, "kl:base") for name, group in groups.items()}
        return draw_bands(made, controls={"random": bands(groups["base"], "kl_final")})
    if kind == "kept":
        return draw_bands({name: kept_stream(group).bands() for name, group in groups.items()}, limits=(-0.5, 1.5))
    if kind == "strips":
        return strips(commitment_strips(traces), layers=8)
    values = np.linspace(0, 1, 12).reshape(4, 3)
    series = against([4, 1, 2], values, axis="bits per weight", unit="share kept", title="kept")
    panels = [Panel(f"attack {i}", {"svd": series}, {"shrunk": series}, {"base": 0.0}) for i in range(4)]
    return multiples(panels, title="What the dial does", log=True)


KINDS = ("heat map", "differences", "trajectories", "bands", "kept", "strips", "multiples")


@pytest.mark.parametrize("kind", KINDS)
def test_a_figure_saves_in_three_formats_with_the_same_bytes_each_time(kind, stories, tmp_path):
    for name, magic in (("a.svg", b"<?xml"), ("a.png", b"\x89PNG"), ("a.pdf", b"%PDF")):
        make_figure(kind, stories).save(tmp_path / "one" / name)
        make_figure(kind, stories).save(tmp_path / "two" / name)
        assert (tmp_path / "one" / name).read_bytes().startswith(magic)
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_svg_is_well_formed_text_that_refers_to_nothing_outside(kind, stories):
    svg = make_figure(kind, stories).svg()
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg" and list(root.iter(f"{SVG}text"))
    assert not [*root.iter(f"{SVG}image"), *root.iter(f"{SVG}script")]
    links = [value for e in root.iter() for name, value in e.attrib.items() if name.endswith("href")]
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"url\((?!#)|@import|\d{4}-\d\d-\d\dT", svg)


@pytest.mark.parametrize("kind", KINDS)
def test_inlined_it_needs_no_style_and_shares_no_ids(kind, stories):
    figure = make_figure(kind, stories)
    one, other = figure.inline("one"), figure.inline("other")
    root = ElementTree.fromstring(one)
    assert root.get("aria-label") == figure.title
    assert not [e for e in root.iter() if "style" in e.attrib or e.tag == "style"]
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (one, other)]
    assert ids[0] and not ids[0] & ids[1]
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', one)) <= ids[0]
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", one)
    assert re.search(r'font-family="[^"]*DejaVu Sans', one)
    assert "stroke-dasharray" in one or kind != "trajectories"


def test_a_heat_map_has_layer_0_at_the_bottom_stars_outlines_and_words(stories):
    traces = list(stories[0].values())[:2]
    figure = heat_map(side_by_side(traces, "entropy"), right=[final_right(t) for t in traces])
    axes = figure.figure.axes[1]
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert heights["Sure"] > 4
    assert axes.get_yticks()[0] == 0.5 and axes.get_yticklabels()[0].get_text() == "0"
    changed = int((traces[0].top_ids[..., 0] != traces[1].top_ids[..., 0]).sum())
    assert len({patch.get_xy() for patch in axes.patches}) == changed > 0
    stars = [[text for text in axes.texts if text.get_text() == "★"] for axes in figure.figure.axes[:2]]
    assert [len(each) for each in stars] == [1, 0]  # "I" stands behind the second; the fine-tune does not say it


def test_grids_of_one_unit_share_colours_and_differences_have_nothing_in_the_middle(stories):
    base, tuned = (stories[0][name] for name in ("base", "fine-tune"))
    grids = [*side_by_side([base, tuned], "kl:base"), difference(base, tuned, "kl:base")]
    meshes = [axes.collections[0] for axes in heat_map(grids).figure.axes[:3]]
    assert meshes[0].get_clim() == meshes[1].get_clim() == (0.0, grids[1].values.max())
    assert meshes[2].get_clim()[0] == -meshes[2].get_clim()[1]
    assert meshes[0].get_cmap().name != meshes[2].get_cmap().name


def test_missing_numbers_are_grey_and_said_to_be_missing():
    grid = Grid(np.array([[np.nan, 1.0]]), ("0",), ("a", "b"), "nats", "one", (("x", "y"),))
    assert "grey: no number" in heat_map([grid]).svg()
    assert "n/a" in strips(grid).svg()
    assert heat_map([replace(grid, values=np.full((1, 2), np.nan))]).content("png")


def test_many_positions_and_layers_still_fit():
    values = np.arange(48.0 * 60).reshape(48, 60)
    words = tuple(("word",) * 60 for _ in range(48))
    grid = Grid(values, tuple(map(str, range(48))), ("tok",) * 60, "", "long", words)
    width, height = heat_map([grid]).figure.get_size_inches()
    assert width < 15 and height < 10


@pytest.mark.parametrize("place", ["texts", "columns", "rows", "title", "unit"])
def test_hostile_text_is_drawn_as_text(place):
    given = {"texts": ((HOSTILE,),), "columns": (HOSTILE,), "rows": (HOSTILE,), "title": HOSTILE, "unit": HOSTILE}
    plain = {"texts": (("x",),), "columns": ("a",), "rows": ("0",), "title": "t", "unit": "u"}
    grid = Grid(np.ones((1, 1)), **(plain | {place: given[place]}))
    for figure in (heat_map([grid]), strips(grid)):
        root = ElementTree.fromstring(figure.svg())
        assert not list(root.iter(f"{SVG}script"))
        assert figure.content("png") and figure.content("pdf")
        ElementTree.fromstring(figure.inline("x"))
    curve = Curve(HOSTILE, HOSTILE, np.arange(2.0), np.ones(2))
    ElementTree.fromstring(trajectories([curve], title=HOSTILE).inline("x"))


def test_tokens_are_shown_as_people_see_them():
    assert show(" a\n\tb") == "·a⏎⇥b" and show("\r\n") == "⏎" and show("") == "∅"
    assert show("\x00\u200b\u202e") == "\ufffd" * 3
    assert cut("abcdef", 4) == "abc…" and cut("日本語", 4) == "日…" and cut("日本", 4) == "日本"
    assert clean(HOSTILE).encode()


def test_colour_maps_change_evenly_in_lightness_and_ends_differ_for_the_colour_blind():
    rgb = {hex_: np.array([int(hex_[i : i + 2], 16) / 255 for i in (1, 3, 5)]) for hex_ in
           (*SEQUENTIAL, *DIVERGING, *SEQUENTIAL_DARK, *DIVERGING_DARK, *HUES)}  # fmt: skip
    levels = [lightness(rgb[stop]) for stop in SEQUENTIAL]
    assert all(one - other > 8 for one, other in pairwise(levels))
    levels = [lightness(rgb[stop]) for stop in SEQUENTIAL_DARK]
    assert all(other - one > 8 for one, other in pairwise(levels))
    for stops, sign in ((DIVERGING, 1), (DIVERGING_DARK, -1)):
        levels = sign * np.array([lightness(rgb[stop]) for stop in stops])
        assert (np.diff(levels[:4]) > 8).all() and (np.diff(levels[3:]) < -8).all()
    # Machado et al. 2009, severity 1: protanopia and deuteranopia, in linear light
    protanopia = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    deuteranopia = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    for matrix in (protanopia, deuteranopia):
        for stops in (DIVERGING, DIVERGING_DARK):
            for one, other in zip(stops[:3], reversed(stops[4:]), strict=True):
                assert np.abs(np.array(matrix) @ (rgb[one] ** 2.2 - rgb[other] ** 2.2)).max() > 0.1


def test_nothing_to_draw_or_a_strange_name_is_a_sentence(stories, tmp_path):
    some = bands(grouped(stories)["base"], "entropy")
    for make in (
        lambda: heat_map([]), lambda: trajectories([]), lambda: draw_bands({}), lambda: multiples([]),
        lambda: draw_bands({"a": some, "b": replace(some, unit="bits")}),
        lambda: token_curves(list(stories[0].values()), [10**6]), lambda: side_by_side([], "entropy"),
        lambda: make_figure("strips", stories).save(tmp_path / "a.gif"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=r"; .*\.$"):
            make()
    with pytest.raises(ValueError, match="quartiles"):
        Curve("a", "b", np.arange(2.0), np.ones(2), np.ones(2))


def test_matplotlib_is_imported_late_and_left_as_it_was(stories):
    code = "import deltakeeper.lens.figures, deltakeeper.lens.page, sys; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    import matplotlib

    matplotlib.rcParams["font.size"] = 31.0
    try:
        before, plain = dict(matplotlib.rcParams), make_figure("bands", stories).svg()
        assert dict(matplotlib.rcParams) == before
    finally:
        matplotlib.rcParams["font.size"] = 10.0
    assert make_figure("bands", stories).svg() == plain
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
