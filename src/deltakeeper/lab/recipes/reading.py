"""Recipes by name or by path: YAML that is read as data and checked before it is used."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deltakeeper.errors import DataError
from deltakeeper.lab.recipes.mistakes import sentence
from deltakeeper.lab.recipes.recipe import Recipe
from deltakeeper.suggestion import suggest

MAX_BYTES = 64 << 10


def list_recipes() -> list[str]:
    """Ids of the package's own recipes, sorted."""
    folder = files("deltakeeper") / "data" / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(ref: str | Path) -> Recipe:
    """A recipe by its id, or from a YAML file by path.

    Raises:
        DataError: there is no such recipe, or the file is too large, no plain YAML, or does not fit.
    """
    text = str(ref)
    if isinstance(ref, Path) or text.endswith((".yaml", ".yml")) or os.sep in text:
        path = Path(ref)
        if not path.is_file():
            raise DataError(f"there is no recipe file at {path}; check the path.")
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} is larger than 64 KiB, which no recipe is; check the path.")
        return parse_recipe(path.read_bytes(), str(path))
    known = list_recipes()
    if text not in known:
        raise DataError(f"there is no recipe '{text}'; {suggest(text, known)}")
    return parse_recipe((files("deltakeeper") / "data" / "recipes" / f"{text}.yaml").read_bytes(), f"recipe '{text}'")


def parse_recipe(raw: bytes, where: str) -> Recipe:
    """A recipe from YAML.

    Raises:
        DataError: as `load_recipe`.
    """
    value = read_yaml(raw, where)
    if not isinstance(value, dict):
        raise DataError(f"{where} is not a mapping of settings; write one recipe a file.")
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise DataError(sentence(error, where, Recipe)) from error


def read_yaml(raw: bytes, where: str) -> Any:
    """Plain YAML as data: no tags of Python, no aliases, no key twice.

    Raises:
        DataError: it is not.
    """
    try:
        text = raw.decode("utf-8")
        _refuse_repeats(yaml.compose(text, Loader=yaml.SafeLoader), where, set())
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{where} is not plain YAML ({reason}); correct it.") from error


def _refuse_repeats(node: yaml.Node | None, where: str, seen: set[int]) -> None:
    if node is None:
        return
    if id(node) in seen:
        raise DataError(f"{where} uses an alias of YAML; write the value out.")
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise DataError(f"{where} has the key '{twice[0]}' twice; keep one.")
        for key, value in node.value:
            _refuse_repeats(key, where, seen)
            _refuse_repeats(value, where, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeats(item, where, seen)
