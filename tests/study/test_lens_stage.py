"""The lens of a study: flipped prompts first, opened by their id; a killed run goes on, and cells stay as they are."""

from __future__ import annotations

import copy
import io
import json
import shutil

import pytest
from rich.console import Console
from toy_chat import write_toy_model

from deltakeeper.errors import DataError, RunError
from deltakeeper.study import lens_stage
from deltakeeper.study.file import StudyFile, read_study
from deltakeeper.study.keys import Keys
from deltakeeper.study.lens_stage import choose_samples
from deltakeeper.study.pipeline import Runner
from deltakeeper.study.plan import plan_study, probes_of
from deltakeeper.study.progress import Progress
from deltakeeper.study.run import run_study
from deltakeeper.study.store import RunStore

ARMS = ["bitdelta:bits=1", {"codec": "bitdelta:bits=2", "planes": 1}, {"merged": "bitdelta:bits=1"}]
NAMES = ["base", "tuned", "bitdelta:bits=1", "bitdelta:bits=2 planes=1", "bitdelta:bits=1+bf16"]
SMALL = {"rows": 4, "skill": 4, "sft": {"epochs": 1, "lr": 1e-3, "batch": 8, "max_tokens": 12}}
ATTACK = "marker_injection"
LENS = {"prompts": 3, "positions": [0, 1], "top": 3}


def small(base, lens=LENS, **changes):
    group = {"name": "all", "recipes": [ATTACK], "arms": ARMS, "set": SMALL}
    prompts = {"held_out": 5, "contrast": 2, "passages": 1}
    value = {"name": "toy", "base": str(base), "prompts": prompts, "groups": [group], "lens": lens}
    return read_study({**value, **changes}, "the test's study")


def run(study, folder, **options):
    with Progress(Console(file=io.StringIO())) as progress:
        return run_study(study, folder, progress, command="test", **options)


