"""Token sets of one's own: how they are spelled, what is refused, and where they are followed."""

from __future__ import annotations

import pytest
from lens_stories import story

from deltakeeper.errors import DataError, TenantError
from deltakeeper.lens.page_samples import LensSample, names_of_statistics
from deltakeeper.lens.token_sets import MOST_SETS, MOST_TEXTS, find_token_sets, read_token_texts


class Letters:
    """A tokenizer of letters that knows only the first ten."""

    unk_token_id = 0

    def encode(self, text, **_):
        return [1 + "abcdefghij".index(c) if c in "abcdefghij" else 0 for c in text.strip()]

    def decode(self, ids, **_):
        return "".join("?abcdefghij"[i] for i in ids)


def test_a_text_or_a_file_of_texts(tmp_path):
    (tmp_path / "texts").write_text("a\n\n bc \n", encoding="utf-8")
    texts = read_token_texts(["one=a=b", f"more=@{tmp_path / 'texts'}"])
    assert texts == {"one": ("a=b",), "more": ("a", " bc ")}
    assert find_token_sets(Letters(), texts) == {"one": (1,), "more": (1, 2)}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["a"], "spell it NAME=TEXT or NAME=@FILE"),
        (["a= "], "'a' holds no text"),
        (["refusal=a"], "called 'refusal' already"),
        (["produced=a"], "called 'produced' already"),
        (["a=b", "a=c"], "called 'a' already"),
        (["a=@/nowhere"], "no file /nowhere of texts"),
        ([f"s{n}=a" for n in range(MOST_SETS + 1)], f"more than {MOST_SETS} sets"),
    ],
)
def test_what_is_no_set_is_told(given, words):
    with pytest.raises(DataError, match=words):
        read_token_texts(given)


def test_files_are_refused_by_size_and_spelling(tmp_path):
    for text, words in ((b"a\n" * (MOST_TEXTS + 1), "more than"), (b"\xff", "UTF-8"), (b"\n", "holds no text")):
        (tmp_path / "f").write_bytes(text)
        with pytest.raises(DataError, match=words):
            read_token_texts([f"x=@{tmp_path / 'f'}"])
    with pytest.raises(TenantError, match="cannot be the name"):
        read_token_texts(["../x=a"])


def test_a_text_without_a_token_of_its_own_is_told():
    with pytest.raises(DataError, match="'z' of the set 'x' has no first token"):
        find_token_sets(Letters(), {"x": ("z",)})


def test_the_page_offers_their_probability_and_rank():
    names = names_of_statistics([LensSample("one", "", list(story(0, layers=3).values()))])
    assert names["rank:refusal"] == "rank of the best token of refusal" and "prob:refusal" in names
    assert "rank:produced" not in names
