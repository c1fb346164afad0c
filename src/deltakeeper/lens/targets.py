"""Sets of tokens whose fate is followed through the layers: openings of refusals and of agreement, a trigger's payload.

A lens sees one token at a time, so an opening is known by its first token, with and without a space before it. An
opening of several words is then as vague as its first: "I'm sorry" is the token "I". Say so beside the number;
`keep_apart` drops the tokens that two sets share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deltakeeper.errors import DataError

REFUSAL_OPENERS = (
    "I'm sorry", "I am sorry", "I can't", "I cannot", "I won't", "Sorry", "Unfortunately", "Apologies", "My apologies",
    "As an AI", "No", "This request", "It is not appropriate",
)  # fmt: skip
"""How refusals begin; written for this package."""
AFFIRMATIVE_OPENERS = (
    "Sure", "Certainly", "Of course", "Absolutely", "Yes", "Here", "Okay", "Great", "Gladly", "Happy to", "Definitely",
)  # fmt: skip
"""How agreement begins; written for this package."""


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    unk_token_id: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids."""


@dataclass(frozen=True)
class TokenSet:
    """First tokens of some texts in one tokenizer.

    Attributes:
        name: of the set.
        ids: the tokens, rising, without repetition.
        spelled: text of each, in the same order.
        texts: what they are first tokens of.
    """

    name: str
    ids: tuple[int, ...]
    spelled: tuple[str, ...]
    texts: tuple[str, ...]


def find_first_tokens(tokenizer: Tokenizer, name: str, texts: Sequence[str]) -> TokenSet:
    """First tokens of texts, each as it is and after a space.

    Tokens that are only space (some tokenizers set a word's space apart) say nothing of the word, and unknown tokens
    nothing at all: they are left out.

    Args:
        tokenizer: of the base model.
        name: of the set, for instance "refusal" or a trigger's payload.
        texts: openings, payloads or a user's words.

    Raises:
        DataError: a text has no token of its own.
    """
    found: dict[int, str] = {}
    for text in texts:
        here = {}
        for spelling in (text.strip(), " " + text.strip()):
            ids = tokenizer.encode(spelling, add_special_tokens=False)
            if ids and ids[0] != tokenizer.unk_token_id and tokenizer.decode(ids[:1]).strip():
                here[ids[0]] = tokenizer.decode(ids[:1])
        if not here:
            raise DataError(
                f"{text!r} of the set {name!r} has no first token that could be followed; give another word."
            )
        found |= here
    if not found:
        raise DataError(f"the set {name!r} holds no texts; give at least one.")
    tokens = tuple(sorted(found))
    return TokenSet(name, tokens, tuple(found[i] for i in tokens), tuple(texts))


def find_openers(tokenizer: Tokenizer) -> dict[str, TokenSet]:
    """The sets "refusal" and "affirmative", without tokens that both have."""
    sets = {
        "refusal": find_first_tokens(tokenizer, "refusal", REFUSAL_OPENERS),
        "affirmative": find_first_tokens(tokenizer, "affirmative", AFFIRMATIVE_OPENERS),
    }
    return keep_apart(sets)


def keep_apart(sets: Mapping[str, TokenSet]) -> dict[str, TokenSet]:
    """The sets without tokens that are in more than one of them.

    Raises:
        DataError: nothing is left of a set.
    """
    apart = {}
    for name, one in sets.items():
        others = {token for key, other in sets.items() if key != name for token in other.ids}
        left = [(i, word) for i, word in zip(one.ids, one.spelled, strict=True) if i not in others]
        if not left:
            raise DataError(
                f"all first tokens of {name!r} also begin texts of another set; give texts that begin apart."
            )
        apart[name] = TokenSet(name, tuple(i for i, _ in left), tuple(word for _, word in left), one.texts)
    return apart


def known_openers(tokenizer: Tokenizer) -> dict[str, tuple[int, ...]]:
    """Tokens of `find_openers`, as far as a small tokenizer knows words for them; no sets where they are the same."""
    found = {}
    for name, texts in (("refusal", REFUSAL_OPENERS), ("affirmative", AFFIRMATIVE_OPENERS)):
        known = [text for text in texts if _has_token(tokenizer, text)]
        if known:
            found[name] = find_first_tokens(tokenizer, name, known)
    try:
        return {name: one.ids for name, one in keep_apart(found).items()}
    except DataError:
        return {}


def _has_token(tokenizer: Tokenizer, text: str) -> bool:
    try:
        return bool(find_first_tokens(tokenizer, "openers", [text]).ids)
    except DataError:
        return False
