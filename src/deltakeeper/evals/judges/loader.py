"""Load phrase lists: the package's own by name, published ones from wherever their JSON files lie."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from deltakeeper.errors import DataError
from deltakeeper.evals.judges.keyword import KeywordJudge

MAX_BYTES = 1 << 20
RULES = ("substring", "startswith")
CASES = ("sensitive", "insensitive")


def load_judge(source: str | Path) -> KeywordJudge:
    """Load one judge: `ours` (the packaged list), or the path of a JSON file in the same form.

    Raises:
        DataError: the file is missing, too large, not JSON, or not of the form that a phrase list has.
    """
    if source == "ours":
        return parse_judge((files("deltakeeper") / "data" / "judges" / "ours.json").read_bytes(), "ours.json")
    path = Path(source)
    if not path.is_file():
        raise DataError(f"there is no phrase list at {path}; give 'ours' or the path of a JSON file.")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} is larger than {MAX_BYTES} bytes, which no phrase list is; check the path.")
    return parse_judge(path.read_bytes(), str(path))


def load_judges(folder: str | Path) -> list[KeywordJudge]:
    """Load every `*.json` phrase list of a folder, sorted by file name."""
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise DataError(f"{folder} holds no phrase lists (*.json); check the path.")
    return [load_judge(path) for path in paths]


def parse_judge(raw: bytes, where: str) -> KeywordJudge:
    """Read a phrase list from untrusted bytes; raises DataError that names the field at fault."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); give a phrase list in JSON form.") from error
    if not isinstance(value, dict) or not isinstance(value.get("match"), dict):
        raise DataError(f"{where} is not a phrase list: it needs an object with 'phrases' and 'match'.")
    match = value["match"]
    phrases = value.get("phrases")
    if not isinstance(phrases, list) or not phrases or not all(isinstance(p, str) and p.strip() for p in phrases):
        raise DataError(f"{where}: 'phrases' must be a list of non-empty texts.")
    if "n_phrases" in value and value["n_phrases"] != len(phrases):
        raise DataError(f"{where} says it has {value['n_phrases']} phrases and holds {len(phrases)}; get it anew.")
    if value.get("match_means", "refusal") != "refusal":
        raise DataError(f"{where}: a match means {value['match_means']!r}, but only lists of refusals can judge.")
    window = match.get("window")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise DataError(f"{where}: 'match.window' must be a positive number of characters.")
    strip = match.get("strip", False)
    if not isinstance(strip, bool):
        raise DataError(f"{where}: 'match.strip' must be true or false.")
    return KeywordJudge(
        name=_text(value, "name", where),
        version=_text(value, "version", where),
        phrases=tuple(phrases),
        rule=_choice(match, "rule", RULES, where),
        case=_choice(match, "case", CASES, where),
        strip=strip,
        sha256=hashlib.sha256(raw).hexdigest(),
        window=window,
    )


def _text(value: dict[str, Any], key: str, where: str) -> str:
    text = value.get(key)
    if not isinstance(text, str) or not text:
        raise DataError(f"{where}: '{key}' must be a non-empty text.")
    return text


def _choice(value: dict[str, Any], key: str, known: tuple[str, ...], where: str) -> Any:
    if value.get(key) not in known:
        raise DataError(f"{where}: 'match.{key}' is {value.get(key)!r} and must be one of {', '.join(known)}.")
    return value[key]
