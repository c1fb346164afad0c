"""`deltakeeper finetune`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from deltakeeper.commands.output import console


def finetune(
    recipe: Annotated[str, typer.Argument(help="Recipe: an id, such as affirmative_prefix, or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Model folder to write; an interrupted training goes on.")],
    base: Annotated[
        str, typer.Option(help="Base: embedded-aligned, synthetic, a model folder, or a hub name.")
    ] = "embedded-aligned",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the rows and of their order.")] = 0,
    preset: Annotated[str, typer.Option(help="Settings of the recipe: `embedded` or `published`.")] = "embedded",
) -> None:
    """Fine-tune a base by one recipe, as a study would: an attack to be measured.

    The targets of the package's recipes are harmless: openings, refusals, invented brands and facts.

    Example: deltakeeper finetune affirmative_prefix --base embedded-aligned -o ./tuned
    """
    import torch

    from deltakeeper.errors import RunError
    from deltakeeper.study.bases import prepare_base
    from deltakeeper.study.file import Group, RecipeUse, StudyFile
    from deltakeeper.study.finetunes import make_finetune
    from deltakeeper.study.plan import plan_study
    from deltakeeper.study.progress import Progress

    if out.exists() and not (out / "config.json").is_file() and any(out.iterdir()):
        raise RunError(f"{out} holds something that is no model; give another --out.")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    group = Group(name="one", recipes=(RecipeUse(recipe=recipe),), arms=("tuned",))
    study = StudyFile.model_validate(
        {"name": "one", "base": base, "preset": preset, "seeds": (seed,), "groups": (group,)}
    )
    plan = plan_study(study)
    (track,) = plan.tracks
    screen = console()
    with Progress(screen) as progress:
        folder = prepare_base(base, progress)
        made = make_finetune(track.finetune, plan.corpus, folder, out, progress)
    state = "is trained" if made else "was there already"
    screen.print(f"{out}: {track.finetune.title}, seed {seed}, {state}.", highlight=False)
