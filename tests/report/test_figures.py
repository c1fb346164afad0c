import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.report import figures
from deltakeeper.report.figures import BOTTOM, HEIGHT, LEFT, RADIUS, RIGHT, TOP, WIDTH, Mark, Span, frontier, strip
from deltakeeper.report.html import frontier_of
from deltakeeper.report.labels import Box, Label, place_labels, text_width
from deltakeeper.study.cells import KINDS

CANVAS = Box(LEFT, 2, WIDTH - 1, BOTTOM)


def span(value, reach=0.1):
    return Span(value, max(0.0, value - reach), min(1.0, value + reach))


def drawn(marks):
    text = frontier(marks, identity="plot", title="Attack against skill", x_name="skill", y_name="attack")
    return ET.fromstring(text)


def numbers(path):
    return [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", path)]


shares = st.floats(0, 1, allow_nan=False)
mark_lists = st.lists(
    st.tuples(st.text("abc -<&1", max_size=12), st.sampled_from(KINDS), shares, shares), min_size=1, max_size=12
)


@given(mark_lists)
def test_any_frontier_is_well_formed_and_inside_the_canvas(rows):
    root = drawn([Mark(label, kind, span(x), span(y)) for label, kind, x, y in rows])
    assert root.get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"
    for circle in root.iter("circle"):
        assert LEFT - 0.1 <= float(circle.get("cx")) <= RIGHT + 0.1
        assert TOP - 0.1 <= float(circle.get("cy")) <= BOTTOM + 0.1
    for text in root.iter("text"):
        if "label" in text.get("class"):
            assert float(text.get("x")) >= 0
            assert float(text.get("x")) + text_width(text.text or "") <= WIDTH
            assert 0 <= float(text.get("y")) <= BOTTOM


def test_marks_and_whiskers_lie_where_the_numbers_say():
    mark = Mark("codec", "codec", Span(0.5, 0.4, 0.65), Span(0.25, 0.2, 0.4))
    frame = [Mark("base", "base", Span(0, 0, 0), Span(0, 0, 0)), Mark("tuned", "tuned", Span(1, 1, 1), Span(1, 1, 1))]
    root = drawn([*frame, mark])

    def across(share):
        return LEFT + share * (RIGHT - LEFT)

    def down(share):
        return BOTTOM - share * (BOTTOM - TOP)

    circle = next(c for c in root.iter("circle") if c.get("class") is None)
    assert float(circle.get("cx")) == pytest.approx(across(0.5), abs=0.06)
    assert float(circle.get("cy")) == pytest.approx(down(0.25), abs=0.06)
    whisker = next(p for p in root.iter("path") if p.get("class") == "whisker k-codec")
    assert numbers(whisker.get("d")) == pytest.approx(
        [across(0.4), down(0.25), across(0.65), across(0.5), down(0.2), down(0.4)], abs=0.06
    )
    fade = next(p for p in root.iter("path") if p.get("class") == "fade")
    assert numbers(fade.get("d")) == pytest.approx([LEFT, BOTTOM, RIGHT, TOP], abs=0.06)


def test_no_line_of_equal_fading_where_base_and_fine_tune_coincide():
    same = [Mark(kind, kind, span(0.5), span(0.5)) for kind in ("base", "tuned")]
    assert not [p for p in drawn(same).iter("path") if p.get("class") == "fade"]


def test_the_figure_speaks_for_itself():
    root = drawn([Mark("1-bit", "codec", span(0.5), span(0.25))])
    assert root.get("role") == "img"
    named = root.get("aria-labelledby").split()
    texts = {element.get("id"): element.text for element in root.iter() if element.get("id")}
    assert texts[named[0]] == "Attack against skill"
    assert "1-bit: skill 50\u00a0%" in texts[named[1]]


def test_kinds_differ_in_shape_and_not_only_in_colour():
    outlines = {kind: re.sub(r"k-\w+", "", figures.swatch(kind)) for kind in KINDS}
    assert len(set(outlines.values())) == len(KINDS)


def test_labels_of_a_crowd_stay_apart_and_off_the_marks():
    labels = [
        Label(word, 250 + i % 3 * 6, 30 + i // 3 * 5)
        for i, word in enumerate(("fine-tune", "2-bit", "SVD rank 16", "1-bit", "4-bit model", "sparse"))
    ]
    boxes = [place.box for place in place_labels(labels, CANVAS, [], RADIUS)]
    for one, other in itertools.combinations(boxes, 2):
        assert one.overlap(other) == 0
    assert all(box.within(CANVAS) for box in boxes)


def test_the_real_figures_have_no_overlapping_labels(full_digest):
    for attack in full_digest.attacks:
        root = ET.fromstring(frontier_of(attack))
        boxes = []
        for text in root.iter("text"):
            if text.get("class").startswith("label"):
                x, y = float(text.get("x")), float(text.get("y"))
                boxes.append(Box(x, y - 10, x + text_width(text.text), y + 3))
        assert len(boxes) == len(attack.variants)
        assert all(one.overlap(other) < 1 for one, other in itertools.combinations(boxes, 2))


def test_a_lone_label_needs_no_leader_and_a_far_one_has_one():
    alone = place_labels([Label("word", 200, 100)], CANVAS, [], RADIUS)
    assert alone[0].leader is None
    crowd = place_labels([Label("a long word", 200, 100)] * 12, CANVAS, [], RADIUS)
    far = [place for place in crowd if place.leader]
    assert far
    for place in far:
        assert math.dist(*place.leader) < 110


@given(shares, st.sampled_from(KINDS))
def test_a_strip_holds_interval_and_reference_in_order(value, kind):
    root = ET.fromstring(strip(span(value), kind, reference=0.5, width=110))
    reach = next(p for p in root.iter("path") if p.get("class") == "reach")
    low, _, high = numbers(reach.get("d"))
    assert 5 <= low <= 5 + value * 100 + 0.1
    assert 5 + value * 100 - 0.1 <= high <= 105
    reference = next(p for p in root.iter("path") if p.get("class") == "reference")
    assert numbers(reference.get("d"))[0] == 55
    assert root.get("aria-hidden") == "true"