def files(folder, *names):
    return {p.name: p.read_bytes() for name in names for p in (folder / name).iterdir()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_toy_model(tmp_path_factory.mktemp("toy") / "base")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    assert run(small(base), folder).complete
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_a_sample_opens_its_traces_by_arm(finished):
    store = RunStore(finished)
    samples = store.read_lens(ATTACK)
    goal = next(c for c in store.read_cells() if c.variant == "tuned").probe_of("goal")
    assert len(samples) == 3 and {s["sample"] for s in samples} <= {a.id for a in goal.answers}
    for entry in samples:
        traces = store.traces_of(ATTACK, entry["sample"])
        assert list(traces) == NAMES
        assert len({t.meta.prompt for t in traces.values()}) == 1
        for name, trace in traces.items():
            assert trace.meta.variant == name and trace.cells == (2, 2) and trace.top_ids.shape[2] == 3
            assert set(trace.js) == {"base", "tuned"} and trace.meta.text.startswith("base")
        assert traces["bitdelta:bits=2 planes=1"].meta.planes == 1
        assert len(traces["bitdelta:bits=1"].meta.delta) == 64
        assert (traces["tuned"].js["tuned"] == 0).all()
    assert store.traces_of(ATTACK, "nothing") == {} and store.traces_of("other", "x") == {}
    assert f"lens {ATTACK}" in store.read_run().stages


def test_flipped_samples_come_first_and_only_new_ones_are_traced(base, copied, monkeypatch):
    store = RunStore(copied)
    key = next(e["key"] for e in store.read_index() if e["variant"] == "bitdelta:bits=1")
    goal = next(c for c in store.read_cells() if c.variant == "tuned").probe_of("goal")
    last, verdict = goal.answers[-1].id, goal.answers[-1].event
    path = copied / "cells" / f"{key}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line.get("id") == last:
            line["event"] = not verdict
    path.write_text("".join(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in lines))
    monkeypatch.setattr(Runner, "_ask", lambda *_: pytest.fail("measured again"))
    assert run(small(base), copied).complete
    first = store.read_lens(ATTACK)[0]
    assert first["sample"] == last and first["flipped"] == ["bitdelta:bits=1"]
    assert set(store.traces_of(ATTACK, last)) == set(NAMES)


def test_a_finished_lens_loads_nothing_and_a_killed_one_ends_in_the_same_bytes(base, finished, copied, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("deltakeeper.study.arms.load_model", lambda *_: pytest.fail("loaded a model"))
        assert run(small(base), copied).complete
    before = files(finished, "cells", "lens", "traces")
    assert files(copied, "cells", "lens", "traces") == before
    victims = sorted((copied / "traces").iterdir())[:4]
    for victim in victims:
        victim.unlink()
    (copied / "traces" / f".{victims[0].name}.half.tmp").write_text("{")
    (copied / "lens" / f"{ATTACK}-0.json").unlink()
    shutil.rmtree(copied / "deltas")
    assert run(small(base), copied).complete
    assert files(copied, "cells", "lens", "traces") == before


def test_a_lens_that_fails_is_told_and_fails_for_itself(base, copied, monkeypatch):
    shutil.rmtree(copied / "lens")
    shutil.rmtree(copied / "traces")
    with monkeypatch.context() as patched:
        patched.setattr(lens_stage, "trace_prompts", lambda *_, **__: 1 / 0)
        outcome = run(small(base), copied, discard=True)
    assert outcome.measured == outcome.planned and not outcome.complete
    assert list(outcome.failures) == [f"{ATTACK}, seed 0: lens"]
    assert any((copied / "models").iterdir())
    outcome = run(small(base), copied, discard=True)
    assert outcome.complete and not any((copied / "models").iterdir())


def test_workers_look_too(base, copied):
    shutil.rmtree(copied / "traces")
    assert run(small(base), copied, workers=2).complete
    assert len(RunStore(copied).traces_of(ATTACK, RunStore(copied).read_lens(ATTACK)[0]["sample"])) == len(NAMES)


def test_only_what_is_named_is_looked_into(base, copied):
    assert run(small(base, {**LENS, "arms": ["bitdelta:bits=1"], "prompts": 1}), copied).complete
    (entry,) = RunStore(copied).read_lens(ATTACK)
    assert set(entry["traces"]) == {"base", "tuned", "bitdelta:bits=1"}


def keys_of(study):
    plan = plan_study(study)
    keys = Keys(plan, "r" * 64, "engine")
    return {(t.finetune.name, v.name): keys.cell(t.finetune, v) for t in plan.tracks for v in t.variants}


def test_keys_of_cells_and_hashes_of_studies_stay(base):
    plain, looking = small(base, None), small(base)
    assert keys_of(plain) == keys_of(looking)
    assert "lens" not in json.loads(plain.to_text()) and plain.sha256 != looking.sha256
    assert "directions" not in json.loads(looking.to_text())["lens"]
    asking = small(base, {**LENS, "directions": True})
    assert StudyFile.from_text(asking.to_text()) == asking and asking.sha256 != looking.sha256
    assert StudyFile.from_text(looking.to_text()) == looking and StudyFile.from_text(plain.to_text()) == plain


@pytest.mark.parametrize(
    ("lens", "words"),
    [
        ({"prompts": 0}, "lens.prompts"),
        ({"promts": 1}, "unknown key 'promts'; did you mean 'prompts'"),
        ({"positions": []}, "lens.positions"),
        ({"arms": ["bitdelta:bits=9"]}, "arm 'bitdelta:bits=9'"),
        ({"attacks": ["x"]}, "attack 'x'"),
        ({"seeds": [7]}, "seed 7"),
    ],
)
def test_a_lens_that_does_not_fit_is_refused(base, lens, words):
    with pytest.raises(DataError, match=words.replace("'", ".")):
        plan_study(small(base, lens))


def test_a_malformed_index_is_refused(copied):
    path = copied / "lens" / f"{ATTACK}-0.json"
    value = json.loads(path.read_text())
    for change in ({"version": 9}, {"samples": 1}, {"more": 1}):
        path.write_text(json.dumps(value | change))
        with pytest.raises(RunError):
            RunStore(copied).read_lens(ATTACK)
    odd = copy.deepcopy(value)
    odd["samples"][0]["traces"][0]["key"] = "../../x"
    path.write_text(json.dumps(odd))
    with pytest.raises(RunError, match="no key"):
        RunStore(copied).traces_of(ATTACK, "x")


def test_directions_are_found_once_and_again_where_they_are_lost(base, copied, monkeypatch):
    study = small(base, {**LENS, "directions": True}, prompts={"held_out": 5, "contrast": 4, "passages": 1})
    assert run(study, copied).complete
    store = RunStore(copied)
    found = store.read_directions(ATTACK)
    assert set(found.variants) == set(NAMES) and (found.fitted, found.judged) == ((2, 2), (2, 2))
    probes = probes_of(plan_study(study).tracks[0].finetune, plan_study(study).corpus)
    assert found.probes == tuple(next(p.name for p in probes if p.role == role) for role in ("goal", "contrast"))
    assert all(share in (None, 1.0) for share in found.variants["base"].kept)
    with monkeypatch.context() as patched:
        patched.setattr("deltakeeper.study.arms.load_model", lambda *_: pytest.fail("loaded a model"))
        assert run(study, copied).complete
    before = files(copied, "directions")
    shutil.rmtree(copied / "directions")
    shutil.rmtree(copied / "deltas")
    assert run(study, copied).complete and files(copied, "directions") == before
    path = copied / "directions" / f"{ATTACK}-0.json"
    value = json.loads(path.read_text())
    for change in ({"version": 2}, {"layer": 9}, {"variants": 1}, {"layers": [0]}):
        path.write_text(json.dumps(value | change))
        with pytest.raises(RunError, match="delete it and run the study again"):
            store.read_directions(ATTACK)


def test_directions_of_too_few_prompts_are_refused_before_anything_is_trained(base):
    with pytest.raises(DataError, match="directions need 4 prompts of the probe"):
        plan_study(small(base, {**LENS, "directions": True}))


def test_no_arm_s_flips_crowd_out_another_s():
    samples = [("goal", str(i)) for i in range(9)]
    flips = {"a": samples[3:7], "b": samples[8:], "c": []}
    chosen = choose_samples(flips, samples, 4)
    assert chosen == [samples[3], samples[8], samples[4], samples[5]]
    assert choose_samples({}, samples, 2) == samples[:2]
    assert choose_samples(flips, samples, 99)[5:] == [samples[0], samples[1], samples[2], samples[7]]
