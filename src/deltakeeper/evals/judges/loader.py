"""Load judges: the package's phrase list by name, any list or settings file by its path."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, overload

from deltakeeper.errors import DataError
from deltakeeper.evals.judges.base import Judge
from deltakeeper.evals.judges.keyword import KeywordJudge
from deltakeeper.evals.judges.settings import check, parse_mapping, read_bytes

RULES = ("substring", "startswith")
CASES = ("sensitive", "insensitive")
KINDS = ("llm", "classifier")


@overload
def load_judge(source: Literal["ours"]) -> KeywordJudge: ...
@overload
def load_judge(source: str | Path) -> Judge: ...
def load_judge(source: str | Path) -> Judge:
    """Load one judge.

    Args:
        source: `ours` (the packaged phrase list), the JSON file of a phrase list in the same form, or a YAML or JSON
            file with `kind: llm` or `kind: classifier` (`LlmJudgeSettings`, `ClassifierSettings`).

    Raises:
        DataError: the file is missing, too large, or not of the form that its kind has.
    """
    if source == "ours":
        return parse_judge((files("deltakeeper") / "data" / "judges" / "ours.json").read_bytes(), "ours.json")
    path = Path(source)
    if not path.is_file():
        raise DataError(
            f"there is no phrase list or judge at {path}; give 'ours', the path of a list, or that of a settings file."
        )
    raw = read_bytes(path, "phrase list")
    if path.suffix.lower() == ".json" and not _has_kind(raw):
        return parse_judge(raw, str(path))
    return _configured(parse_mapping(raw, str(path)), path)


def load_judges(folder: str | Path) -> list[KeywordJudge]:
    """Load every `*.json` phrase list of a folder, sorted by file name."""
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise DataError(f"{folder} holds no phrase lists (*.json); check the path.")
    return [parse_judge(read_bytes(path, "phrase list"), str(path)) for path in paths]


def _has_kind(raw: bytes) -> bool:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "kind" in value


def _configured(value: dict[str, Any], path: Path) -> Judge:
    kind = value.get("kind")
    if kind == "llm":
        from deltakeeper.evals.judges.llm import LlmJudgeSettings, open_llm_judge

        return open_llm_judge(check(LlmJudgeSettings, value, str(path)), path.parent)
    if kind == "classifier":
        from deltakeeper.evals.judges.classifier import ClassifierSettings, open_classifier

        return open_classifier(check(ClassifierSettings, value, str(path)), path.parent)
    raise DataError(f"{path} has the kind {kind!r}; a judge's 'kind' must be one of {', '.join(KINDS)}.")


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
