"""Prompt files, chat templates and tenants' own tokenizers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from deltakeeper import prompting
from deltakeeper.errors import ChangedError, DataError, SideFileError
from deltakeeper.overlay.side_files import hash_side_files
from deltakeeper.prompting import Prompt, encode, read_prompts, tokenizers
from deltakeeper.testing.models import write_tokenizer

TEMPLATE = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}"


@pytest.fixture
def base(tmp_path):
    write_tokenizer(tmp_path / "base")
    return AutoTokenizer.from_pretrained(tmp_path / "base")


def words(tokenizer, ids):
    return tokenizer.decode(ids).split()


def delta(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    names = {name.replace("__", ".") for name in files}
    return SimpleNamespace(
        side_folder=folder, side_files={k: v for k, v in hash_side_files(folder).items() if k in names}
    )


def test_lines_of_a_file(tmp_path):
    file = tmp_path / "p.jsonl"
    turns = [{"role": "user", "content": "x", "name": "left out"}]
    rows = [
        {"prompt": "a\u2028a"},
        {"prompt": "b", "tenant": "t"},
        {"prompt": "c", "tenant": None},
        {"messages": turns},
    ]
    file.write_text("\r\n \n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    talk = ({"role": "user", "content": "x"},)
    assert read_prompts(file) == [Prompt("a\u2028a"), Prompt("b", "t"), Prompt("c"), Prompt(talk)]
    assert read_prompts(file, "u") == [Prompt("a\u2028a", "u"), Prompt("b", "t"), Prompt("c"), Prompt(talk, "u")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no prompts"),
        ("nonsense", "line 1 of .* is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"prompt": "a"}\n[]', "line 2 of .* needs either"),
        ('{"prompt": "a", "messages": []}', "needs either"),
        ('{"prompt": 3}', "is not text"),
        ('{"prompt": "a", "tenant": 3}', "is not a name"),
        ('{"messages": []}', "are not turns of a chat"),
        ('{"messages": [{"role": "user"}]}', "are not turns of a chat"),
        ('{"messages": {"role": "user"}}', "are not turns of a chat"),
    ],
)
def test_lines_that_are_no_prompts(tmp_path, text, said):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        read_prompts(tmp_path / "p.jsonl")


def test_files_that_are_no_text(tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not text in UTF-8"):
        read_prompts(tmp_path / "p.jsonl")
    monkeypatch.setattr(prompting, "MOST_BYTES", 1)
    with pytest.raises(DataError, match="split it"):
        read_prompts(tmp_path / "p.jsonl")


def test_texts_and_turns_become_tokens(base):
    turns = Prompt(({"role": "user", "content": "w5"}, {"role": "user", "content": "w6"}), "t")
    assert words(base, encode(base, Prompt("w5 w6"), None)) == ["w5", "w6"]
    with pytest.raises(DataError, match="tenant 't' has no chat template"):
        encode(base, turns, None)
    base.chat_template = TEMPLATE
    assert words(base, encode(base, Prompt("w5 w6"), None)) == ["w1", "w5", "w6"]
    assert words(base, encode(base, Prompt("w5 w6"), False)) == ["w5", "w6"]
    assert words(base, encode(base, turns, None)) == ["w1", "w5", "w1", "w6"]
    with pytest.raises(DataError, match="cannot be asked as raw"):
        encode(base, turns, False)
    base.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(DataError, match=r"of tenant 't' does not take these turns \(only one turn\)"):
        encode(base, turns, None)


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template__jinja": TEMPLATE},
        {"chat_template__json": json.dumps({"chat_template": TEMPLATE})},
        {"tokenizer_config__json": json.dumps({"chat_template": TEMPLATE})},
    ],
)
def test_a_tenant_may_have_a_chat_template_of_its_own(base, tmp_path, files):
    found = tokenizers(base, {"a": delta(tmp_path / "a", **files), "b": delta(tmp_path / "b")})
    assert found["a"].chat_template == TEMPLATE
    assert found[None] is found["b"] is base and base.chat_template is None


def test_a_tenant_may_have_words_of_its_own(base, tmp_path):
    write_tokenizer(tmp_path / "a", words=5)
    own = SimpleNamespace(side_folder=tmp_path / "a", side_files=hash_side_files(tmp_path / "a"))
    found = tokenizers(base, {"a": own})
    assert words(found["a"], encode(found["a"], Prompt("w4 w5"), None)) == ["w4", "<unk>"]
    assert words(base, encode(base, Prompt("w4 w5"), None)) == ["w4", "w5"]


def test_files_of_a_tenant_that_cannot_be_read(base, tmp_path, monkeypatch):
    for files in ({"tokenizer__json": "{"}, {"tokenizer_config__json": "{"}, {"tokenizer_config__json": "[]"}):
        with pytest.raises(SideFileError, match="cannot be read"):
            tokenizers(base, {"a": delta(tmp_path / "a", **files)})
    assert tokenizers(base, {"a": delta(tmp_path / "a", tokenizer_config__json="{}")})["a"] is base
    monkeypatch.setattr(prompting, "MOST_TEMPLATE_BYTES", 1)
    with pytest.raises(SideFileError, match="too large"):
        tokenizers(base, {"a": delta(tmp_path / "a", chat_template__jinja=TEMPLATE)})


def test_a_mistyped_key_is_refused(tmp_path):
    """Or the base would answer for a tenant."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x", "tenant": "a"}\n{"prompt": "y", "tenants": "a"}\n')
    with pytest.raises(DataError, match=r"line 2.*unknown key 'tenants'"):
        read_prompts(file)


@pytest.mark.parametrize("files", [{"chat_template__jinja": "w2"}, {"tokenizer__json": "{}"}])
def test_files_that_changed_since_their_delta_was_loaded_are_not_read(base, tmp_path, files):
    own = delta(tmp_path / "a", **files)
    for name in own.side_files:
        (tmp_path / "a" / name).write_text("w3")
    with pytest.raises(ChangedError, match="is not what it was"):
        tokenizers(base, {"a": own})


def test_a_tokenizer_is_read_from_the_files_of_its_delta_alone(base, tmp_path):
    write_tokenizer(tmp_path / "a", words=5)
    own = SimpleNamespace(side_folder=tmp_path / "a", side_files=hash_side_files(tmp_path / "a"))
    (tmp_path / "a" / "chat_template.jinja").write_text("w3")  # transformers would take it up
    assert tokenizers(base, {"a": own})["a"].chat_template is None
