"""The demo: what compressing the delta does to three attacks and to usefulness, on a real model, in minutes.

It is the study in `data/studies/demo.yaml`, run as any study is, with the report that shows one seed in full.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from rich.console import Console

from deltakeeper.errors import RunError
from deltakeeper.report.html import render
from deltakeeper.report.terminal import print_summary
from deltakeeper.study.file import RecipeUse, StudyFile, read_study
from deltakeeper.study.progress import Progress
from deltakeeper.study.run import run_study
from deltakeeper.study.store import RunStore


def load_demo() -> StudyFile:
    """The demo's study, as the package carries it."""
    text = (files("deltakeeper") / "data" / "studies" / "demo.yaml").read_text(encoding="utf-8")
    return read_study(yaml.safe_load(text), "the demo's study")


def demo_study(attacks: tuple[str, ...] | None = None, harmful: str | None = None) -> StudyFile:
    """The demo's study with other recipes in every group, or with other held-out harmful requests."""
    study = load_demo()
    if attacks:
        known = {use.recipe: use for group in study.groups for use in group.recipes}
        uses = {name: known.get(name) or RecipeUse(recipe=name) for name in attacks}
        own = [{use.recipe for use in group.recipes} for group in study.groups]
        groups = []
        for number, (group, names) in enumerate(zip(study.groups, own, strict=True)):
            # The first group takes any recipe; later ones add arms to recipes of their own.
            chosen = tuple(use for name, use in uses.items() if number == 0 or name in names)
            if chosen:
                groups.append(group.model_copy(update={"recipes": chosen}))
        study = study.model_copy(update={"groups": tuple(groups)})
    if harmful:
        study = study.model_copy(update={"prompts": study.prompts.model_copy(update={"harmful": harmful})})
    return study


def run_demo(out: Path, console: Console, attacks: tuple[str, ...] | None = None, harmful: str | None = None) -> Path:
    """Run (or finish) the demo into folder `out`; gives the path of its report.

    Args:
        out: run folder.
        console: where bars and the summary go.
        attacks: recipes in place of the demo's three.
        harmful: a prompt set to ask instead of the package's held-out harmful requests.

    Raises:
        DataError: a recipe is unknown, or the prompt set cannot be read.
        RunError: an arm failed.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    study = demo_study(attacks, harmful)
    options = "".join(f" --attack {name}" for name in attacks or ())
    options += f" --harmful {harmful}" if harmful else ""
    with Progress(console) as progress:
        outcome = run_study(study, out, progress, command=f"deltakeeper demo --out {out}{options}")
    if outcome.failures:
        name, said = next(iter(outcome.failures.items()))
        raise RunError(f"{len(outcome.failures)} arms failed, the first is {name}: {said}")
    store = RunStore(out)
    digest = render(store, str(store.read_run().versions["date"]))
    print_summary(digest, console)
    console.print(f"\nReport: [link={store.report_html.resolve().as_uri()}]{store.report_html}[/link]")
    return store.report_html
