"""How long many variants of one delta take, asked as tenants of one engine, beside one merged model; prints JSON.

    python benchmarks/variants.py --tuned runs/demo/models/affirmative_prefix-0-... --rounds 3

Everybody is asked the same prompts as in a study. Rounds are interleaved, so that what else the machine does falls on
all alike; processor time is given beside wall time, since it says more on a machine that others use as well. `merged`
counts what a merged model costs before it answers: its weights put together from the artifact. It is asked by the
engine, and once more by transformers alone, as most evaluations are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import record
import torch
from rich.console import Console

from deltakeeper.artifact import open_artifact
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.compress import compress
from deltakeeper.lab.corpus import SYSTEM, Corpus
from deltakeeper.study.arms import Arm, Arms
from deltakeeper.study.bases import prepare_base
from deltakeeper.study.file import Group, RecipeUse, StudyFile
from deltakeeper.study.plan import plan_study
from deltakeeper.study.progress import Progress
from deltakeeper.study.variants import read_arm

VARIANTS = (
    "bitdelta:bits=1",
    "bitdelta:bits=2",
    {"codec": "bitdelta:bits=4", "planes": 1},
    {"codec": "bitdelta:bits=4", "planes": 2},
    {"codec": "bitdelta:bits=4", "planes": 3},
    {"codec": "bitdelta:bits=4", "name": "bitdelta:bits=4"},
    "bitdelta:bits=1,scale=row",
    "bitdelta:bits=1+svd:rank=8",
    "svd:rank=4",
    "svd:rank=8",
    "svd:rank=16",
    "random_sign",
)
"""Twelve fidelities of one delta."""


def measure(arms: Arms, made: Sequence[Arm], recipe: str, prompts: int) -> tuple[float, float, list[Any]]:
    """Wall and processor seconds of asking some arms together, all that belongs to it counted, and what they said."""
    group = Group(name="one", recipes=(RecipeUse(recipe=recipe),), arms=("tuned",))
    sizes = {"held_out": prompts, "contrast": prompts}
    study = StudyFile.model_validate({"name": "variants", "prompts": sizes, "groups": (group,)})
    (track,) = plan_study(study).tracks
    probes = track.finetune.attack.probes(Corpus())
    texts = [row.prompt for row in Corpus().passages[:12]]
    started, worked = time.perf_counter(), time.process_time()
    said: list[Any] = []
    with arms.asked(made) as panel:
        for probe in probes:
            rows = [row.prompt for row in probe.rows]
            for at in range(0, len(rows), 32):
                some = rows[at : at + 32]
                said.append(panel.answers(some, max_new_tokens=probe.max_new_tokens, system=SYSTEM))
        said.append(panel.nlls(texts))
    return time.perf_counter() - started, time.process_time() - worked, said


def agreement(together: list[Any], alone: list[Any], number: int) -> dict[str, float]:
    """How an arm's answers in the batch compare with those of its merged model."""
    pairs = [
        (a, b)
        for batch, one in zip(together[:-1], alone[:-1], strict=True)
        for a, b in zip(batch[number], one[0], strict=True)
    ]
    ours, theirs = together[-1][number][0], alone[-1][0][0]
    gaps = [abs(a - b) / max(1e-9, abs(b)) for a, b in zip(ours, theirs, strict=True)]
    return {"equal_answers": sum(a == b for a, b in pairs) / len(pairs), "largest_relative_nll_gap": max(gaps)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tuned", type=Path, required=True, help="folder of a fine-tune of the base")
    parser.add_argument("--base", default="embedded-aligned")
    parser.add_argument("--recipe", default="affirmative_prefix")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--singles", action="store_true", help="ask every variant alone as well, once")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/variants.json as well")
    given = parser.parse_args()
    with Progress(Console(stderr=True)) as progress:
        folder = prepare_base(given.base, progress)
    variants = [read_arm(arm) for arm in VARIANTS]
    wall: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch, open_checkpoint(folder) as origin, torch.inference_mode():
        made = []
        for variant in variants:
            place = Path(scratch) / str(variant.codec)
            if not place.is_dir():
                compress(origin, given.tuned, place, str(variant.codec))
            made.append(Arm(variant, open_artifact(place), given.tuned))
        merged = replace(made[0].variant, kind="merged", name="merged")
        arms, plain = Arms(origin, "engine"), Arms(origin, "transformers")
        for loading in (arms, plain):
            measure(loading, [Arm(read_arm("base"))], given.recipe, 1)
        said: dict[str, list[Any]] = {}
        for number in range(given.rounds):
            one = [Arm(merged, made[0].artifact, given.tuned)]
            for name, by, some in (
                ("merged", arms, one),
                ("together", arms, made),
                ("merged, transformers", plain, one),
                ("base", arms, [Arm(read_arm("base"))]),
            ):
                took, worked, said[name] = measure(by, some, given.recipe, given.prompts)
                wall.setdefault(name, []).append(took)
                processor.setdefault(name, []).append(worked)
                sys.stderr.write(f"round {number}: {name} {took:.1f} s, processor {worked:.1f} s\n")
            if number == 0 and given.singles:
                singles = [measure(arms, [arm], given.recipe, given.prompts)[:2] for arm in made]
                for column, found in zip(zip(*singles, strict=True), (wall, processor), strict=True):
                    found["one by one"] = [sum(column)]
    middle = {name: statistics.median(found) for name, found in processor.items()}
    rows = {
        "variants": [variant.name for variant in variants],
        "prompts_each": given.prompts,
        "wall_seconds": wall,
        "processor_seconds": processor,
        "ratios_of": "median processor seconds",
        "together_over_merged": middle["together"] / middle["merged"],
        "together_over_as_many_merged": middle["together"] / middle["merged"] / len(variants),
        "together_over_merged_by_transformers": middle["together"] / middle["merged, transformers"],
        "together_over_base": middle["together"] / middle["base"],
        "one_by_one_over_merged": middle["one by one"] / middle["merged"] if "one by one" in middle else None,
        "first_variant_beside_its_merged_model": agreement(said["together"], said["merged"], 0),
    }
    if given.save:
        record.save("variants", rows)
    print(json.dumps({"machine": record.machine(), **rows}, indent=1))


if __name__ == "__main__":
    main()
