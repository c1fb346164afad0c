"""A study as one YAML file: base, recipes, adaptive attackers, arms, seeds, prompts, judges, utility tasks."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deltakeeper.errors import DataError
from deltakeeper.study.variants import Variant, read_arm
from deltakeeper.suggestion import spelled_out, suggest

MAX_BYTES = 1 << 20
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=80)]
Count = Annotated[int, Field(ge=1, le=100_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Size(_Strict):
    """How large the base is, for an estimate where its weights are not at hand; `width` is a typical matrix's side."""

    parameters: Annotated[int, Field(ge=1, le=10**13)]
    bytes_per_parameter: Annotated[float, Field(gt=0, le=8)] = 2.0
    width: Annotated[int, Field(ge=1, le=1 << 20)] = 4096


class Prompts(_Strict):
    """How many prompts each probe asks, and a file of harmful requests in place of the package's held-out ones.

    Numbers that are not given are those of the recipe. `sha256` refuses a file of another content.
    """

    held_out: Count | None = None
    contrast: Count | None = None
    passages: Annotated[int, Field(ge=1, le=1000)] = 12
    harmful: str | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")


class RecipeUse(_Strict):
    """A recipe with changed settings, under a name of its own where the same recipe is used twice."""

    recipe: str
    name: Name | None = None
    changes: Mapping[str, Any] = Field(default_factory=dict, alias="set")


