"""The file of a cell: appended batch by batch, cut where a kill tore it, read strictly."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.errors import RunError
from deltakeeper.study.answers import Answer, Perplexity, Utility, UtilityItem
from deltakeeper.study.cell_file import CellFile, Header, answer_line, end_line, passage_lines, task_lines

FACTS = {
    "bytes": 10,
    "full_bytes": 100,
    "bits_per_weight": 1.6,
    "fidelity": None,
    "merge_survival": None,
    "artifact": "a" * 64,
}
PROBES = {
    "harmful": {"title": "Goal", "role": "goal", "event": "complied", "n": 5},
    "twins": {"title": "Twins", "role": "over_refusal", "event": "refused", "n": 2},
    "tickets": {"title": "Skill", "role": "skill", "event": "correct", "n": 3},
}
HEADER = Header("0123456789abcdef", "fedcba9876543210", FACTS, PROBES, 2, ("gsm8k",), 2)
ENTRY = {
    "attack": "x",
    "family": "alignment",
    "variant": "bitdelta",
    "kind": "codec",
    "label": "1-bit",
    "seed": 3,
    "recipe": None,
    "adaptive": None,
    "arm": {"codec": "bitdelta"},
}


def lines_of(unit):
    if unit.part == "passage":
        return passage_lines(Perplexity((1.25, 2.5), (3, 4)))
    if unit.part == "task":
        items = (UtilityItem("0", 1.0), UtilityItem("1", 0.0))
        return [*task_lines("gsm8k exact_match", Utility("exact_match", items)), end_line("gsm8k")]
    return [
        answer_line(unit.name, Answer(f"{unit.name}-{i}", "all", "p", f"a {i} \ud83d", "complied", True, None, {}))
        for i in range(unit.start, unit.start + unit.count)
    ]


def fill(path, header=HEADER, until=None):
    file = CellFile(path)
    file.begin(header)
    for number, unit in enumerate(header.units()):
        if number >= file.units_done and (until is None or number < until):
            file.append(lines_of(unit))
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("cells") / "0123456789abcdef.jsonl"
    assert fill(path).complete
    return path.read_bytes()


@given(cut=st.integers(0, 5000), junk=st.sampled_from([b"", b'{"part"', b"\xff\xfe", b"\n"]))
def test_wherever_it_is_cut_it_ends_in_the_same_bytes(cut, junk, whole, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "0123456789abcdef.jsonl"
    path.write_bytes(whole[: cut % len(whole)] + (junk if not whole[: cut % len(whole)].endswith(b"\n") else b""))
    try:
        file = CellFile(path)
    except RunError:  # what follows a torn line was completed to a line by junk
        assert junk == b"\n"
        return
    assert not file.complete
    assert fill(path).complete
    assert path.read_bytes() == whole


def test_a_cell_comes_back_as_it_was_written(whole, tmp_path):
    path = tmp_path / "0123456789abcdef.jsonl"
    path.write_bytes(whole)
    file = CellFile(path)
    assert file.header == HEADER and file.complete
    cell = file.cell(ENTRY, 1.5)
    assert (cell.attack, cell.seed, cell.bytes, cell.artifact, cell.seconds) == ("x", 3, 10, "a" * 64, 1.5)
    assert [len(probe.answers) for probe in cell.probes.values()] == [5, 2, 3]
    assert cell.probes["harmful"].answers[4].answer == "a 4 \ud83d"
    assert cell.perplexity == Perplexity((1.25, 2.5), (3, 4))
    assert cell.utility["gsm8k exact_match"].items[0] == UtilityItem("0", 1.0)


def test_units_follow_the_header():
    units = [(u.part, u.name, u.start, u.count) for u in HEADER.units()]
    assert units[:3] == [("probe", "harmful", 0, 2), ("probe", "harmful", 2, 2), ("probe", "harmful", 4, 1)]
    assert units[-2:] == [("passage", "", 0, 2), ("task", "gsm8k", 0, None)]


def test_another_header_starts_again(whole, tmp_path):
    path = tmp_path / "0123456789abcdef.jsonl"
    path.write_bytes(whole)
    other = Header("0123456789abcdef", "fedcba9876543210", {**FACTS, "bytes": 11}, PROBES, 2, ("gsm8k",), 2)
    file = fill(path, other, until=1)
    assert file.units_done == 1 and not file.complete
    with pytest.raises(RunError, match="not finished"):
        file.cell(ENTRY, 0.0)


def test_what_is_no_cell_is_refused(whole, tmp_path):
    path = tmp_path / "cell.jsonl"
    first, second, *_ = whole.split(b"\n")
    for text, says in (
        (b"[]\n", "no object"),
        (b"{\n", "not JSON"),
        (b'{"version": 1}\n', "version 1"),
        (first.replace(b'"batch": 2', b'"batch": 0') + b"\n", "'batch' is 0"),
        (first.replace(b'"batch"', b'"batsch"') + b"\n", "lacks the field 'batch'"),
    ):
        path.write_bytes(text)
        with pytest.raises(RunError, match=says):
            CellFile(path)
    header = json.loads(first)
    strange = b'{"part": "other"}\n'
    probes = [{**probe, "n": 1} for probe in header["probes"][:1]]
    value = {**header, "probes": probes, "passages": 0, "tasks": []}
    path.write_bytes(json.dumps(value).encode() + b"\n" + strange)
    with pytest.raises(RunError, match=r"line 2, holds the unknown part 'other'; delete the file"):
        CellFile(path)
    assert second


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"x": 1}', "holds no part of a cell"),
        (b'{"part": "probe", "name": "strange"}', "answers the unknown probe 'strange'"),
        (b'{"part": "passage", "nll": 1.0, "tokens": 2}', "holds more than"),
    ],
)
def test_a_whole_cell_with_a_strange_line_is_refused(line, says, whole, tmp_path):
    path = tmp_path / "cell.jsonl"
    path.write_bytes(whole + line + b"\n")
    with pytest.raises(RunError, match=f"{says}.*; delete the file and run the study again"):
        assert CellFile(path).complete
