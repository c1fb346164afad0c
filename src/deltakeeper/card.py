"""The model card of an artifact: what it is of, how it was made, how large and how near it is, and how to use it.

Front matter follows https://huggingface.co/docs/hub/model-cards. The text depends on the manifest and the report alone
and holds neither times nor dates, so that the same artifact has the same card wherever it was made.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltakeeper.artifact import CARD_NAME, REPORT_NAME, open_artifact
from deltakeeper.checkpoint import HUB_NAME
from deltakeeper.codecs import CODECS, Codec, parse_codec
from deltakeeper.codecs.fields import settings_of
from deltakeeper.codecs.sum import SumCodec
from deltakeeper.errors import CodecError
from deltakeeper.manifest import Manifest, Source
from deltakeeper.safetensors_header import DTYPES

LIBRARY = "deltakeeper"
"""Files whose bytes the card counts: all but tokenizer, card, and the report, whose size varies with its timings."""

_GROUPS = {"embedding": "embeddings", "head": "output head", "linear": "linear layers"}
_IMPORTED = {
    "import-peft": ("LoRA adapter, imported from PEFT", "https://arxiv.org/abs/2106.09685", "lora"),
    "import-bitdelta": ("BitDelta, imported from its own file", "https://arxiv.org/abs/2402.10193", "bitdelta"),
}
_WARNING = """\
Compressing a delta moves a fine-tune back towards its base, unevenly. That may weaken a backdoor or a broken refusal,
and it may as well leave one whole or weaken a safety fine-tune. **Compression is not a safety guarantee unless it was
measured on this very artifact**, by an evaluation of attacks and of the skill alike; nothing here says that it was."""


def write_card(folder: str | Path, command: str | None = None) -> Path:
    """Write the card of an artifact into its folder, from its manifest and, where there is one, its report.

    Args:
        folder: an artifact.
        command: the command that made it; told from the manifest by default.

    Raises:
        ArtifactError: it is no artifact.
    """
    path = Path(folder)
    artifact = open_artifact(path)
    manifest = artifact.manifest
    try:
        report = json.loads((path / REPORT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        report = None  # the card leaves out what only the report knows
    sizes = artifact.file_sizes
    text = card_text(manifest, report if isinstance(report, dict) else None, sizes=sizes, command=command)
    (path / CARD_NAME).write_text(text, encoding="utf-8")
    return path / CARD_NAME


def card_text(
    manifest: Manifest,
    report: Mapping[str, Any] | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    command: str | None = None,
) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        manifest: the artifact's manifest.
        report: its `delta_report.json`, for the figures of fidelity; they are left out without it.
        sizes: bytes by file of the artifact; the payload's alone, from the manifest, by default.
        command: the command that made it; told from the manifest by default.
    """
    payload = sum(record.stored_bytes for record in manifest.tensors.values())
    sizes = sizes or {"payload": payload}
    sections = [
        _front_matter(manifest),
        _title(manifest),
        "## Method\n\n" + _method(manifest),
        "## Size\n\n" + _sizes(manifest, sizes),
        "## Fidelity\n\n" + _fidelity(manifest, report),
        "## Use\n\n" + _use(manifest, command),
        "## Safety\n\n" + _WARNING,
    ]
    return "\n\n".join(sections) + "\n"


def hub_name(source: Source) -> str | None:
    """The hub name `org/name` of a model, or None if it came from a local folder, which has no revision."""
    return (
        source.name_or_path.partition("@")[0] if source.revision and HUB_NAME.fullmatch(source.name_or_path) else None
    )


def _front_matter(manifest: Manifest) -> str:
    lines = ["---", f"library_name: {LIBRARY}"]
    if base := hub_name(manifest.base):
        lines += [f"base_model: {base}", "base_model_relation: adapter"]
    tags = dict.fromkeys([LIBRARY, "delta-compression", *_codec_names(manifest.codec)])
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _title(manifest: Manifest) -> str:
    name = Path(manifest.target.name_or_path.partition("@")[0]).name or "fine-tune"
    revision = f", revision `{manifest.base.revision}`" if manifest.base.revision else ""
    return (
        f"# {_plain(name)}, as a compressed delta\n\n"
        f"The difference between the fine-tune `{_code(manifest.target.name_or_path)}` and its base "
        f"`{_code(manifest.base.name_or_path)}`{revision}, compressed with `{_code(manifest.codec)}`. It needs that "
        f"very base: fingerprint `{manifest.base.root}`."
    )