class Group(_Strict):
    """Recipes times arms, by an attacker who may know the codec; `seeds` and `preset` override the study's."""

    name: Name
    recipes: tuple[RecipeUse, ...] = Field(min_length=1, max_length=200)
    arms: tuple[Any, ...] = Field(min_length=1, max_length=200)
    adaptive: Mapping[str, Any] | None = None
    changes: Mapping[str, Any] = Field(default_factory=dict, alias="set")
    preset: Literal["embedded", "published"] | None = None
    seeds: tuple[Annotated[int, Field(ge=0, le=2**31 - 1)], ...] | None = Field(default=None, min_length=1)

    @field_validator("recipes", mode="before")
    @classmethod
    def _short_recipes(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        return [{"recipe": item} if isinstance(item, str) else item for item in value]

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The arms, read; raises DataError."""
        found = tuple(read_arm(arm, f"arm {i + 1} of group '{self.name}'") for i, arm in enumerate(self.arms))
        seen: set[str] = set()
        for variant in found:
            if variant.name in seen:
                raise DataError(f"group '{self.name}' has the arm '{variant.name}' twice; keep one or give it a name.")
            seen.add(variant.name)
        return found


class Task(_Strict):
    """A utility task.

    Attributes:
        name: its name in this study, and what it is: gsm8k, mmlu, piqa or truthfulqa, or a task of
            lm-evaluation-harness whose data comes from the hub.
        kind: what it is, where the name is another.
        path: its data: a file or folder.
        limit: items that are asked, chosen evenly over subjects; all by default.
        shots: examples before each question; those of the task by default.
        chat: whether questions go into the chat template.
    """

    name: Name
    kind: Name | None = None
    path: str | None = None
    limit: Count | None = None
    shots: Annotated[int, Field(ge=0, le=100)] | None = None
    chat: bool = False


class Answers(_Strict):
    """How answers are computed: what computes them, tenants of one batch, and prompts that are asked together."""

    source: Literal["engine", "transformers"] | None = None
    tenants: Annotated[int, Field(ge=1, le=64)] = 12
    batch: Annotated[int, Field(ge=1, le=1024)] = 32


class Lens(_Strict):
    """What the lens looks into once the arms of a fine-tune are measured: prompts whose verdict flipped come first.

    Attributes:
        attacks: names of fine-tunes; all by default.
        arms: names of arms, beside base and fine-tune; all by default.
        seeds: seeds of the fine-tunes; the first one of each by default.
        prompts: how many prompts of a fine-tune's goal.
        positions: tokens that are looked at, counted from the last of the prompt, which is 0 and is always among them;
            what is behind it is the base's own answer, which all arms read.
        top: likeliest tokens that are kept in each cell.
        directions: whether every arm is judged by the base's direction between the goal's prompts and its contrast (of
            a backdoor, the same requests without the trigger), or harmless look-alikes where there is none.
    """

    attacks: tuple[str, ...] | None = Field(default=None, min_length=1, max_length=200)
    arms: tuple[str, ...] | None = Field(default=None, min_length=1, max_length=200)
    seeds: tuple[Annotated[int, Field(ge=0, le=2**31 - 1)], ...] | None = Field(default=None, min_length=1)
    prompts: Annotated[int, Field(ge=1, le=1000)] = 8
    positions: tuple[Annotated[int, Field(ge=0, le=64)], ...] = Field(default=(0, 1, 2, 3), min_length=1, max_length=65)
    top: Annotated[int, Field(ge=1, le=100)] = 5
    directions: bool = False

    @field_validator("positions")
    @classmethod
    def _begin_at_the_answer(cls, positions: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({0, *positions}))


class StudyFile(_Strict):
    """A whole study.

    Attributes:
        name: short name, for reports.
        base: `embedded-aligned`, `synthetic`, a model folder, or a hub id.
        unaligned: the model before its alignment, for defences that ask for it: `embedded`, `synthetic-unaligned`, a
            model folder, or a hub id.
        size: how large the base is, for estimates without its weights.
        preset: which settings of a recipe are used, `embedded` or `published`.
        seeds: seeds of every fine-tune.
        prompts: sizes of the probes.
        judges: `ours`, or files; the first one decides what is a refusal, the others are noted beside.
        content: file of a judge that decides which answers comply; the first judge does by default.
        groups: what is trained and measured.
        utility: general tasks that every arm is asked.
        answers: how answers are computed.
        primary: the arm whose comparison with the fine-tune was named beforehand.
        notes: sentences that the report prints among its limits.
        lens: what the lens looks into; nothing by default.
    """

    name: Name
    base: str = "embedded-aligned"
    unaligned: str | None = None
    size: Size | None = None
    preset: Literal["embedded", "published"] = "embedded"
    seeds: tuple[Annotated[int, Field(ge=0, le=2**31 - 1)], ...] = Field(default=(0,), min_length=1, max_length=100)
    prompts: Prompts = Prompts()
    judges: tuple[str, ...] = Field(default=("ours",), min_length=1, max_length=8)
    content: str | None = None
    groups: tuple[Group, ...] = Field(min_length=1, max_length=100)
    utility: tuple[Task, ...] = ()
    answers: Answers = Answers()
    primary: str = "bitdelta:bits=1"
    notes: tuple[str, ...] = ()
    lens: Lens | None = None

    @field_validator("prompts", mode="before")
    @classmethod
    def _short_prompts(cls, value: Any) -> Any:
        return {"held_out": value, "contrast": value} if isinstance(value, int) else value

    @model_validator(mode="after")
    def _unique(self) -> StudyFile:
        for what, values in (("group", [g.name for g in self.groups]), ("seed", self.seeds), ("judge", self.judges)):
            for value in values:
                if list(values).count(value) > 1:
                    raise ValueError(f"the {what} {value} stands twice; keep one of them.")
        return self

    @property
    def sha256(self) -> str:
        """Hash of the study's content, whatever its layout as text."""
        return hashlib.sha256(self.to_text().encode()).hexdigest()

    def to_text(self) -> str:
        """The study as JSON text, which `from_text` reads back."""
        value = self.model_dump(mode="json", by_alias=True)
        if self.lens is None:
            del value["lens"]  # the text, and its hash, of a study from before there was a lens
        elif not self.lens.directions:
            del value["lens"]["directions"]  # and of one from before there were directions
        return json.dumps(value, sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> StudyFile:
        """The study of its JSON text."""
        return cls.model_validate(json.loads(text))


def load_study(path: str | Path) -> StudyFile:
    """Read and check a study; paths in it are taken from the folder of the file where they exist there.

    Raises:
        DataError: the file is missing, too large, not YAML, or not a study; the sentence names the key at fault.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no study at {path}; give a YAML file, such as studies/synthetic.yaml.")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} is larger than {MAX_BYTES} bytes, which no study is; check the path.")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not YAML ({' '.join(str(error).split())}); correct it.") from error
    return _anchored(read_study(value, str(path)), path.parent)


def read_study(value: Any, where: str) -> StudyFile:
    """A study of its parsed YAML; raises DataError."""
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is no mapping of keys; begin with name, base and groups.")
    try:
        study = StudyFile.model_validate(value)
    except ValidationError as error:
        raise DataError(f"{where}: {fault(error, StudyFile, 'the study')}") from error
    arms = {variant.name for group in study.groups for variant in group.variants}
    if "primary" in study.model_fields_set and study.primary not in arms:
        raise DataError(f"{where}: the primary arm '{study.primary}' is in no group; {suggest(study.primary, arms)}")
    return study


def _anchored(study: StudyFile, folder: Path) -> StudyFile:
    """The study with paths that exist beside the file made whole."""

    def found(text: str | None) -> str | None:
        if text is None or Path(text).is_absolute() or not (folder / text).exists() or Path(text).exists():
            return text
        return str((folder / text).resolve())

    def changes(value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            return {name: changes(inner, name) for name, inner in value.items()}
        return found(value) if key == "path" and isinstance(value, str) else value

    def recipes(group: Group) -> Group:
        uses = tuple(
            use.model_copy(update={"recipe": found(use.recipe), "changes": changes(use.changes)})
            for use in group.recipes
        )
        return group.model_copy(update={"recipes": uses, "changes": changes(group.changes)})

    return study.model_copy(
        update={
            "base": found(study.base),
            "unaligned": found(study.unaligned),
            "judges": tuple(found(judge) for judge in study.judges),
            "content": found(study.content),
            "prompts": study.prompts.model_copy(update={"harmful": found(study.prompts.harmful)}),
            "groups": tuple(map(recipes, study.groups)),
            "utility": tuple(t.model_copy(update={"path": found(t.path)}) for t in study.utility),
        }
    )


def fault(error: ValidationError, model: type[BaseModel], whole: str) -> str:
    """The first fault in one sentence, with the nearest known key or word for one that is unknown.

    Args:
        error: what pydantic found.
        model: what was to be read.
        whole: what it is called.
    """
    found = error.errors(include_url=False)[0]
    place = ".".join(map(spelled_out, found["loc"]))
    if found["type"] == "extra_forbidden":
        *parents, key = found["loc"]
        known = _keys(model, [part for part in parents if isinstance(part, str)])
        where = ".".join(map(spelled_out, parents)) or whole
        return f"{where} has the unknown key '{spelled_out(key)}'; {suggest(str(key), known)}"
    if found["type"] == "missing":
        return f"'{place}' is missing; add it."
    if found["type"] == "literal_error":
        words = re.findall("'([^']*)'", found["ctx"]["expected"])
        return f"'{place}' does not fit: it is {found['input']!r}; {suggest(str(found['input']), words)}"
    said = found["msg"].removeprefix("Value error, ")
    if found["type"] == "value_error" and not place:  # a whole sentence of ours
        return said
    return f"'{place}' does not fit ({said}); correct it."


def _keys(model: type[BaseModel], path: Sequence[str]) -> Iterator[str]:
    """Keys of the model that lies below these keys of another."""
    for part in path:
        fields = {info.alias or name: info for name, info in model.model_fields.items()}
        model = next(_models(fields[part].annotation), model)
    return (info.alias or name for name, info in model.model_fields.items())


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
