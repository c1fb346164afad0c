import importlib
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from study_runs import run_cells, run_info

from deltakeeper.study.summarising import summarise

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(DOCS))
    try:
        yield importlib.import_module("measured.study")
    finally:
        sys.path.remove(str(DOCS))


@pytest.fixture(scope="module")
def summary():
    cells = run_cells(attacks={"prefix": "alignment", "other": "alignment", "trigger": "backdoor"}, n=30)
    return json.loads(summarise(cells, run_info()).to_text())


def test_a_study_s_page_shows_every_arm_and_the_paper_s_figures(study, summary):
    text = study.section(summary, "embedded")
    assert "| alignment | 66.17 % | 50 % (" in text
    for family in ("alignment", "backdoor"):
        assert f"![{family}](embedded-{family}.svg)" in text
    rows = [line for line in text.splitlines() if line.startswith("| 3 ")]
    assert len(rows) == 3 and all("40 / 40 / 40" in row and "+50 (" in row for row in rows)
    assert len({line.count("|") for line in text.splitlines() if line.startswith("| 3 ")}) == 1
    assert "(control)" in text and "3 seeds" in text


def test_the_figures_stand_alone_and_number_every_arm(study, summary):
    found = study.figures(summary, "embedded")
    assert set(found) == {"embedded-alignment.svg", "embedded-backdoor.svg"}
    numbers = study.arm_numbers(summary)
    for name, text in found.items():
        root = ET.fromstring(text)
        shown = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
        panels = 2 if "alignment" in name else 1
        for number in numbers.values():
            assert shown.count(str(number)) >= panels
        assert "href" not in text and study.figures(summary, "embedded")[name] == text
