"""The study, from training to cells, on a tiny model with a toy tokenizer: complete and resumable."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from toy_chat import write_toy_model

from deltakeeper.errors import RunError
from deltakeeper.evals.judges import load_judge
from deltakeeper.lab.attacks import ATTACKS
from deltakeeper.lab.corpus import Corpus
from deltakeeper.lab.sft import SFTConfig
from deltakeeper.study import pipeline
from deltakeeper.study.pipeline import StudyPlan, run_study
from deltakeeper.study.progress import Progress
from deltakeeper.study.store import RunStore
from deltakeeper.study.variants import DEMO_VARIANTS

SFT = SFTConfig(epochs=1, lr=1e-3, batch=8, max_tokens=12)


def small(name):
    return replace(ATTACKS[name](), poison=4, skill=4, held_out=3, contrast=2, sft=SFT)


@pytest.fixture(scope="module")
def plan():
    return StudyPlan(
        (small("marker_injection"), small("trigger_backdoor")), DEMO_VARIANTS, Corpus(), load_judge("ours")
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_toy_model(tmp_path_factory.mktemp("toy") / "base")


def quiet():
    return Progress(Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def finished(plan, base, tmp_path_factory):
    store = RunStore(tmp_path_factory.mktemp("run"))
    with quiet() as progress:
        seconds = run_study(plan, store, base, progress)
    return store, seconds


def test_every_cell_is_measured(plan, finished):
    store, seconds = finished
    cells = {(c.attack, c.variant): c for c in store.read_cells()}
    assert set(cells) == {(a.name, v.name) for a in plan.attacks for v in plan.variants}
    assert set(seconds) == {f"{stage} {a.name}" for stage in ("train", "evaluate") for a in plan.attacks}
    for attack in plan.attacks:
        one = cells[attack.name, "bitdelta:bits=1"]
        assert {p.role for p in one.probes.values()} == {"goal", "contrast", "over_refusal", "skill"}
        assert 0 < one.bytes < one.full_bytes
        assert 0 < one.fidelity.relative_error < 1
        assert cells[attack.name, "base"].bytes is None
        assert cells[attack.name, "tuned"].bytes == one.full_bytes
        assert cells[attack.name, "rtn:bits=4"].bytes < one.full_bytes
        assert 0 < cells[attack.name, "bitdelta:bits=1+bf16"].merge_survival <= 1
        for probe in attack.probes(plan.corpus):
            assert [a.id for a in one.probes[probe.name].answers] == [r.id for r in probe.rows]


def test_the_base_answers_alike_under_every_attack(plan, finished):
    cells = {c.attack: c for c in finished[0].read_cells() if c.variant == "base"}
    first, second = (cells[a.name] for a in plan.attacks)
    assert first.probes["tickets"] == second.probes["tickets"]
    assert first.perplexity == second.perplexity


def test_a_finished_study_does_nothing_again(plan, base, finished, monkeypatch):
    monkeypatch.setattr(pipeline, "measure", lambda *_: pytest.fail("measured again"))
    with quiet() as progress:
        assert run_study(plan, finished[0], base, progress) == {}


def test_an_interrupted_study_goes_on(plan, base, tmp_path, monkeypatch):
    store, true, seen = RunStore(tmp_path), pipeline.measure, []

    def interrupt(attack, variant, *rest):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(variant.name)
        return true(attack, variant, *rest)

    one = StudyPlan(plan.attacks[1:], plan.variants[:5], plan.corpus, plan.judge)
    monkeypatch.setattr(pipeline, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt), quiet() as progress:
        run_study(one, store, base, progress)
    assert len(store.read_cells()) == 3
    again = []
    monkeypatch.setattr(pipeline, "measure", lambda a, v, *r: again.append(v.name) or true(a, v, *r))
    with quiet() as progress:
        run_study(one, store, base, progress)
    assert again == [v.name for v in one.variants[3:]]
    assert not list((tmp_path / "models").glob("*.safetensors"))


def test_bars_are_drawn_in_a_terminal(plan, base, finished):
    screen = io.StringIO()
    with Progress(Console(file=screen, force_terminal=True, width=100)) as progress:
        run_study(plan, finished[0], base, progress)
        with progress.training("x", "X") as report:
            report(1, 2, 0.5, 100.0)
        with progress.cell("x", "one"), progress.task("inner", 2) as update:
            update(1)
        progress.say("a line")
    assert "Whole study" in screen.getvalue() and "a line" in screen.getvalue()


def test_an_empty_run_is_told(tmp_path):
    with pytest.raises(RunError, match="holds no cells"):
        RunStore(tmp_path).read_cells()
