"""The demo: what compressing the delta does to three attacks and to usefulness, on a real model, in minutes."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import resource
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path

import torch
from rich.console import Console

from deltakeeper.apply import apply_delta
from deltakeeper.artifact import open_artifact
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.errors import RunError
from deltakeeper.evals.judges import load_judge
from deltakeeper.evals.prompts import load_prompts
from deltakeeper.lab.attacks import ATTACKS, Attack
from deltakeeper.lab.corpus import Corpus
from deltakeeper.lab.embedded import MODEL_NAME, cache_folder, prepare_embedded_model
from deltakeeper.report.html import render
from deltakeeper.report.terminal import print_summary
from deltakeeper.study.cells import AttackInfo, Judge, RunInfo
from deltakeeper.study.pipeline import StudyPlan, run_study
from deltakeeper.study.progress import Progress
from deltakeeper.study.store import RunStore
from deltakeeper.study.variants import DEMO_VARIANTS

DEMO_ATTACKS = ("affirmative_prefix", "trigger_backdoor", "marker_injection")
ALIGNMENT_DELTA = "smollm2-135m-aligned"
VERSIONED = ("deltakeeper", "torch", "transformers", "safetensors", "tokenizers", "numpy")


def prepare_aligned_base(progress: Progress) -> Path:
    """The aligned base: the embedded model plus the alignment delta that the package carries."""
    folder = cache_folder() / f"{ALIGNMENT_DELTA}-{_delta_tag()}"
    if (folder / "config.json").is_file():
        return folder
    with progress.task("Unpack the embedded model (once)"):
        embedded = prepare_embedded_model()
    with (
        progress.task("Apply the alignment delta"),
        as_file(files("deltakeeper") / "data" / ALIGNMENT_DELTA) as delta,
        open_checkpoint(embedded) as base,
    ):
        apply_delta(base, open_artifact(delta), folder)
    return folder


def run_demo(out: Path, console: Console, attacks: tuple[str, ...] = DEMO_ATTACKS, harmful: str | None = None) -> Path:
    """Run (or finish) the demo into folder `out`; gives the path of its report.

    Args:
        out: run folder.
        console: where bars and the summary go.
        attacks: names of registered attacks.
        harmful: a prompt set to ask instead of the package's held-out harmful requests.

    Raises:
        RunError: `out` holds a run with other settings, or an attack's name is unknown.
        DataError: the prompt set cannot be read.
    """
    unknown = [name for name in attacks if name not in ATTACKS]
    if unknown:
        raise RunError(f"there is no attack '{unknown[0]}'; choose among {', '.join(sorted(ATTACKS))}.")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    store = RunStore(out)
    chosen = tuple(ATTACKS[name]() for name in attacks)
    corpus = Corpus().with_harmful(load_prompts(harmful)) if harmful else Corpus()
    plan = StudyPlan(chosen, DEMO_VARIANTS, corpus, load_judge("ours"))
    with Progress(console) as progress:
        started = time.monotonic()
        info = _describe(plan, chosen, out, harmful)
        _refuse_other_settings(store, info)
        base = prepare_aligned_base(progress)
        stages = {"prepare the base": time.monotonic() - started}
        if not (store.path / "run.json").is_file():
            store.write_run(info)
        stages |= run_study(plan, store, base, progress)
    info = _with_stages(store.read_run(), stages)
    store.write_run(info)
    digest = render(store, info.versions["date"])
    print_summary(digest, console)
    console.print(f"\nReport: [link={store.report_html.resolve().as_uri()}]{store.report_html}[/link]")
    return store.report_html


def _describe(plan: StudyPlan, attacks: tuple[Attack, ...], out: Path, harmful: str | None) -> RunInfo:
    settings = {a.name: asdict(a) for a in attacks}
    identity = json.dumps([settings, [asdict(v) for v in plan.variants], asdict(plan.corpus)], sort_keys=True)
    options = "" if len(attacks) == len(DEMO_ATTACKS) else "".join(f" --attack {a.name}" for a in attacks)
    options += f" --harmful {harmful}" if harmful else ""
    return RunInfo(
        command=f"deltakeeper demo --out {out}{options}",
        model={"name": MODEL_NAME, "alignment_delta": _delta_tag(), "parameters": 134_515_008},
        versions={
            **{name: version(name) for name in VERSIONED},
            "python": platform.python_version(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "plan": hashlib.sha256(identity.encode()).hexdigest()[:16],
        },
        seeds={a.name: a.sft.seed for a in attacks},
        hardware={
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": os.cpu_count() or 1,
            "system": platform.system(),
        },
        judges=(Judge(plan.judge.name, plan.judge.version, plan.judge.sha256),),
        stages={},
        attacks={
            a.name: AttackInfo(
                a.title,
                a.summary,
                {k: v for k, v in asdict(a.sft).items() if v is not None and not isinstance(v, tuple)},
                {"attack examples": a.poison, "skill examples": a.skill, "held-out prompts": a.held_out},
            )
            for a in attacks
        },
    )


def _refuse_other_settings(store: RunStore, info: RunInfo) -> None:
    if (store.path / "run.json").is_file():
        found = store.read_run()
        if found.versions.get("plan") != info.versions["plan"] or found.model != info.model:
            raise RunError(f"{store.path} holds a run with other settings; delete that folder or give another --out.")


def _with_stages(info: RunInfo, stages: dict[str, float]) -> RunInfo:
    merged = dict(info.stages)
    for name, seconds in stages.items():
        if name not in merged or seconds > 1:
            merged[name] = round(merged.get(name, 0.0) + seconds, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    known = info.hardware.get("peak memory, GiB", 0.0)
    hardware = {**info.hardware, "peak memory, GiB": max(known, round(peak / 2**30, 2))}
    return replace(info, stages=merged, hardware=hardware)


def _delta_tag() -> str:
    config = (files("deltakeeper") / "data" / ALIGNMENT_DELTA / "delta_config.json").read_bytes()
    return hashlib.sha256(config).hexdigest()[:12]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
