"""The page on studies: its example is a study, its files exist and plan, and its links lead somewhere."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from deltakeeper.heal import GuardSettings
from deltakeeper.lab.guarding import GuardData
from deltakeeper.lab.recipes import load_recipe
from deltakeeper.lab.worst_case import Score
from deltakeeper.study.file import load_study, read_study
from deltakeeper.study.healing import read_guard
from deltakeeper.study.plan import plan_study
from deltakeeper.study.variants import read_arm

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


def test_the_settings_of_a_guard_are_those_of_the_program():
    rows = re.findall(r"^\| `(data\.)?(\w+)` \| `(.*?)` \|", PAGE.read_text(encoding="utf-8"), flags=re.M)
    for kind, prefix in ((GuardSettings, ""), (GuardData, "data.")):
        told = {name: yaml.safe_load(default) for before, name, default in rows if before == prefix}
        known = {name: value for name, value in dataclasses.asdict(kind()).items() if name != "seed"}
        assert list(told) == list(known)
        assert told == {name: list(v) if isinstance(v, tuple) else v for name, v in known.items()}


def test_the_guarded_arm_of_the_page_is_one():
    (text,) = re.findall(r"`(\{heal: .*?guard: .*?data: .*?)`", PAGE.read_text(encoding="utf-8"))
    settings, data = read_guard(read_arm(yaml.safe_load(text)).heal["guard"])
    assert settings != GuardSettings() and data != GuardData()


def test_the_search_for_the_worst_case_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "study.md", "exec"), {"train_and_measure": lambda attack: Score(1e3 * attack.sft.lr, 0.0)})
    assert "Candidate(lr=" in capsys.readouterr().out
    assert "not searched" in load_recipe("worst_case").title


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_of_the_repository_is_on_the_page_and_planned(path):
    assert path.name in PAGE.read_text(encoding="utf-8")
    assert plan_study(load_study(path)).tracks


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / target).exists(), target
