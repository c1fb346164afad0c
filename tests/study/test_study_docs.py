"""The page on studies: its example is a study, its files exist and plan, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from deltakeeper.study.file import load_study, read_study
from deltakeeper.study.plan import plan_study

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "study.md"


def test_the_example_is_a_study_that_can_be_planned():
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    study = read_study(yaml.safe_load(block) | {"base": "embedded-aligned"}, "the example")
    plan = plan_study(study)
    assert len(plan.tracks) == 3 * 3
    assert {variant.kind for track in plan.tracks for variant in track.variants} == {
        "base", "tuned", "codec", "merged", "quantised", "control", "healed", "defended"
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_of_the_repository_is_on_the_page_and_planned(path):
    assert path.name in PAGE.read_text(encoding="utf-8")
    assert plan_study(load_study(path)).tracks


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / target).exists(), target
