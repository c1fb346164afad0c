"""Reading prompt sets: packaged ones, the forms in which public benchmarks come, and what is refused."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.errors import DataError
from deltakeeper.evals import prompts
from deltakeeper.evals.prompts import Packaged, PromptRow, load_file, load_packaged, load_prompts

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: text.strip() != "")


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


def pairs(rows: list[PromptRow]) -> list[tuple[str, str]]:
    return [(row.prompt, row.category) for row in rows]


@pytest.mark.parametrize("name", get_args(Packaged))
def test_a_packaged_set_is_its_splits_together(name: Packaged) -> None:
    parts = {split: load_packaged(name, split) for split in ("train", "heldout", "heldout2")}
    rows = load_packaged(name)
    assert rows and sorted(rows, key=lambda r: r.id) == sorted(chain(*parts.values()), key=lambda r: r.id)
    assert all({row.split for row in part} <= {split} for split, part in parts.items())
    assert load_prompts(name) == rows


def test_an_unknown_packaged_set_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match="no packaged set 'jokes'; choose among harmful, instructions"):
        load_packaged("jokes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("harmbench.csv", "Behavior,FunctionalCategory,SemanticCategory\nDo x,standard,crime\n", ("Do x", "crime")),
        ("xstest.csv", "id,prompt,type,label\nv1,Kill a process?,homonyms,safe\n", ("Kill a process?", "homonyms")),
        ("strongreject.csv", 'category,source,forbidden_prompt\nfraud,us,"Do x,\ny"\n', ("Do x,\ny", "fraud")),
        ("advbench.csv", "goal,target\nDo x,Sure\n", ("Do x", "all")),
        ("commented.csv", "# made by hand\r\n# second line\r\nprompt,category\r\nDo x,a\r\n", ("Do x", "a")),
        ("bom.csv", "\ufeffprompt,category\nDo x,a\n", ("Do x", "a")),
        ("rows.jsonl", '{"instruction": "Do x", "category": "a"}\n\n', ("Do x", "a")),
        ("separator.jsonl", '{"prompt": "Do\u2028x"}', ("Do\u2028x", "all")),
        ("texts.json", '["Do x"]', ("Do x", "all")),
        ("objects.json", '[{"question": "Do x", "subject": "a"}]', ("Do x", "a")),
    ],
)
def test_common_forms_are_read(tmp_path: Path, name: str, text: str, expected: tuple[str, str]) -> None:
    assert pairs(load_file(written(tmp_path, name, text))) == [expected]


def test_one_bare_column_has_no_header(tmp_path: Path) -> None:
    path = written(tmp_path, "bare.csv", '# source: us\nDo x\n"Do y, then z"\n')
    assert [row.prompt for row in load_prompts(path)] == ["Do x", "Do y, then z"]


def test_named_columns_win_over_guessed_ones(tmp_path: Path) -> None:
    path = written(tmp_path, "own.csv", "prompt,Ask,topic\nno,yes,t\n")
    assert pairs(load_file(path, prompt_column="ask", category_column="topic")) == [("yes", "t")]


def test_a_single_named_column_is_a_header(tmp_path: Path) -> None:
    path = written(tmp_path, "single.csv", "Request\nDo x\n")
    assert [row.prompt for row in load_file(path, prompt_column="Request")] == ["Do x"]


def test_the_other_fields_of_a_row_are_kept(tmp_path: Path) -> None:
    record = {"id": "a-1", "category": "a", "split": "train", "prompt": "Do x", "twin": "See x", "answer": "Y"}
    path = written(tmp_path, "full.jsonl", json.dumps(record))
    assert load_file(path) == [PromptRow(**record)]


def test_ids_made_from_content_do_not_depend_on_order_or_form(tmp_path: Path) -> None:
    one = load_file(written(tmp_path, "one.csv", "prompt\nDo x\nDo y\n"))
    other = load_file(written(tmp_path, "other.json", '["Do y", "Do x"]'))
    assert {row.prompt: row.id for row in one} == {row.prompt: row.id for row in other}
    assert one[0].id == hashlib.sha256(b"Do x").hexdigest()[:12]


@given(texts=st.lists(TEXTS, min_size=1, max_size=5, unique=True))
def test_any_prompt_survives_csv_and_jsonl(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("prompts")
    table = io.StringIO(newline="")
    csv.writer(table, quoting=csv.QUOTE_ALL).writerows([["prompt", "category"], *([text, "a"] for text in texts)])
    lines = "\n".join(json.dumps({"prompt": text, "category": "a"}, ensure_ascii=False) for text in texts)
    expected = [(text.strip(), "a") for text in texts]
    assert pairs(load_file(written(folder, "x.csv", table.getvalue()))) == expected
    assert pairs(load_file(written(folder, "x.jsonl", lines))) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.csv", "", "holds no prompts"),
        ("only_header.csv", "prompt,category\n", "holds no prompts"),
        ("empty.jsonl", "\n\n", "holds no prompts"),
        ("empty.json", "[]", "holds no prompts"),
        ("columns.csv", "foo,bar\n1,2\n", r"has no prompt column \(one of prompt, .+\); it has: bar, foo\."),
        ("blank.csv", "# c\nprompt,category\nDo x,a\n ,a\n", "line 4, has an empty prompt"),
        ("short.csv", "category,prompt\na,Do x\na\n", "line 3, has an empty prompt"),
        ("null.jsonl", '{"prompt": "Do x"}\n{"prompt": null}\n', "line 2, has an empty prompt"),
        ("broken.jsonl", '{"prompt": "Do x"}\n{"prompt"\n', "line 2, is not JSON"),
        ("list.jsonl", '["Do x"]\n', "line 1, is not a JSON object"),
        ("object.json", '{"prompt": "Do x"}', "is not a JSON list"),
        ("number.json", "[1]", "item 1, is not a JSON object"),
        ("digits.json", "[" + "9" * 5000 + "]", "is not JSON"),
        ("field.csv", "prompt,category\n" + "x" * (csv.field_size_limit() + 1) + ",a\n", "line 2, is not CSV"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = written(tmp_path, name, text)
    with pytest.raises(DataError, match=message) as caught:
        load_file(path)
    assert str(path) in str(caught.value)


def test_a_missing_column_that_was_asked_for_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "x.csv", "prompt,topic\nDo x,t\n")
    with pytest.raises(DataError, match="no column 'ask'; it has: prompt, topic"):
        load_file(path, prompt_column="ask")
    with pytest.raises(DataError, match="no column 'kind'; it has: prompt, topic"):
        load_file(path, category_column="kind")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no prompt file at"):
        load_prompts(tmp_path / "none.csv")


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes("prompt,category\ncafé,a\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        load_file(path)


def test_the_hash_is_checked_whatever_its_case(tmp_path: Path) -> None:
    path = written(tmp_path, "x.csv", "prompt\nDo x\n")
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(load_file(path, sha256=right.upper())) == 1
    with pytest.raises(DataError, match=f"has sha256 {right}, not 00"):
        load_file(path, sha256="00")


def test_a_file_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "x.csv", "prompt\nDo x\n")
    monkeypatch.setattr(prompts, "MAX_BYTES", path.stat().st_size)
    assert len(load_file(path)) == 1
    monkeypatch.setattr(prompts, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(DataError, match="larger than"):
        load_file(path)


def stand_in(load_dataset: Any) -> ModuleType:
    module = ModuleType("datasets")
    vars(module)["load_dataset"] = load_dataset
    return module


def test_a_hub_set_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        calls.append((name, split))
        return [{"prompt": "Do x", "type": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", stand_in(load_dataset))
    assert pairs(load_prompts("hf:org/set:train")) == [("Do x", "a")]
    load_prompts("hf:org/set")
    assert calls == [("org/set", "train"), ("org/set", "test")]


def test_a_hub_set_that_does_not_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> None:
        raise ValueError(f"unknown split {split} of {name}")

    monkeypatch.setitem(sys.modules, "datasets", stand_in(load_dataset))
    with pytest.raises(DataError, match=r"hf:org/set:x cannot be loaded \(unknown split x of org/set\)"):
        load_prompts("hf:org/set:x")


def test_a_hub_set_without_datasets_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load_prompts("hf:org/set:test")


def test_a_prompt_or_id_that_comes_twice_is_refused(tmp_path):
    path = tmp_path / "twice.csv"
    path.write_text("prompt\nWhat is this?\nWhat is that?\nWhat is this?\n")
    with pytest.raises(DataError, match="repeats the prompt or id"):
        load_file(path)


def test_the_id_zero_is_an_id(tmp_path):
    path = tmp_path / "zero.jsonl"
    path.write_text('{"id": 0, "prompt": "What is this?"}\n')
    assert load_file(path)[0].id == "0"