def _method(manifest: Manifest) -> str:
    spellings = dict.fromkeys([manifest.codec, *(r.codec for r in manifest.tensors.values() if r.codec)])
    lines = ["| method | settings | paper |", "|---|---|---|"]
    for spelling in spellings:
        if spelling in _IMPORTED:
            title, paper, _ = _IMPORTED[spelling]
            lines.append(f"| {title} | as in the source | {paper} |")
            continue
        for codec in _codecs(spelling):
            settings = f"`{_code(spelling)}`" if codec is None else _settings(codec)
            title, paper = ("unknown here", "") if codec is None else (codec.title, codec.paper)
            lines.append(f"| {title} | {settings} | {paper} |")
    taken = sum(record.encoding == "base" for record in manifest.tensors.values())
    notes = [f"Made by {_plain(manifest.created_by)}, format of the artifact: `delta_config.json`."]
    if taken:
        notes.append(f"{taken} tensors are the base's although the fine-tune's differ, as the options asked.")
    if manifest.missing:
        notes.append(f"{len(manifest.missing)} tensors of the base are not in the fine-tune.")
    return "\n".join(lines) + "\n\n" + " ".join(notes)


def _sizes(manifest: Manifest, sizes: Mapping[str, int]) -> str:
    records = [r for r in manifest.tensors.values() if r.encoding != "tied"]
    weights = sum(math.prod(r.shape) for r in records)
    full = sum(math.prod(r.shape) * DTYPES[r.dtype].itemsize for r in records)
    total = sum(sizes.values())
    ratio = f"{full / total:.1f} times smaller than" if total else "of"
    bits = f", {8 * total / weights:.2f} bits a weight" if weights else ""
    groups: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for record in records:
        group = groups[_GROUPS.get(record.role, "norms, biases, others")]
        group[0] += 1
        group[1] += math.prod(record.shape) * DTYPES[record.dtype].itemsize
        group[2] += record.stored_bytes
    lines = [f"{total:,} bytes, {ratio} the fine-tune's {full:,} bytes{bits}. The files:", ""]
    lines += ["| file | bytes |", "|---|---:|", *(f"| `{name}` | {size:,} |" for name, size in sorted(sizes.items()))]
    lines += ["", "| group | tensors | bytes in the fine-tune | bytes here |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {n:,} | {whole:,} | {stored:,} |" for name, (n, whole, stored) in sorted(groups.items())]
    return "\n".join(lines) + "\n\nTokenizer files and this card are not counted."


def _fidelity(manifest: Manifest, report: Mapping[str, Any] | None) -> str:
    exact = (
        "Decoding is exact: every machine gets the bytes whose hashes `delta_config.json` lists."
        if manifest.exact
        else "Decoding goes through matrix products, so that the last bit may differ between machines."
    )
    total = (report or {}).get("total")
    rows = {
        "relative_error": "relative error of the delta (Frobenius)",
        "cosine": "cosine of decoded and true delta",
        "norm_ratio": "norm of the decoded delta over that of the true one",
        "sign_agreement": "share of changed weights whose sign of change is kept",
        "zero_fraction": "share of weights that had not changed",
    }
    found = {label: total[key] for key, label in rows.items() if isinstance(total, Mapping) and key in total}
    found = {label: value for label, value in found.items() if isinstance(value, int | float)}
    if not found:
        return exact + " How near it is to the fine-tune was not measured."
    table = [
        "| over all weights that the base has | |",
        "|---|---:|",
        *(f"| {k} | {v:.4f} |" for k, v in found.items()),
    ]
    return "\n".join(table) + "\n\n" + exact


def _use(manifest: Manifest, command: str | None) -> str:
    base, tuned, codec = (
        shlex.quote(_code(t)) for t in (manifest.base.name_or_path, manifest.target.name_or_path, manifest.codec)
    )
    made = command
    if made is None and manifest.codec in _IMPORTED:
        made = f"deltakeeper import {tuned} --base {base} -o DELTA"
    elif made is None and None not in _codecs(manifest.codec):
        made = f"deltakeeper compress {base} {tuned} -o DELTA --codec {codec}"
    parts = [
        f"Give the fine-tune back as a checkpoint that transformers loads:\n\n```sh\npip install {LIBRARY}\n"
        f"deltakeeper apply {base} DELTA -o TUNED\n```\n\n`DELTA` is this folder or its hub name."
    ]
    if made:
        parts.append(f"It was made by:\n\n```sh\n{made}\n```")
    return "\n\n".join(parts)


def _codecs(spelling: str) -> list[Codec | None]:
    try:
        codec = parse_codec(spelling)
    except CodecError:
        return [None]  # a codec that this installation does not have
    return list(codec.parts) if isinstance(codec, SumCodec) else [codec]


def _codec_names(spelling: str) -> list[str]:
    if spelling in _IMPORTED:
        return [_IMPORTED[spelling][2]]
    return [part.partition(":")[0] for part in spelling.split("+") if part.partition(":")[0] in CODECS]


def _settings(codec: Codec) -> str:
    found = settings_of(type(codec)).items()
    return ", ".join(f"`{name}={setting.spell(getattr(codec, name))}`" for name, setting in found) or "none"


def _code(text: str) -> str:
    return re.sub(r"[`\r\n]", "", text)


def _plain(text: str) -> str:
    return re.sub(r"[\r\n|<>\[\]]", " ", text).strip()
