"""The arms of a study: base, fine-tune, compressed and healed deltas, defences, and controls against wrong conclusions.

An arm is spelled `base`, `tuned`, a codec (`bitdelta:bits=2`), or a mapping with one of the keys of `FORMS`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from deltakeeper.codecs import CODECS, parse_codec
from deltakeeper.codecs.spelling import spell
from deltakeeper.errors import CodecError, DataError
from deltakeeper.lab.quantise import FullModelRTN
from deltakeeper.suggestion import suggest

Kind = Literal["base", "tuned", "codec", "healed", "defended", "control", "merged", "quantised"]

FORMS = ("codec", "merged", "quantised", "heal", "defence")
_EXTRAS = {
    "codec": ("planes", "norms", "embeddings"),
    "merged": ("norms", "embeddings"),
    "quantised": (),
    "heal": ("norms", "embeddings"),
    "defence": ("then",),
}
_HEAL = ("of", "guard")


@dataclass(frozen=True)
class Variant:
    """One arm.

    Attributes:
        name: unique among the arms of a fine-tune.
        kind: what it is.
        label: the arm in words.
        codec: spelling of the codec, for the kinds that compress a delta, and None for the others.
        planes: sign planes that are served; None for all.
        quantiser: spelling of the whole-model quantiser, `rtn:bits=4`.
        heal: settings of guarded healing, for the kind `healed`.
        defence: `{"defence": spelling}`, for the kind `defended`; the codec is what its result is compressed with.
        rules: `norms` and `embeddings` as `deltakeeper.compress` takes them, where they are not its own.
    """

    name: str
    kind: Kind
    label: str
    codec: str | None = None
    planes: int | None = None
    quantiser: str | None = None
    heal: Mapping[str, Any] | None = None
    defence: Mapping[str, Any] | None = None
    rules: Mapping[str, str] | None = None

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")

    @property
    def is_tenant(self) -> bool:
        """Whether the arm can be served beside others on one base."""
        return self.kind == "base" or (self.codec is not None and self.kind != "merged")

    def spelled(self) -> dict[str, Any]:
        """What decides the arm's answers, as plain JSON: everything but its name and label."""
        values: dict[str, Any] = {"codec": self.codec, "planes": self.planes, "quantiser": self.quantiser}
        values |= {"heal": _plain(self.heal), "defence": _plain(self.defence), "rules": _plain(self.rules)}
        return {name: value for name, value in values.items() if value is not None}


BASE = Variant("base", "base", "Aligned base")
TUNED = Variant("tuned", "tuned", "Fine-tune, uncompressed")


def read_arm(value: Any, where: str = "an arm") -> Variant:
    """An arm of its spelling.

    Raises:
        DataError: the spelling is none, or a codec, setting or key is unknown.
    """
    if isinstance(value, str):
        if value in ("base", "tuned"):
            return BASE if value == "base" else TUNED
        return _read_mapping({"codec": value}, where)
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise DataError(f"{where} is {value!r}; write base, tuned, a codec, or a mapping with {', '.join(FORMS)}.")
    return _read_mapping(dict(value), where)


def parse_quantiser(text: str) -> FullModelRTN:
    """Quantiser of a spelling such as `rtn:bits=4,group=64`; raises DataError."""
    name, _, rest = text.partition(":")
    if name != "rtn":
        raise DataError(f"the quantiser '{text}' is unknown; write rtn:bits=4.")
    known = [f.name for f in dataclasses.fields(FullModelRTN) if f.init]
    values: dict[str, int] = {}
    for part in filter(None, rest.split(",")):
        key, _, number = part.partition("=")
        if key not in known:
            raise DataError(f"the quantiser '{text}' has no setting '{key}'; {suggest(key, known)}")
        if not number.isdecimal() or not 1 <= int(number) <= 4096:
            raise DataError(f"setting '{key}' of the quantiser '{text}' must be a whole number from 1 to 4096.")
        values[key] = int(number)
    if values.get("bits", 4) > 8:
        raise DataError(f"the quantiser '{text}' keeps more than 8 bits; write 8 or fewer.")
    return FullModelRTN(**values)


def label_of(codec: str) -> str:
    """A codec's spelling in words."""
    found = parse_codec(codec)
    short = _SHORT.get(found.name)
    if short is not None:
        return short(found)
    title = getattr(CODECS.get(found.name), "title", found.name)
    settings = codec.partition(":")[2] if "+" not in codec else ""
    return codec if "+" in codec else f"{title} ({settings.replace(',', ', ')})" if settings else title


_SHORT: dict[str, Callable[[Any], str]] = {
    "bitdelta": lambda c: {1: "1-bit (BitDelta)"}.get(c.bits, f"{c.bits}-bit (BitDelta, iterated)"),
    "svd": lambda c: f"Low rank (SVD, rank {c.rank})",
    "magnitude": lambda c: f"Sparse (largest {100 * c.keep:g} %)",
    "shrink": lambda c: f"Control: {({0.5: 'half the', 1.0: 'the whole'}).get(c.factor, f'{c.factor:g} of the')} delta",
    "random_sign": lambda _: "Control: random signs",
}


