"""Apply a defence to a fine-tune: a new folder, written tensor by tensor, that any codec can then compress."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from deltakeeper.artifact import SIDE_FILES
from deltakeeper.artifact_writer import as_bytes, explain_writing, publish, refuse_existing
from deltakeeper.calibration import Calibration
from deltakeeper.calibration.inputs import load_tokenizer
from deltakeeper.checkpoint import Checkpoint, opened
from deltakeeper.defences.base import Defence
from deltakeeper.defences.data import DefenceData
from deltakeeper.defences.modules import Modules, kept
from deltakeeper.defences.report import REPORT_NAME, DefenceReport, TensorReport
from deltakeeper.defences.spelling import parse_defence, spell
from deltakeeper.delta import DeltaPair, pair
from deltakeeper.errors import DataError
from deltakeeper.fidelity import Sums, compare_rows, summarise
from deltakeeper.model_folder import tuned_folder
from deltakeeper.model_writer import ModelWriter, Planned, names_in_order

Progress = Callable[[int, int, str], None]


def defend(
    defence: Defence | str,
    base: Checkpoint | str | Path,
    tuned: Checkpoint | str | Path,
    out: str | Path,
    *,
    unaligned: Checkpoint | str | Path | None = None,
    rows: DefenceData | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DefenceReport:
    """Write what a defence makes of a fine-tune: a model folder in the fine-tune's dtypes, with a report beside it.

    Arithmetic is float32 with one rounding at the end. One tensor of each model is in memory at a time, and a whole
    model only where the defence runs one on rows.

    Args:
        defence: the defence, or its spelling.
        base: the aligned base.
        tuned: its fine-tune, or a LoRA adapter.
        out: folder to write; nothing is left there if anything fails.
        unaligned: the base before its alignment, for defences that compare with it.
        rows: text for defences that run a model on it.
        overwrite: replace a model that is there.
        progress: called with (tensors done, in all, name of the next).

    Raises:
        DataError: the defence is unknown, needs something that was not given, or gives what the dtype cannot hold.
        CheckpointError: the models do not fit together or hold NaN or infinity, or one of them cannot be run.
        CodecError: a codec that the defence uses does not fit.
        ArtifactError: `out` may not be replaced or cannot be written.
    """
    started = time.monotonic()
    method = parse_defence(defence) if isinstance(defence, str) else defence
    _check_needs(method, unaligned is not None, rows)
    target = Path(out)
    with ExitStack() as stack:
        origin = stack.enter_context(opened(base))
        goal = stack.enter_context(opened(tuned, base=origin))
        before = None if unaligned is None else stack.enter_context(opened(unaligned))
        sources = (origin.path, goal.path, *(() if before is None else (before.path,)))
        models = pair(origin, goal)
        twin = pair(before, origin) if before is not None and method.uses_unaligned else None
        stack.enter_context(explain_writing(target))
        refuse_existing(target, overwrite, "model", sources)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent)))
        calibration = _calibrate(method, models, rows, scratch)
        modules = Modules(method, models, twin=twin, calibration=calibration)
        folder = scratch / "model"
        folder.mkdir()
        tensors, total = _write(method, modules, folder, progress)
        used = None if rows is None or method.uses_rows is None else rows.sha256(method.uses_rows)
        report = DefenceReport(target, spell(method), used, summarise([total]), tensors, time.monotonic() - started)
        names = {"base": origin, "tuned": goal} | ({} if before is None or twin is None else {"unaligned": before})
        _complete(folder, models, report, {side: model.name_or_path for side, model in names.items()})
        publish(folder, target)
    return report


def _check_needs(defence: Defence, has_unaligned: bool, rows: DefenceData | None) -> None:
    if defence.uses_unaligned and not has_unaligned:
        raise DataError(
            f"defence '{defence.name}' compares the base with the model before its alignment; give it as --unaligned."
        )
    kind = defence.uses_rows
    if kind and not (rows and (rows.safe if kind == "safe" else rows.harmful)):
        files = "requests or conversations as --harmful" + (", or conversations as --safe" if kind == "safe" else "")
        raise DataError(f"defence '{defence.name}' runs a model on {kind} rows; give {files}.")


def _calibrate(defence: Defence, models: DeltaPair, rows: DefenceData | None, scratch: Path) -> Calibration | None:
    kind = defence.uses_rows
    if kind is None or rows is None:
        return None
    folder = models.base.path if defence.runs == "base" else tuned_folder(models.tuned, models.base, scratch)
    tokens = rows.rows(kind, load_tokenizer(folder))
    return Calibration(folder, tokens, samples=len(tokens))


def _write(
    defence: Defence, modules: Modules, folder: Path, progress: Progress | None
) -> tuple[dict[str, TensorReport], Sums]:
    """Write all tensors; gives what became of each, and the sums of all that have a base."""
    models = modules.models
    stored = [name for name in models.names() if name not in models.tied]
    infos = models.tuned.tensors
    planned = {
        name: Planned(infos[name].st_dtype, infos[name].shape, infos[name].nbytes)
        for name in names_in_order(stored, models.tied)
    }
    found = {alias: TensorReport("tied", {}) for alias in models.tied}
    total = Sums()
    methods = defence.spread(modules)
    order = [*modules.names, *(name for name in stored if name not in methods)]
    with ModelWriter(folder, planned) as writer:
        for done, name in enumerate(order):
            if progress:
                progress(done, len(order), name)
            value, found[name] = _treat(methods, modules, name, defence)
            total += _compared(models, name, value)
            for copy in (name, *(alias for alias, of in models.tied.items() if of == name)):
                writer.write(copy, 0, as_bytes(value))
    return dict(sorted(found.items())), total


def _treat(
    methods: Mapping[str, Defence], modules: Modules, name: str, defence: Defence
) -> tuple[torch.Tensor, TensorReport]:
    if name not in methods:
        value, is_base = kept(modules.models, name, defence.others)
        return value, TensorReport("base" if is_base else "tuned", {})
    weights, details, altered = [], [], False
    for part in modules.parts(name):
        made = methods[name].defend(part)
        weights.append(part.tuned if made.weight is None else made.weight)
        details.append(made.detail)
        altered |= made.weight is not None
    detail = {key: sum(d.get(key, 0.0) for d in details) / len(details) for key in details[0]}
    if not altered:
        return kept(modules.models, name, "tuned")[0], TensorReport("unchanged", detail)
    value = modules.join(name, weights)
    if not bool(torch.isfinite(value).all()):
        raise DataError(
            f"defence '{spell(defence)}' gives '{name}' values that {modules.models.tuned.tensors[name].st_dtype} "
            "cannot hold; choose smaller settings."
        )
    return value, TensorReport("defended", detail)


def _compared(models: DeltaPair, name: str, value: torch.Tensor) -> Sums:
    origin = models.base_name(name)
    if origin is None or not value.ndim:
        return Sums()
    return compare_rows(models.base.read(origin), models.tuned.read(name), value)


def _complete(folder: Path, models: DeltaPair, report: DefenceReport, names: Mapping[str, str]) -> None:
    """Add configuration and tokenizer, the fine-tune's before the base's, and the report with the models' names."""
    for file in SIDE_FILES:
        source = next((m.path / file for m in (models.tuned, models.base) if (m.path / file).is_file()), None)
        if source is not None:
            shutil.copyfile(source, folder / file)
    value = {**names, **report.to_json()}
    (folder / REPORT_NAME).write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
