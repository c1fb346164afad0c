"""Compress a fine-tune into an artifact: tensors side by side, each read, encoded, decoded again and hashed once."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from deltakeeper.artifact import REPORT_NAME, SIDE_FILES
from deltakeeper.artifact_writer import ArtifactWriter
from deltakeeper.budget import Forecast, Weigh, allocate, check_weigh, forecast, target_bytes, weigh_errors
from deltakeeper.calibration import Calibration
from deltakeeper.card import write_card
from deltakeeper.checkpoint import Checkpoint, opened
from deltakeeper.codecs import Codec, spell
from deltakeeper.compression_report import CompressionReport, TensorReport, peak_memory
from deltakeeper.delta import DeltaPair, pair
from deltakeeper.encode import Encoded, decode_tensor, encode_tensor, working_bytes
from deltakeeper.errors import CheckpointError, CodecError
from deltakeeper.fidelity import Sums, summarise
from deltakeeper.fingerprint import hash_tensor, root_of
from deltakeeper.manifest import Manifest, Source, TensorRecord
from deltakeeper.model_folder import tuned_folder
from deltakeeper.plan import Choice, Rules, choose_codec, in_order
from deltakeeper.survey import survey_delta
from deltakeeper.workers import map_in_order, one_thread_each

__all__ = ["CompressionReport", "compress"]

V = TypeVar("V")
Progress = Callable[[int, int, str], None]
"""Called before each tensor with (tensors done, tensors in all, name of the next)."""


def compress(
    base: Checkpoint | str | Path,
    tuned: Checkpoint | str | Path,
    out: str | Path,
    codec: Codec | str,
    *,
    embeddings: str = "codec",
    norms: str = "dense",
    target_size: str | int | None = None,
    target_ratio: str | float | None = None,
    text: str | Path | None = None,
    weigh: Weigh | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_plan: Callable[[Forecast], None] | None = None,
    workers: int | None = None,
) -> CompressionReport:
    """Compress the difference between two models into the artifact folder `out`.

    Args:
        base: the base model, opened or by name.
        tuned: its fine-tune, opened or by name; a LoRA adapter folder will do.
        out: folder to write; nothing is left there if anything fails.
        codec: a codec or its spelling, such as `bitdelta:bits=2` or `bitdelta+svd:rank=8`; with a target also `auto`.
        embeddings: how input embeddings and heads are stored: `codec` as other matrices, `dense` as the fine-tune has
            them, `base` as the base has them, or the spelling of a codec of their own.
        norms: how norms, biases and other vectors are stored: `dense` as the fine-tune has them, or `base`.
        target_size: the most that the artifact may take, in bytes or as text (`400MB`): the codec's bits, rank or
            density are chosen for each tensor so that the error is least.
        target_ratio: the same as a share of the fine-tune's bytes: 16 means a sixteenth.
        text: calibration text, `.txt` or `.jsonl`: codecs that can, and the choice of settings, weigh errors by what
            layers are fed on it. The fine-tune is loaded for that.
        weigh: with a target, what errors of tensors are multiplied by, by name; and how that is said on the command
            line.
        overwrite: replace an artifact that is there.
        progress: called before each tensor.
        on_plan: called with the plan that a target led to, before anything is encoded.
        workers: tensors that are worked on side by side, torch's number of threads by default. The bytes of the payload
            do not depend on it.

    Raises:
        CheckpointError: a model cannot be read, or the two do not belong together.
        CodecError: a setting of the codec does not fit, or a difference is not finite.
        ArtifactError: `out` exists and may not be replaced.
        DataError: the calibration text cannot be used.
    """
    started = time.monotonic()
    budgeted = target_size is not None or target_ratio is not None
    method = choose_codec(codec, budgeted=budgeted) if isinstance(codec, str) else codec
    rules = Rules(method, embeddings, norms)
    check_weigh(weigh, budgeted=budgeted)
    with (
        opened(base) as origin,
        opened(tuned, base=origin) as target,
        ArtifactWriter(Path(out), overwrite, (origin.path, target.path)) as writer,
        ExitStack() as stack,
    ):
        if origin.path.resolve() == target.path.resolve():
            raise _same(origin, target)
        models = pair(origin, target)
        calibration = None
        if text is not None:
            if not budgeted and not any(codec is not None and codec.uses_inputs for codec in rules.codecs):
                raise CodecError(
                    f"codec '{spell(method)}' does not weigh errors by what layers are fed; leave out the text, or "
                    "give a target size or ratio."
                )
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deltakeeper-")))
            calibration = Calibration(tuned_folder(target, origin, scratch), text)
        goal = target_bytes(models, size=_as_text(target_size), ratio=_as_text(target_ratio))
        if goal is None:
            choices = plan_tensors(models, rules)
        else:
            fed = None if calibration is None else calibration.inputs
            weights = weigh_errors(weigh, models)
            allocation = allocate(models, rules, goal, inputs=fed, weights=weights, progress=progress)
            choices = allocation.choices
            if on_plan:
                on_plan(forecast(models, rules, allocation))
        run = _Run(models, writer)
        for i, (name, encoded, choice) in enumerate(_encode_all(models, choices, calibration, workers)):
            if progress:
                progress(i, len(choices), name)
            run.store(name, encoded, choice, rules)
        manifest = run.manifest(spell(method))
        for file in _side_files(origin.path, target.path):
            writer.copy(file)
        report = {
            "codec": spell(method),
            "seconds": round(time.monotonic() - started, 3),
            "peak_rss": peak_memory(),
            "total": asdict(summarise(list(run.sums.values()))),
            "tensors": {name: asdict(item) for name, item in run.reports.items()},
        }
        if text is not None:
            report["calibration"] = {"text": str(text), "sha256": hashlib.sha256(Path(text).read_bytes()).hexdigest()}
        writer.write_text(REPORT_NAME, json.dumps(report, indent=1, sort_keys=True) + "\n")
        options = {"target-size": target_size, "target-ratio": target_ratio, "text": text}
        options |= {} if weigh is None else {weigh.option: weigh.source}
        command = _command(origin, target, rules, options)
        writer.finish(manifest, lambda folder: write_card(folder, command))
    return CompressionReport.load(Path(out))


def _encode_all(
    models: DeltaPair, choices: Mapping[str, Choice], calibration: Calibration | None, workers: int | None
) -> Iterator[tuple[str, Encoded, Choice]]:
    if calibration is not None and any(c.codec and c.codec.uses_inputs for c in choices.values()):
        yield from _encode_in_turn(models, choices, calibration)
        return
    with one_thread_each() as threads:
        yield from _encode_side_by_side(models, choices, workers or threads)


def _encode_side_by_side(
    models: DeltaPair, choices: Mapping[str, Choice], workers: int
) -> Iterator[tuple[str, Encoded, Choice]]:
    names = in_order(choices)
    found = map_in_order(
        lambda name: encode_tensor(models, name, choices[name]),
        _read_ahead(models, names),
        cost=lambda name: working_bytes(models, name, choices[name]),
        workers=workers,
    )
    return ((name, encoded, choices[name]) for name, encoded in zip(names, found, strict=True))


def _encode_in_turn(
    models: DeltaPair, choices: Mapping[str, Choice], calibration: Calibration
) -> Iterator[tuple[str, Encoded, Choice]]:
    """In the order of the layers, each calibrated on what the compressed layers before it give (as GPTQ does it)."""
    later = [name for name in calibration.names if name in choices]
    for name in [*(n for n in in_order(choices) if n not in later), *later]:
        choice = choices[name]
        wanted = choice.codec is not None and choice.codec.uses_inputs
        encoded = encode_tensor(models, name, choice, calibration.inputs(name) if wanted else None)
        if encoded.record.encoding in ("terms", "base"):
            calibration.update(name, decode_tensor(models, name, encoded))
        yield name, encoded, choice


def _read_ahead(models: DeltaPair, names: Iterable[str]) -> Iterator[str]:
    """The names, each announced to the disk when it is asked for, which is before its turn comes."""
    for name in names:
        models.tuned.read_ahead(name)
        if (origin := models.base_name(name)) is not None:
            models.base.read_ahead(origin)
        yield name


def plan_tensors(models: DeltaPair, rules: Rules) -> dict[str, Choice]:
    """What is done with each tensor of the fine-tune, in the order of its layers.

    Raises:
        CodecError: a tensor was to be taken from the base, which does not have it in this shape.
    """
    choices = {name: rules.decide(models, name) for name in in_order(models.names())}
    asked = {choice.codec for choice in choices.values() if choice.codec is not None and choice.codec.surveys}
    for codec in asked:
        chosen = [name for name, choice in choices.items() if choice.codec == codec]
        spread = codec.spread(survey_delta(models, chosen))
        choices |= {name: Choice("terms", spread[name]) for name in chosen}
    return choices


class _Run:
    """One compression under way: records, figures and hashes as they come."""

    def __init__(self, models: DeltaPair, writer: ArtifactWriter) -> None:
        self.models, self.writer = models, writer
        self.records: dict[str, TensorRecord] = {}
        self.reports: dict[str, TensorReport] = {}
        self.sums: dict[str, Sums] = {}
        self.exact = True
        self.base_leaves: dict[str, str] = {}
        self.target_leaves: dict[str, str] = {}
        self.decoded_leaves: dict[str, str] = {}

    def store(self, name: str, found: Encoded, choice: Choice, rules: Rules) -> None:
        """Write one tensor and keep what the manifest needs of it."""
        record = found.record
        if found.terms:
            records, nbytes, digest = self.writer.add(name, found.terms, found.added)
            own = choice.codec if choice.codec not in (None, rules.codec) else None
            record = replace(
                record,
                terms=records,
                added_rows=0 if found.added is None else len(found.added),
                stored_bytes=nbytes,
                sha256=digest,
                codec=None if own is None else spell(own),
            )
        self.exact = self.exact and found.exact
        self.records[name] = record
        packed = choice.codec is not None and record.encoding == "terms"
        figures = summarise([found.sums]) if packed and found.sums is not None else None
        self.reports[name] = TensorReport(record.encoding, record.stored_bytes, figures)
        if found.sums is not None:
            self.sums[name] = found.sums
        for leaves, key, leaf in (
            (self.base_leaves, record.base_name or name, found.base_leaf),
            (self.target_leaves, name, found.target_leaf),
            (self.decoded_leaves, name, found.decoded_leaf),
        ):
            if leaf is not None:
                leaves[key] = leaf

    def manifest(self, codec: str) -> Manifest:
        """The manifest of what was stored; every tensor of the fine-tune has a record by construction.

        Raises:
            CheckpointError: the two models are the same.
        """
        origin, target = self.models.base, self.models.tuned
        if all(record.encoding in ("unchanged", "tied") for record in self.records.values()):
            raise _same(origin, target)
        missed = set(target.tensors) - set(self.records)
        if missed:
            raise CodecError(f"tensor '{min(missed)}' was left out of the artifact; report this as a bug.")
        self.base_leaves |= {name: hash_tensor(origin, name) for name in self.models.missing}
        return Manifest(
            created_by=f"deltakeeper {version('deltakeeper')}",
            codec=codec,
            base=Source(origin.name_or_path, origin.revision, root_of(self.base_leaves), _sorted(self.base_leaves)),
            target=Source(target.name_or_path, target.revision, root_of(self.target_leaves)),
            reconstruction=Source(
                target.name_or_path, None, root_of(self.decoded_leaves), _sorted(self.decoded_leaves)
            ),
            exact=self.exact,
            tensors=_sorted(self.records),
            missing=tuple(self.models.missing),
        )


def _same(base: Checkpoint, tuned: Checkpoint) -> CheckpointError:
    return CheckpointError(
        f"nothing differs between {tuned.name_or_path} and {base.name_or_path}; give a fine-tune and its base."
    )


def _sorted(values: Mapping[str, V]) -> dict[str, V]:
    return dict(sorted(values.items()))


def _as_text(value: str | float | None) -> str | None:
    return None if value is None else str(value)


def _command(origin: Checkpoint, target: Checkpoint, rules: Rules, options: Mapping[str, object]) -> str:
    """The command line that makes this artifact, for its card."""
    given = {"codec": spell(rules.codec), "embeddings": rules.embeddings, "norms": rules.norms, **options}
    usual = {"embeddings": "codec", "norms": "dense"}
    words = [f"--{name} {value}" for name, value in given.items() if value is not None and usual.get(name) != value]
    return f"deltakeeper compress {origin.name_or_path} {target.name_or_path} -o DELTA {' '.join(words)}"


def _side_files(base: Path, tuned: Path) -> list[Path]:
    """Files of the fine-tune that say what the weights do not, where they differ from the base's."""
    found = []
    for name in SIDE_FILES:
        ours, theirs = base / name, tuned / name
        if theirs.is_file() and (not ours.is_file() or ours.read_bytes() != theirs.read_bytes()):
            found.append(theirs)
    return found
