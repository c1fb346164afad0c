import json

import pytest
import torch

from deltakeeper.calibration import read_text, tokenise
from deltakeeper.calibration.text import MAX_TEXT_BYTES, stack_rows
from deltakeeper.errors import DataError


class Letters:
    """A tokenizer whose tokens are code points; a conversation begins with 1."""

    eos_token_id = 0
    chat_template = "yes"

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": ([7] if add_special_tokens else []) + [ord(letter) for letter in text]}

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        return "\x01" + "".join(f"{m['role'][0]}:{m['content']}" for m in messages)


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_paragraphs_of_a_text_file(tmp_path):
    path = write(tmp_path, "a.txt", "\ufeffone\nline\r\n\r\ntwo\n\n\n\n  three  \n")
    assert read_text(path) == ["one\nline", "two", "three"]


def test_lines_of_a_jsonl_file(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "extra": 3}]
    lines = [{"text": "a\u2028b"}, {"messages": chat, "id": 4}]
    path = write(tmp_path, "a.jsonl", "\n".join(json.dumps(x, ensure_ascii=False) for x in lines) + "\n\n")
    assert read_text(path) == ["a\u2028b", [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "holds no text"),
        ("a.txt", " \n\n ", "holds no text"),
        ("a.jsonl", "\n", "holds no text"),
        ("a.csv", "a", "neither .txt nor .jsonl"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{', "line 2, is not JSON"),
        ("a.jsonl", "[" * 100_000, "line 1, is not JSON"),
        ("a.jsonl", '"a"', "neither a"),
        ("a.jsonl", '{"text": 3}', "neither a"),
        ("a.jsonl", '{"text": " "}', "neither a"),
        ("a.jsonl", '{"messages": []}', "neither a"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "neither a"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": ["x"]}]}', "neither a"),
    ],
)
def test_other_files_are_refused(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        read_text(write(tmp_path, name, text))


def test_missing_and_huge_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="no calibration text"):
        read_text(tmp_path / "none.txt")
    with (tmp_path / "big.txt").open("wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)
    with pytest.raises(DataError, match="larger than 64 MiB"):
        read_text(tmp_path / "big.txt")


def test_documents_are_packed_with_an_end_between_them():
    chat = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    rows = tokenise(Letters(), ["a", chat], samples=3, length=5)
    wanted = [7, ord("a"), 0, 1, *map(ord, "u:ba:c"), 0]
    assert torch.cat(rows).tolist() == wanted
    assert [len(row) for row in rows] == [5, 5, 1]


def test_no_more_than_the_rows_asked_for():
    rows = tokenise(Letters(), ["abcdefgh"] * 100, samples=4, length=6)
    assert [len(row) for row in rows] == [6, 6, 6, 6]


def test_what_cannot_be_tokenised_is_refused():
    plain = Letters()
    plain.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        tokenise(plain, [[{"role": "user", "content": "b"}]], samples=1, length=5)
    with pytest.raises(DataError, match="at least 1 and 1"):
        tokenise(plain, ["a"], samples=0, length=5)
    empty = Letters()
    empty.eos_token_id = None
    with pytest.raises(DataError, match="no tokens"):
        tokenise(empty, [], samples=1, length=5)

    def refuse(messages, tokenize):
        raise ValueError("roles must alternate")

    empty.apply_chat_template = refuse
    with pytest.raises(DataError, match=r"refuses a conversation \(roles must alternate"):
        tokenise(empty, [[{"role": "user", "content": "b"}]], samples=1, length=5)


def test_only_rows_of_equal_length_are_stacked():
    rows = [torch.arange(4)] * 5 + [torch.arange(2)]
    assert [tuple(batch.shape) for batch in stack_rows(rows, 2)] == [(2, 4), (2, 4), (1, 4), (1, 2)]
