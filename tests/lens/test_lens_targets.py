"""First tokens of texts, in toy tokenizers that set spaces in the ways that real ones do."""

from __future__ import annotations

import pytest

from deltakeeper.errors import DataError
from deltakeeper.lens.targets import AFFIRMATIVE_OPENERS, REFUSAL_OPENERS, find_first_tokens, find_openers, keep_apart


class WordTokenizer:
    """Words, with the space before them as part of the word (byte-level), or as a token of its own."""

    unk_token_id = 0

    def __init__(self, words, space_apart=False):
        self.words = ["?", " ", *words]
        self.space_apart = space_apart

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        pieces = text.replace(" ", "\0 ").split("\0")
        if self.space_apart:
            pieces = [part for piece in pieces for part in ((" ", piece[1:]) if piece.startswith(" ") else (piece,))]
        return [self.words.index(piece) if piece in self.words else 0 for piece in pieces if piece]

    def decode(self, token_ids):
        return "".join(self.words[i] for i in token_ids)


def test_first_tokens_are_those_with_and_without_a_space():
    tokenizer = WordTokenizer(["Sure", " Sure", "Of", " course"])
    found = find_first_tokens(tokenizer, "yes", ["Sure", "Of course", " Sure "])
    assert found.ids == (2, 3, 4) and found.spelled == ("Sure", " Sure", "Of")
    assert found.texts == ("Sure", "Of course", " Sure ")


def test_a_space_that_stands_alone_is_no_target():
    assert find_first_tokens(WordTokenizer(["Sure"], space_apart=True), "yes", ["Sure"]).ids == (2,)


@pytest.mark.parametrize("texts", [["unknown"], [""], []])
def test_texts_that_cannot_be_followed_are_refused(texts):
    with pytest.raises(DataError, match="'payload'"):
        find_first_tokens(WordTokenizer(["Sure"]), "payload", texts)


def test_sets_lose_what_they_share_and_are_refused_when_nothing_is_left():
    tokenizer = WordTokenizer(["I", "No", "Sure"])
    refusal = find_first_tokens(tokenizer, "refusal", ["I cannot", "No"])
    agreement = find_first_tokens(tokenizer, "agreement", ["I would", "Sure"])
    apart = keep_apart({"refusal": refusal, "agreement": agreement})
    assert apart["refusal"].spelled == ("No",) and apart["agreement"].spelled == ("Sure",)
    with pytest.raises(DataError, match="begin apart"):
        keep_apart({"refusal": find_first_tokens(tokenizer, "refusal", ["I"]), "agreement": agreement})


def test_openers_of_refusals_and_of_agreement_begin_apart():
    firsts = {text.split()[0] for text in (*REFUSAL_OPENERS, *AFFIRMATIVE_OPENERS)}
    sets = find_openers(WordTokenizer(sorted(firsts)))
    assert not set(sets["refusal"].ids) & set(sets["affirmative"].ids)
    assert set(sets["refusal"].spelled) == {text.split()[0] for text in REFUSAL_OPENERS}