def _read_mapping(value: dict[str, Any], where: str) -> Variant:
    forms = [key for key in FORMS if key in value]
    if len(forms) != 1:
        strange = [key for key in value if key not in (*FORMS, "name", "label", "then", "planes")]
        hint = f" '{strange[0]}' is unknown: {suggest(strange[0], FORMS)}" if strange else ""
        raise DataError(f"{where} needs exactly one of {', '.join(FORMS)}.{hint}")
    form = forms[0]
    known = (form, "name", "label", *_EXTRAS[form])
    for key in value:
        if key not in known:
            raise DataError(f"{where} has the unknown key '{key}'; {suggest(key, known)}")
    made = {"codec": _codec, "merged": _merged, "quantised": _quantised, "heal": _healed, "defence": _defended}
    variant = _ruled(made[form](value, where), value, where)
    changes = {key: value[key] for key in ("name", "label") if key in value}
    for key, text in changes.items():
        if not isinstance(text, str) or not text.strip() or len(text) > 120:
            raise DataError(f"{where}: '{key}' must be a text of 1 to 120 characters.")
    return dataclasses.replace(variant, **changes)


def _codec(value: dict[str, Any], where: str) -> Variant:
    codec, planes = _spelled(value["codec"], where), value.get("planes")
    written = str(value["codec"])  # the name keeps the writer's spelling, the codec loses its defaults
    if planes is not None and (not isinstance(planes, int) or isinstance(planes, bool) or planes < 1):
        raise DataError(f"{where}: 'planes' must be a whole number from 1.")
    kind: Kind = "control" if getattr(parse_codec(codec), "control", False) else "codec"
    label = label_of(codec)
    if planes is None:
        return Variant(written, kind, label, codec)
    return Variant(f"{written} planes={planes}", kind, f"{label}, {planes} served", codec, planes=planes)


def _ruled(variant: Variant, value: Mapping[str, Any], where: str) -> Variant:
    """The arm with the rules for norms and embeddings that stand beside its codec."""
    rules = {key: value[key] for key in ("norms", "embeddings") if key in value}
    if not rules:
        return variant
    if rules.get("norms", "dense") not in ("dense", "base"):
        raise DataError(f"{where}: 'norms' is {rules['norms']!r}; write dense or base.")
    embeddings = rules.get("embeddings", "codec")
    if embeddings not in ("codec", "dense", "base"):
        rules["embeddings"] = _spelled(embeddings, where)
    words = ", ".join(f"{key} {text}" for key, text in sorted(rules.items()))
    return dataclasses.replace(variant, name=f"{variant.name} {words}", label=f"{variant.label}, {words}", rules=rules)


def _merged(value: dict[str, Any], where: str) -> Variant:
    codec = _spelled(value["merged"], where)
    words = re.sub(r"\s*\([^()]*\)$", "", label_of(codec))
    return Variant(f"{value['merged']}+bf16", "merged", f"{words}, merged into bf16", codec)


def _quantised(value: dict[str, Any], where: str) -> Variant:
    spelling = value["quantised"]
    if not isinstance(spelling, str):
        _refuse_type(where, "quantised")
    rtn = parse_quantiser(spelling)
    return Variant(f"whole model {spelling}", "quantised", f"{rtn.bits}-bit whole model (RTN)", quantiser=spelling)


def _healed(value: dict[str, Any], where: str) -> Variant:
    heal = value["heal"]
    if not isinstance(heal, Mapping) or "of" not in heal:
        raise DataError(f"{where}: 'heal' needs the codec to heal: write heal: {{of: 'bitdelta:bits=1', guard: {{}}}}.")
    for key in heal:
        if key not in _HEAL:
            raise DataError(f"{where}: 'heal' has the unknown key '{key}'; {suggest(str(key), _HEAL)}")
    codec, guard = _spelled(heal["of"], where), heal.get("guard") or {}
    if not isinstance(guard, Mapping):
        _refuse_type(where, "heal.guard")
    flat = {**{k: v for k, v in guard.items() if k != "data"}, **_plain_or_empty(guard.get("data"))}
    text = ",".join(f"{key}={_short(value)}" for key, value in sorted(flat.items()))
    name = f"{heal['of']} guarded" + (f" {text}" if text else "")
    return Variant(name, "healed", f"{label_of(codec)}, guarded", codec, heal={"guard": dict(guard)})


def _defended(value: dict[str, Any], where: str) -> Variant:
    spelling = value["defence"]
    if not isinstance(spelling, str):
        _refuse_type(where, "defence")
    codec = _spelled(value["then"], where) if value.get("then") is not None else None
    name = spelling if codec is None else f"{spelling} then {value['then']}"
    label = f"Defence: {spelling}" if codec is None else f"Defence: {spelling}, then {label_of(codec)}"
    return Variant(name, "defended", label, codec, defence={"defence": spelling})


def _plain_or_empty(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _short(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _spelled(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} has {value!r} in place of a codec; write a spelling such as bitdelta:bits=2.")
    try:
        return spell(parse_codec(value))
    except CodecError as error:
        raise DataError(f"{where}: {error}") from error


def _plain(value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if value is None else {key: _plain(v) if isinstance(v, Mapping) else v for key, v in value.items()}


def _refuse_type(where: str, key: str) -> NoReturn:
    raise DataError(f"{where}: '{key}' has a value of the wrong type; see docs/cli.md for its form.")
