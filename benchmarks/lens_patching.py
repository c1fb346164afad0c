"""Which layers carry what an attack does to a model: the base's put into its fine-tune, on the prompts of a study.

    python benchmarks/lens_patching.py runs/lens

Takes each attack's first fine-tune that is still in the run folder, asks its goal's held-out prompts, and writes
`benchmarks/results/lens-patching.json`, two figures an attack in `docs/figures`, and for `compress --starve-layers` the
rankings into the run folder. An attack that was patched before is left as it is.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import record

from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.fingerprint import fingerprint
from deltakeeper.lab.corpus import SYSTEM
from deltakeeper.lens import weights_of
from deltakeeper.lens.ranking import Origin
from deltakeeper.lens.restoration import draw_restoration, patch_prompts
from deltakeeper.live_base import open_base
from deltakeeper.study.groups import comparable, group_cells
from deltakeeper.study.store import RunStore

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"


def main() -> None:
    """Patch every attack of a run and write what it gave."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of a study that kept its models")
    parser.add_argument("--base", type=Path, required=True, help="folder of the study's base")
    parser.add_argument("--again", action="store_true", help="also attacks that are there")
    given = parser.parse_args()
    store = RunStore(given.run)
    live = open_base(given.base)
    rows = [] if given.again else record.load("lens-patching").get("rows", [])
    titles = {name: info.title for name, info in store.read_run().attacks.items()}
    for group in group_cells(comparable(store.read_cells())[0]):
        seed = group.seeds[0]
        found = sorted(path for path in (given.run / "models").glob(f"{group.attack}-{seed}-*") if path.is_dir())
        if not found or any(row["attack"] == group.attack for row in rows):
            continue
        with open_checkpoint(found[0]) as checkpoint:
            changes = {"tuned": weights_of(checkpoint)}
            origin = Origin(live.root, live.root, fingerprint(checkpoint).root)
        goal = group.first(group.tuned).probe_of("goal")
        prompts = [answer.prompt for answer in goal.answers]
        patched = patch_prompts(
            live.model, live.tokenizer, prompts, changes, donor="base", receiver="tuned", system=SYSTEM
        )
        value = replace(patched, origin=origin).to_json()
        (given.run / f"patch-{group.attack}.json").write_text(json.dumps(value, indent=1) + "\n")
        rows.append({"attack": group.attack, "title": titles[group.attack], "seed": seed, **value})
        for name, figure in draw_restoration(patched).items():
            figure.save(FIGURES / f"lens-{group.attack}-patched-{name}.svg")
        record.save("lens-patching", rows)


if __name__ == "__main__":
    main()
