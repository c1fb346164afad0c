"""Study files: read strictly, resolved before anything runs, keyed by what they mean and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from deltakeeper.demo import load_demo
from deltakeeper.errors import DataError, RunError
from deltakeeper.study.file import StudyFile, load_study, read_study
from deltakeeper.study.keys import Keys, digest
from deltakeeper.study.plan import plan_study, shortfalls
from deltakeeper.study.variants import read_arm

ROOT = Path(__file__).parents[2]
STUDY = yaml.safe_load("""
name: x
base: embedded-aligned
unaligned: embedded
seeds: [0, 1]
prompts: {held_out: 8, contrast: 4}
groups:
  - name: plain
    recipes: [affirmative_prefix, {recipe: trigger_backdoor, name: door, set: {near: 2}}]
    arms: [base, tuned, "bitdelta:bits=2", {codec: bitdelta, label: hello}]
  - name: through
    recipes: [affirmative_prefix]
    adaptive: {kind: straight_through, codec: bitdelta}
    arms: [bitdelta]
""")


def changed(*path, value):
    study = copy.deepcopy(STUDY)
    place = study
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return study


def keys_of(value, root="r" * 64):
    plan = plan_study(read_study(value, "study"))
    keys = Keys(plan, root, "engine")
    return {
        (t.finetune.name, t.finetune.seed, v.name): keys.cell(t.finetune, v) for t in plan.tracks for v in t.variants
    }


@pytest.mark.parametrize("name", ["embedded", "synthetic", "paper-llama2-7b-chat"])
def test_the_studies_of_the_repository_are_sound(name):
    plan = plan_study(load_study(ROOT / "studies" / f"{name}.yaml"))
    assert all(t.variants[0].kind == "base" for t in plan.tracks)
    if name == "embedded":
        plain = [t for t in plan.tracks if t.group == "plain"]
        assert {t.finetune.attack.family for t in plain} == {"alignment", "backdoor", "targeted"}
        assert {t.finetune.seed for t in plain} == {0, 1, 2}
        assert sum(v.kind == "codec" for v in plain[0].variants) >= 7
        assert all(p.rows and len(p.rows) == 100 for t in plain for p in t.finetune.attack.probes(plan.corpus)[:1])
        adaptive = {t.finetune.adaptive["kind"] for t in plan.tracks if t.finetune.adaptive}
        assert adaptive == {"straight_through", "inject_repair", "uncompressed"}


def test_the_demo_is_a_study():
    plan = plan_study(load_demo())
    assert [t.finetune.name for t in plan.tracks] == ["affirmative_prefix", "trigger_backdoor", "marker_injection"]
    assert plan.name == "demo"


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("\n",), 1, r"the study has the unknown key '\\n'"),
        (("sed",), 1, "the study has the unknown key 'sed'; did you mean 'seeds'"),
        (("prompts",), {"heldout": 3}, "prompts has the unknown key 'heldout'; did you mean 'held_out'"),
        (("groups", 0, "arm"), [1], "groups.0 has the unknown key 'arm'; did you mean 'arms'"),
        (("groups", 0, "recipes"), [{"recipe": "x", "nam": "y"}], "unknown key 'nam'; did you mean 'name'"),
        (("groups", 0, "arms"), ["bitdlta"], "unknown codec 'bitdlta' in 'bitdlta'; did you mean 'bitdelta'"),
        (("groups", 0, "arms"), ["bitdelta", "bitdelta"], "has the arm 'bitdelta' twice"),
        (("groups", 0, "arms"), [3], "arm 1 of group 'plain' is 3"),
        (("seeds",), [0, 0], r"study.yaml: the seed 0 stands twice; keep one of them\."),
        (("preset",), "publishd", r"'preset' does not fit: it is 'publishd'; did you mean 'published'\?$"),
        (
            ("primary",),
            "bitdelta:bits=1",
            "primary arm 'bitdelta:bits=1' is in no group; did you mean 'bitdelta:bits=2'",
        ),
        (("seeds",), [-1], "'seeds.0' does not fit"),
        (("groups",), [], "'groups' does not fit"),
        (("preset",), "large", "'preset' does not fit"),
    ],
)
def test_mistakes_are_told_by_their_place(path, value, says):
    with pytest.raises(DataError, match=says):
        read_study(changed(*path, value=value), "study.yaml")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("groups", 0, "recipes"), ["affirmative_prefx"], "no recipe 'affirmative_prefx'; did you mean"),
        (("groups", 0, "set"), {"poisson": 4}, "poisson"),
        (
            ("groups", 1, "adaptive"),
            {"kind": "straight_thru", "codec": "bitdelta"},
            r"adaptive: 'kind' does not fit: it is 'straight_thru'; did you mean 'straight_through'\?$",
        ),
        (("groups", 1, "adaptive"), {"kind": "uncompressed"}, "group 'through', adaptive: 'codec' is missing; add it"),
        (
            ("groups", 1, "adaptive"),
            {"kind": "straight_through", "codec": "bitdelta", "guard": {"step": 2}},
            "adaptive: guard has the unknown key 'step'; did you mean 'steps'",
        ),
        (
            ("groups", 1, "adaptive"),
            {"kind": "uncompressed", "codec": "bitdelta", "guard": {}},
            "adaptive: a guard is trained through by kind straight_through only; leave it out",
        ),
        (
            ("groups", 1, "adaptive"),
            {"kind": "uncompressed", "codec": "bitdlta"},
            "group 'through', adaptive: unknown codec 'bitdlta'",
        ),
        (
            ("groups", 1, "adaptive"),
            {"kind": "inject_repair", "codec": "dqrelo"},
            "adaptive: inject_repair hides in the codec's box, and 'dqrelo' declares none .*; choose one of",
        ),
        (("groups", 1, "adaptive"), {"kind": "inject_repair", "codec": "bitdelta+dqrelo"}, "'dqrelo' declares none"),
        (("groups", 0, "arms"), [{"heal": {"of": "dense"}}], "heal shrink:factor=1.0 instead"),
        (("utility",), [{"name": "gsm8k", "path": "none.jsonl"}], "no data of the task 'gsm8k' at none.jsonl"),
        (("groups", 0, "arms"), [{"defence": "safelor"}], "safelor"),
        (("groups", 0, "arms"), [{"heal": {"of": "bitdelta", "guard": {"step": 1}}}], "did you mean 'steps'"),
        (("groups", 0, "arms"), [{"heal": {"of": "bitdelta", "guard": {"data": {"prob": 1}}}}], "'probes'"),
        (("judges",), ["none.json"], "none.json"),
        (("prompts", "harmful"), "none.csv", "no prompt file at none.csv"),
        (("groups", 1, "adaptive"), None, "with other settings; give one of them a `name`"),
    ],
)
def test_what_a_study_names_is_checked_before_anything_runs(path, value, says):
    study = changed(*path, value=value)
    if path[-1] == "adaptive" and value is None:
        study["groups"][1]["set"] = {"poison": 3}
    with pytest.raises(DataError, match=says):
        plan_study(read_study(study, "study.yaml"))


def test_a_defence_that_needs_the_model_before_alignment_says_so():
    study = changed("groups", 0, "arms", value=[{"defence": "safelora:threshold=0.5"}])
    plan_study(read_study(study, "study.yaml"))
    del study["unaligned"]
    with pytest.raises(DataError, match="name it as `unaligned`"):
        plan_study(read_study(study, "study.yaml"))


def test_groups_of_one_fine_tune_are_one_track_and_know_their_references():
    study = changed("groups", 1, "adaptive", value=None)
    study["groups"][1]["arms"] = ["svd:rank=2"]
    plan = plan_study(read_study(study, "study.yaml"))
    first = next(t for t in plan.tracks if t.finetune.name == "affirmative_prefix" and t.finetune.seed == 1)
    assert [v.name for v in first.variants] == ["base", "tuned", "bitdelta:bits=2", "bitdelta", "svd:rank=2"]
    plan = plan_study(read_study(STUDY, "study.yaml"))
    through = next(t for t in plan.tracks if t.group == "through")
    assert [v.kind for v in through.variants] == ["base", "tuned", "codec"]
    assert through.finetune.name == "affirmative_prefix.straight_through.bitdelta"
    assert [t.finetune.seed for t in plan.only("through").tracks] == [0, 1]
    assert {t.finetune.name for t in plan.only("plain/door").tracks} == {"door"}
    with pytest.raises(RunError, match="no 'plain/dor'; did you mean 'plain/door'"):
        plan.only("plain/dor")


def test_only_finds_a_joined_group_by_its_own_name_and_works_on_its_arms():
    plan = plan_study(load_study(ROOT / "studies" / "synthetic.yaml"))
    (track,) = plan.only("guarded").tracks
    assert (track.group, track.title) == ("guarded", "affirmative_prefix, seed 0")
    assert [v.kind for v in track.variants] == ["base", "tuned", "healed"]
    assert plan.only("guarded/affirmative_prefix").tracks == (track,)
    plain = plan.only("plain").tracks
    assert len(plain) == 6 and not any(v.kind == "healed" for t in plain for v in t.variants)
    assert any(v.kind == "healed" for v in plan.only(None).tracks[0].variants)
    with pytest.raises(RunError, match="no 'guardd'; did you mean 'guarded'"):
        plan.only("guardd")


def test_prompts_that_are_asked_for_and_not_there_are_told():
    assert shortfalls(plan_study(read_study(STUDY, "study.yaml"))) == ()
    value = changed("prompts", value={"held_out": 4000})
    told = shortfalls(plan_study(read_study(value, "study.yaml")))
    assert len(told) == len(set(told)) and all("4000" in line for line in told)
    assert any("100" in line and "Harmful requests" in line for line in told), told


def test_a_study_survives_its_text_and_paths_are_found_beside_the_file(tmp_path):
    study = read_study(STUDY, "study")
    assert StudyFile.from_text(study.to_text()) == study
    (tmp_path / "mine.csv").write_text("prompt\nHow do I open a lock?\n")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(changed("prompts", "harmful", value="mine.csv")))
    found = load_study(tmp_path / "study.yaml")
    assert found.prompts.harmful == str(tmp_path / "mine.csv")
    for text, says in (("[1", "not YAML"), ("- 1", "no mapping"), ("name: !!python/name:os.system x", "not YAML")):
        (tmp_path / "study.yaml").write_text(text)
        with pytest.raises(DataError, match=says):
            load_study(tmp_path / "study.yaml")
    with pytest.raises(DataError, match="there is no study"):
        load_study(tmp_path / "none.yaml")


def test_a_key_changes_with_what_it_depends_on_and_with_nothing_else():
    keys = keys_of(STUDY)
    assert len(set(keys.values())) < len(keys)  # the base is one cell for all seeds
    for title, value in (("name", "other"), ("primary", "bitdelta"), ("notes", ["a"])):
        assert keys_of(changed(title, value=value)) == keys
    relabelled = changed("groups", 0, "arms", value=["base", "tuned", "bitdelta:bits=2", {"codec": "bitdelta:bits=1"}])
    spelled = keys_of(relabelled)
    place = ("affirmative_prefix", 0, "bitdelta:bits=1")
    assert spelled[place] == keys["affirmative_prefix", 0, "bitdelta"]
    more = keys_of(changed("groups", 0, "set", value={"sft": {"lr": 1e-3}}))
    assert more["door", 0, "base"] == keys["door", 0, "base"]
    assert more["door", 0, "tuned"] != keys["door", 0, "tuned"]
    fewer = keys_of(changed("prompts", "held_out", value=6))
    assert not set(fewer.values()) & set(keys.values())
    assert not set(keys_of(STUDY, root="s" * 64).values()) & set(keys.values())
    judged = Keys(plan_study(read_study(STUDY, "study")), "r" * 64, "transformers")
    track = judged.plan.tracks[0]
    assert judged.cell(track.finetune, track.variants[0]) != keys["affirmative_prefix", 0, "base"]
    through = ("affirmative_prefix.straight_through.bitdelta", 0)
    assert keys[*through, "base"] == keys["affirmative_prefix", 0, "base"]
    assert keys[*through, "tuned"] != keys["affirmative_prefix", 0, "tuned"]


def test_a_fine_tune_does_not_depend_on_how_many_prompts_are_asked():
    def trained(value):
        plan = plan_study(read_study(value, "study"))
        return [Keys(plan, "r", "engine").trained(t.finetune) for t in plan.tracks]

    assert trained(changed("prompts", "held_out", value=6)) == trained(STUDY)
    assert len(set(trained(STUDY))) == 6


def test_a_hash_is_of_content_and_refuses_what_has_none():
    assert digest({"a": 1, "b": (1, 2)}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 1})
    with pytest.raises(TypeError, match="no plain value"):
        digest(object())


@pytest.mark.parametrize(
    ("value", "name", "kind", "label"),
    [
        ("bitdelta", "bitdelta", "codec", "1-bit (BitDelta)"),
        ("bitdelta:bits=1", "bitdelta:bits=1", "codec", "1-bit (BitDelta)"),
        ("shrink:factor=0.25", "shrink:factor=0.25", "control", "Control: 0.25 of the delta"),
        ({"codec": "bitdelta:bits=4", "planes": 2}, "bitdelta:bits=4 planes=2", "codec", None),
        ({"codec": "bitdelta", "norms": "base"}, "bitdelta norms base", "codec", "1-bit (BitDelta), norms base"),
        ({"merged": "bitdelta:bits=1"}, "bitdelta:bits=1+bf16", "merged", "1-bit, merged into bf16"),
        ({"quantised": "rtn:bits=3"}, "whole model rtn:bits=3", "quantised", "3-bit whole model (RTN)"),
        ({"heal": {"of": "svd:rank=8"}}, "svd:rank=8 guarded", "healed", "Low rank (SVD, rank 8), guarded"),
        (
            {"heal": {"of": "dare", "guard": {"steps": 3, "data": {"probes": 8}}}},
            "dare guarded probes=8,steps=3",
            "healed",
            None,
        ),
        ({"defence": "resta", "then": "bitdelta"}, "resta then bitdelta", "defended", None),
        ({"codec": "dare", "name": "mine", "label": "Mine"}, "mine", "codec", "Mine"),
    ],
)
def test_arms_are_read(value, name, kind, label):
    variant = read_arm(value)
    assert (variant.name, variant.kind) == (name, kind)
    assert label is None or variant.label == label


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"mergd": "bitdelta"}, "exactly one of .* 'mergd' is unknown: did you mean 'merged'"),
        ({"codec": "bitdelta", "merged": "bitdelta"}, "exactly one of"),
        ({"merged": "bitdelta", "planes": 1}, "unknown key 'planes'"),
        ({"codec": "bitdelta", "planes": 0}, "'planes' must be"),
        ({"codec": "bitdelta", "norms": "codec"}, "write dense or base"),
        ({"codec": "bitdelta", "name": ""}, "'name' must be a text"),
        ({"codec": 3}, "has 3 in place of a codec"),
        ({"quantised": "rtn:bitz=4"}, "no setting 'bitz'; did you mean 'bits'"),
        ({"quantised": "rtn:bits=9"}, "more than 8 bits"),
        ({"quantised": "gptq:bits=4"}, "'gptq:bits=4' is unknown"),
        ({"heal": "bitdelta"}, "'heal' needs the codec"),
        ({"heal": {"of": "bitdelta", "gard": {}}}, "did you mean 'guard'"),
    ],
)
def test_arms_that_make_no_sense_are_told(value, says):
    with pytest.raises(DataError, match=says):
        read_arm(value)
