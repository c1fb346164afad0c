import json

import pytest
from synthetic_cells import cell, run_info, simple

from deltakeeper.errors import RunError
from deltakeeper.study import store as store_module
from deltakeeper.study.cells import Cell, RunInfo
from deltakeeper.study.store import RunStore, write_atomically


def as_json(value):
    return json.loads(json.dumps(value.to_json()))


def test_cells_come_back_as_they_were_stored(tmp_path):
    store = RunStore(tmp_path / "run")
    cells = simple()
    for one in cells:
        assert not store.has_cell(one.attack, one.variant)
        store.write_cell(one)
        assert store.has_cell(one.attack, one.variant)
    assert store.read_cells() == tuple(sorted(cells, key=lambda one: one.variant))


def test_run_info_comes_back_as_it_was_stored(tmp_path):
    store = RunStore(tmp_path)
    store.write_run(run_info())
    assert store.read_run() == run_info()


def test_a_lone_surrogate_from_a_model_survives(tmp_path):
    one = as_json(cell(goal=0.5, skill=0.5))
    one["probes"]["goal"]["answers"][0]["answer"] = "half a pair: \ud83d"
    store = RunStore(tmp_path)
    store.write_cell(Cell.from_json(one))
    assert store.read_cells()[0].probes["goal"].answers[0].answer == "half a pair: \ud83d"


def test_cells_are_named_by_their_content(tmp_path):
    store = RunStore(tmp_path)
    path = store.write_cell(cell(variant="bitdelta:bits=1", kind="codec", goal=0.5, skill=0.5))
    assert path.parent == tmp_path / "cells" and path.suffix == ".jsonl"
    assert store.write_cell(cell(variant="bitdelta:bits=1", kind="codec", goal=0.5, skill=0.5)) == path
    assert store.write_cell(cell(variant="bitdelta:bits=2", kind="codec", goal=0.5, skill=0.5)) != path
    assert store.model_dir("x").relative_to(tmp_path).as_posix() == "models/x"


@pytest.mark.parametrize("attack", ["", "..", "a/b", "A", ".hidden"])
def test_an_attack_name_that_is_no_folder_name_is_refused(tmp_path, attack):
    with pytest.raises(RunError, match="cannot name a folder"):
        RunStore(tmp_path).model_dir(attack)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_atomically(path, "old")

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(store_module.Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unfinished_cell_is_not_read(tmp_path):
    store = RunStore(tmp_path)
    path = store.write_cell(cell(goal=0.5, skill=0.5))
    store.write_cell(cell(variant="base", kind="base", goal=0.5, skill=0.5))
    path.write_bytes(path.read_bytes()[:-20])
    assert not store.has_cell("affirmative_prefix", "tuned")
    assert [one.variant for one in store.read_cells()] == ["base"]


def test_a_cell_under_another_name_is_refused(tmp_path):
    store = RunStore(tmp_path)
    path = store.write_cell(cell(goal=0.5, skill=0.5))
    path.rename(path.with_name("0123456789abcdef.jsonl"))
    store.write_index([{**store.read_index()[0], "key": "0123456789abcdef"}])
    with pytest.raises(RunError, match="holds the cell"):
        store.read_cells()


def test_an_empty_folder_says_what_to_do(tmp_path):
    with pytest.raises(RunError, match="run a study into it first"):
        RunStore(tmp_path).read_cells()
    with pytest.raises(RunError, match=r"run\.json does not exist"):
        RunStore(tmp_path).read_run()


def test_broken_json_names_the_file(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json cannot be read as JSON"):
        RunStore(tmp_path).read_run()


def _change(path, value):
    def change(data):
        *parents, last = path
        for key in parents:
            data = data[key]
        data[last] = value

    return change


def _second_goal(data):
    data["probes"]["again"] = data["probes"]["goal"]


def _same_id(data):
    answers = data["probes"]["goal"]["answers"]
    answers[1]["id"] = answers[0]["id"]


def _no_skill(data):
    del data["probes"]["skill"]


def _no_label(data):
    del data["label"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_change(["version"], 3), "version 3"),
        (_change(["version"], True), "version True"),
        (_change(["kind"], "other"), "'kind' is 'other' where one of base"),
        (_change(["extra"], 1), "unknown field 'extra'"),
        (_change(["full_bytes"], -1), "'full_bytes' is -1"),
        (_change(["seconds"], "fast"), "'seconds' is 'fast'"),
        (_change(["perplexity"], []), "where an object is expected"),
        (_change(["perplexity", "tokens"], [1]), "as many 'nll' as 'tokens'"),
        (_change(["probes", "goal", "answers"], []), "has no answers"),
        (_change(["probes", "goal", "answers", 3, "event"], 1), r"answers\[3\]: 'event' is 1"),
        (_change(["probes", "goal", "answers", 3, "outcome"], "fine"), "'outcome' is 'fine'"),
        (_no_label, "lacks the field 'label'"),
        (_second_goal, "2 probes of role 'goal'"),
        (_no_skill, "0 probes of role 'skill'"),
        (_same_id, "twice"),
    ],
)
def test_a_malformed_cell_is_refused_with_the_place(spoil, says):
    data = as_json(cell(goal=0.5, skill=0.5))
    spoil(data)
    with pytest.raises(RunError, match=says) as error:
        Cell.from_json(data, "here")
    assert "here" in str(error.value)


def test_malformed_run_info_is_refused():
    data = as_json(run_info())
    data["hardware"] = {"cpu": {"cores": 2}}
    with pytest.raises(RunError, match="'hardware' is an object where an object of plain values"):
        RunInfo.from_json(data)


def test_a_number_json_has_no_word_for_is_refused(tmp_path):
    with pytest.raises(RunError, match="cannot be written as JSON"):
        RunStore(tmp_path).write_run(run_info(stages={"fine-tune": float("nan")}))
