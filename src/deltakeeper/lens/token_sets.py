"""Sets of tokens of one's own, as written on a command line: `NAME=TEXT`, or `NAME=@FILE` with a text a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from deltakeeper.engine.tenant_files import check_name
from deltakeeper.errors import DataError
from deltakeeper.lens.targets import Tokenizer, find_first_tokens
from deltakeeper.lens.trace import PRODUCED

MOST_SETS = 16
MOST_TEXTS = 1000
MOST_BYTES = 1 << 20
TAKEN = ("refusal", "affirmative", PRODUCED)
"""Names of the sets that are followed anyway."""


def read_token_texts(given: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Texts by name of the set.

    Raises:
        DataError: one is spelled otherwise, empty or too large; a name is taken or given twice; or there are too many.
        TenantError: a name is malformed.
    """
    found: dict[str, tuple[str, ...]] = {}
    for text in given:
        name, equals, said = text.partition("=")
        if not equals:
            raise DataError(f"{text[:80]!r} does not say what its tokens are called; spell it NAME=TEXT or NAME=@FILE.")
        if check_name(name) in TAKEN or name in found:
            raise DataError(f"there is a set of tokens called '{name}' already; give this one another name.")
        texts = _lines(Path(said[1:])) if said.startswith("@") else (said,)
        if not any(one.strip() for one in texts):
            raise DataError(f"the set of tokens '{name}' holds no text; give at least one word.")
        found[name] = tuple(one for one in texts if one.strip())
        if len(found[name]) > MOST_TEXTS or len(found) > MOST_SETS:
            raise DataError(
                f"that is more than {MOST_SETS} sets of tokens, or one of more than {MOST_TEXTS} texts; give fewer."
            )
    return found


def find_token_sets(tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]]) -> dict[str, tuple[int, ...]]:
    """First tokens of each set's texts, each as it is and after a space; raises DataError where a text has none."""
    return {name: find_first_tokens(tokenizer, name, own).ids for name, own in texts.items()}


def _lines(file: Path) -> tuple[str, ...]:
    if not file.is_file() or file.stat().st_size > MOST_BYTES:
        raise DataError(f"there is no file {file} of texts of at most {MOST_BYTES >> 20} MiB; give one text a line.")
    try:
        return tuple(file.read_text(encoding="utf-8").split("\n"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not text in UTF-8; save it as such.") from error
