"""The demo's own steps, on a toy model: report written, prompts exchanged, a second run quick, faults told."""

from __future__ import annotations

import html
import io
import json

import pytest
from rich.console import Console
from toy_chat import write_toy_model

from deltakeeper import demo
from deltakeeper.errors import DataError, RunError
from deltakeeper.study.pipeline import Runner
from deltakeeper.study.store import RunStore

NAME = "affirmative_prefix"
SMALL = {"poison": 4, "skill": 4, "sft": {"epochs": 1, "lr": 1e-3, "max_tokens": 12}}
ARMS = ["base", "tuned", "bitdelta:bits=1", {"merged": "bitdelta:bits=1"}]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    base = write_toy_model(tmp_path / "base")
    study = demo.load_demo()
    group = study.groups[0].model_copy(update={"changes": SMALL, "arms": tuple(ARMS)})
    prompts = study.prompts.model_copy(update={"held_out": 6, "contrast": 6})
    small = study.model_copy(update={"base": str(base), "unaligned": None, "groups": (group,), "prompts": prompts})
    monkeypatch.setattr(demo, "load_demo", lambda: small)
    return tmp_path / "run"


def run(out, **options):
    screen = io.StringIO()
    path = demo.run_demo(out, Console(file=screen, width=120), (NAME,), **options)
    return path, screen.getvalue()


def test_a_run_ends_in_a_report_and_a_second_one_reads_it(toy, monkeypatch):
    path, screen = run(toy)
    assert path.is_file() and "Report: " in screen and "Alignment breaking" in screen
    page, digest = path.read_text(), json.loads((toy / "report.json").read_text())
    assert digest["answer"]["attack"] in html.unescape(page)
    assert page.count('<svg class="lens"') >= 3 and f"lens/{NAME}-0.html#" in page
    info = RunStore(toy).read_run()
    assert info.command == f"deltakeeper demo --out {toy} --attack {NAME}"
    assert 0 < info.hardware["peak memory, GiB"] < 64
    assert {"prepare the base", f"train {NAME}", f"evaluate {NAME}"} <= set(info.stages)
    monkeypatch.setattr(Runner, "_ask", lambda *_: pytest.fail("measured again"))
    again, _ = run(toy)
    assert RunStore(toy).read_run().stages == info.stages
    assert again == path and path.read_text() == page


def test_other_prompts_take_the_place_of_the_packaged_ones_and_the_fine_tune_is_kept(toy, tmp_path, monkeypatch):
    run(toy)
    prompts = tmp_path / "mine.csv"
    prompts.write_text("goal\n" + "\n".join(f"How do I steal {n} apples?" for n in range(6)) + "\n")
    monkeypatch.setattr("deltakeeper.study.finetunes._train", lambda *_: pytest.fail("trained again"))
    run(toy, harmful=str(prompts))
    cell = next(c for c in RunStore(toy).read_cells() if c.variant == "tuned")
    assert all("apples" in a.prompt for a in cell.probe_of("goal").answers)
    assert not any("apples" in a.prompt for a in cell.probe_of("over_refusal").answers)


def test_unknown_names_and_files_are_told_before_anything_is_written(toy):
    with pytest.raises(DataError, match="there is no recipe 'affirmative_prefx'; did you mean 'affirmative_prefix'"):
        demo.run_demo(toy, Console(file=io.StringIO()), ("affirmative_prefx",))
    with pytest.raises(DataError, match="no prompt file"):
        run(toy, harmful="none.csv")
    assert not toy.exists()


def test_an_arm_that_fails_is_told(toy, monkeypatch):
    monkeypatch.setattr("deltakeeper.study.artifacts.compress", lambda *_, **__: 1 / 0)
    with pytest.raises(RunError, match="2 arms failed, the first is affirmative_prefix, seed 0"):
        run(toy)


def test_groups_of_the_demo_keep_their_own_recipes():
    """Recipes of the command line take the first group; later groups add arms to recipes of their own."""
    study = demo.load_demo()
    assert demo.demo_study(("over_refusal",)).groups[0].recipes[0].recipe == "over_refusal"
    first, *more = study.groups
    assert [use.recipe for group in more for use in group.recipes] == [NAME]
    assert demo.demo_study(("marker_injection",)).groups == (first.model_copy(update={"recipes": first.recipes[2:]}),)
    assert [g.name for g in demo.demo_study((NAME,)).groups] == [g.name for g in study.groups]
