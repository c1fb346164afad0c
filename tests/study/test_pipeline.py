"""The study, from training to cells, on a tiny model with a toy tokenizer: complete, resumable, and fault by fault."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from rich.console import Console
from toy_chat import write_toy_model

from deltakeeper.errors import OverlayError, RunError
from deltakeeper.study import pipeline
from deltakeeper.study.file import read_study
from deltakeeper.study.pipeline import Runner
from deltakeeper.study.plan import plan_study, probes_of
from deltakeeper.study.progress import Progress
from deltakeeper.study.run import run_study
from deltakeeper.study.store import RunStore

ARMS = [
    "base",
    "tuned",
    "bitdelta:bits=1",
    "bitdelta:bits=2",
    {"codec": "bitdelta:bits=2", "planes": 1},
    "svd:rank=8",
    {"quantised": "rtn:bits=4", "name": "rtn:bits=4"},
    {"merged": "bitdelta:bits=1"},
]
SMALL = {"skill": 4, "sft": {"epochs": 1, "lr": 1e-3, "batch": 8, "max_tokens": 12}}
RECIPES = [
    {"recipe": "marker_injection", "set": {"rows": 4}},
    {"recipe": "affirmative_prefix", "set": {"poison": 4}},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_toy_model(tmp_path_factory.mktemp("toy") / "base")


@pytest.fixture(scope="module")
def study(base):
    return small(base)


def small(base, **changes):
    group = {"name": "all", "recipes": RECIPES, "arms": ARMS, "set": SMALL}
    prompts = {"held_out": 3, "contrast": 2, "passages": 2}
    value = {"name": "toy", "base": str(base), "prompts": prompts, "groups": [group], "answers": {"batch": 2}}
    return read_study({**value, **changes}, "the test's study")


def quiet():
    return Progress(Console(file=io.StringIO()))


def run(study, folder, **options):
    with quiet() as progress:
        return run_study(study, folder, progress, command="test", **options)


def files(folder):
    """Everything but times and weights, by name."""
    paths = [*(folder / "cells").glob("*.jsonl"), folder / "run.json", folder / "index.json"]
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    outcome = run(study, folder)
    assert outcome.complete and outcome.planned == 2 * len(ARMS)
    return folder


def test_every_cell_is_measured(study, finished):
    plan, store = plan_study(study), RunStore(finished)
    cells = {(c.attack, c.variant): c for c in store.read_cells()}
    assert set(cells) == {(t.finetune.name, v.name) for t in plan.tracks for v in t.variants}
    info = store.read_run()
    assert {"train marker_injection", "evaluate affirmative_prefix"} <= set(info.stages)
    assert len(info.model["root"]) == 64 and info.attacks["marker_injection"].recipe == "marker_injection"
    for track in plan.tracks:
        name = track.finetune.name
        one = cells[name, "bitdelta:bits=1"]
        assert {p.role for p in one.probes.values()} >= {"goal", "over_refusal", "skill"}
        assert 0 < one.bytes < one.full_bytes
        assert 0 < one.fidelity.relative_error < 1
        assert len(one.artifact) == 64 and one.artifact == cells[name, "bitdelta:bits=1+bf16"].artifact
        assert one.recipe == track.finetune.recipe_sha256 and one.arm == {"codec": "bitdelta"}
        assert cells[name, "base"].bytes is None
        assert cells[name, "tuned"].bytes == one.full_bytes
        assert cells[name, "rtn:bits=4"].bytes < one.full_bytes
        assert 0 < cells[name, "bitdelta:bits=1+bf16"].merge_survival <= 1
        two = cells[name, "bitdelta:bits=2 planes=1"]
        assert two.artifact == cells[name, "bitdelta:bits=2"].artifact and two.arm["planes"] == 1
        for probe in probes_of(track.finetune, plan.corpus):
            assert [a.id for a in one.probes[probe.name].answers] == [r.id for r in probe.rows]


def test_the_base_answers_alike_under_every_attack(finished):
    first, second = (c for c in RunStore(finished).read_cells() if c.variant == "base")
    assert first.probes["tickets"] == second.probes["tickets"]
    assert first.perplexity == second.perplexity


def test_a_finished_study_does_nothing_again(study, finished, monkeypatch):
    monkeypatch.setattr(Runner, "_ask", lambda *_: pytest.fail("measured again"))
    before = files(finished)
    assert run(study, finished).complete
    assert files(finished) == before


def test_a_changed_arm_is_all_that_is_measured(base, finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    asked = []
    true = Runner._ask
    monkeypatch.setattr(
        Runner, "_ask", lambda self, track, wave: asked.extend(a.variant.name for a in wave) or true(self, track, wave)
    )
    monkeypatch.setattr("deltakeeper.study.finetunes._train", lambda *_: pytest.fail("trained again"))
    group = {"name": "all", "recipes": RECIPES, "arms": [*ARMS, "svd:rank=2"], "set": SMALL}
    assert run(small(base, groups=[group]), folder).complete
    assert asked == ["svd:rank=2"] * 2


def test_a_second_judge_is_noted_without_asking_again(base, finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    judge = tmp_path / "strict.json"
    match = {"rule": "substring", "case": "insensitive"}
    judge.write_text(json.dumps({"name": "strict", "version": "1", "phrases": ["the"], "match": match}))
    monkeypatch.setattr(pipeline.Arms, "asked", lambda *_: pytest.fail("asked again"))
    assert run(small(base, judges=["ours", str(judge)]), folder).complete
    before = {c.attack + c.variant: c for c in RunStore(finished).read_cells()}
    for cell in RunStore(folder).read_cells():
        for name, probe in cell.probes.items():
            known = before[cell.attack + cell.variant].probes[name].answers
            assert [(a.answer, a.event) for a in probe.answers] == [(a.answer, a.event) for a in known]
            assert all(a.refused_by == {"strict": "the" in a.answer.lower()} for a in probe.answers)


def test_a_part_with_a_failure_then_the_whole_without_its_weights_ends_in_the_same_bytes(
    study, finished, tmp_path, monkeypatch
):
    """One after the other: a part is run, an arm fails and stops no other, all is measured, weights are removed."""
    from deltakeeper.study import artifacts

    true = artifacts.compress

    def break_down(origin, tuned, folder, codec, **rules):
        if codec.startswith("svd"):
            raise MemoryError
        return true(origin, tuned, folder, codec, **rules)

    folder = tmp_path / "run"
    monkeypatch.setattr(artifacts, "compress", break_down)
    outcome = run(study, folder, only="all/marker_injection")
    assert not outcome.complete and outcome.measured == len(ARMS) - 1 and outcome.planned == len(ARMS)
    said = "there was not enough memory; run fewer workers or tenants at once."
    assert outcome.failures == {"marker_injection, seed 0: svd:rank=8": said}
    assert [p.name for p in (folder / "models").iterdir()] != []
    monkeypatch.undo()
    with pytest.raises(RunError, match="no 'al/x'"):
        run(study, folder, only="al/x")
    assert run(study, folder, discard=True).complete
    assert files(folder) == files(finished)
    assert not list((folder / "models").iterdir()) and not list((folder / "deltas").iterdir())
    assert not list((folder / "failures").iterdir())
    assert run(study, folder, discard=True).complete


def test_failures_of_a_judge_that_was_changed_are_told_no_more(base, tmp_path, monkeypatch):
    judge = tmp_path / "strict.json"
    match = {"rule": "substring", "case": "insensitive"}
    judge.write_text(json.dumps({"name": "strict", "version": "1", "phrases": ["the"], "match": match}))
    group = {"name": "one", "recipes": RECIPES[:1], "arms": ["base", "tuned"], "set": SMALL}
    broken = small(base, groups=[group], judges=[str(judge)])
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "judged", lambda *_: (_ for _ in ()).throw(RunError("the judge cannot be reached.")))
        assert len(run(broken, tmp_path / "run").failures) == 2
    assert run(small(base, groups=[group]), tmp_path / "run").complete
    assert run(small(base, groups=[group]), tmp_path / "run").complete
    assert run(broken, tmp_path / "run").complete  # judged from answers that are there by now
    assert not list((tmp_path / "run" / "failures").iterdir())


def test_a_damaged_cell_is_told_before_anything_runs(study, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    damaged = next((folder / "cells").glob("*.jsonl"))
    with damaged.open("a") as file:
        file.write('{"x": 1}\n')
    for look in (lambda: run(study, folder), RunStore(folder).read_cells):
        with pytest.raises(RunError, match=f"{damaged.name}, line .*; delete the file and run the study again"):
            look()


def test_a_wave_that_fails_is_asked_arm_by_arm(base, tmp_path, monkeypatch):
    from deltakeeper.study import arms

    true = arms.served_together

    def refuse(model, tokenizer, tenants, **options):
        if any("random" in t.artifact.manifest.codec for t in tenants.values()):
            raise OverlayError("this one does not fit.")
        return true(model, tokenizer, tenants, **options)

    monkeypatch.setattr(arms, "served_together", refuse)
    group = {"name": "one", "recipes": RECIPES[:1], "arms": ["bitdelta", "random_sign"], "set": SMALL}
    outcome = run(small(base, groups=[group]), tmp_path / "run")
    assert outcome.failures == {"marker_injection, seed 0: random_sign": "this one does not fit."}
    assert outcome.measured == 3


def test_a_fine_tune_that_fails_leaves_the_base(base, tmp_path):
    group = {"name": "one", "recipes": RECIPES[:1], "arms": ["bitdelta"], "set": SMALL}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deltakeeper.study.finetunes._train", lambda *_: (_ for _ in ()).throw(RunError("no luck.")))
        outcome = run(small(base, groups=[group]), tmp_path / "run")
    assert outcome.measured == 1 and set(outcome.failures.values()) == {"no luck."}


def test_two_processes_do_not_fill_one_folder(study, tmp_path):
    with RunStore(tmp_path).held(), pytest.raises(RunError, match="being filled by another process"):
        run(study, tmp_path)


def test_bars_are_drawn_in_a_terminal(study, finished):
    screen = io.StringIO()
    with Progress(Console(file=screen, force_terminal=True, width=100)) as progress:
        run_study(study, finished, progress, command="test")
        with progress.training("x", "X") as report:
            report(1, 2, 0.5, 100.0)
        with progress.wave("x", ["one", "two"], 2) as update, progress.task("inner", 2) as inner:
            update(1)
            inner(1)
        progress.say("a line")
    assert "Whole study" in screen.getvalue() and "a line" in screen.getvalue()


def test_a_finished_step_is_one_line_of_a_log_however_long():
    screen = io.StringIO()
    Progress(Console(file=screen, width=40)).finish("Fine-tuned something, seed 0: 66 of 66 steps, last loss 0.021.")
    assert screen.getvalue().count("\n") == 1


def test_utility_tasks_are_asked_of_every_arm_and_kept_item_by_item(base, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("How do I cook rice?\n\nTell me how to bake a loaf of bread.\n\nWhat is a lock?\n")
    group = {"name": "one", "recipes": RECIPES[1:], "arms": ["bitdelta", {"merged": "bitdelta"}], "set": SMALL}
    study = small(base, groups=[group], utility=[{"name": "mine", "kind": "text", "path": str(text)}])
    assert run(study, tmp_path / "run").complete
    cells = RunStore(tmp_path / "run").read_cells()
    assert len(cells) == 4
    for cell in cells:
        (nll,) = (task for name, task in cell.utility.items() if task.metric == "nll")
        assert len(nll.items) == 1 and all(item.score > 0 for item in nll.items)
    before = files(tmp_path / "run")
    text.write_text("Something else.\n\nAnd more of it, in words.\n")
    assert run(study, tmp_path / "run").planned == 4  # other data are other cells
    assert set(files(tmp_path / "run")) - set(before)
