"""Builds runs of many fine-tunes without a model, with rates that are known: attacks × seeds × arms."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from deltakeeper.study.cells import Answer, AttackInfo, Cell, Fidelity, Judge, Perplexity, Probe, RunInfo
from deltakeeper.study.store import RunStore

SEEDS = (0, 1, 2)
FULL_BYTES = 270_000_000
# attack success and loss of skill of the fine-tune's own 0.8, by arm; the base has neither attack nor skill
ARMS = {
    "base": ("base", 0.02, 0.0, None),
    "tuned": ("tuned", 0.9, 0.8, None),
    "good": ("healed", 0.04, 0.8, 18_000_000),
    "fair": ("codec", 0.4, 0.79, 20_000_000),
    "lossy": ("codec", 0.03, 0.3, 9_000_000),
    "shrink:factor=0.5": ("control", 0.5, 0.5, FULL_BYTES),
    "random_sign": ("control", 0.02, 0.0, 18_000_000),
}
FAMILIES = {"prefix": "alignment", "trigger": "backdoor", "marker": "targeted"}


def probe(role: str, event: str, share: float, n: int, rng: np.random.Generator | None = None, tag: str = "") -> Probe:
    """A probe whose event happens for a share of prompts: the first ones, or random ones where a generator is given."""
    order = np.arange(n) if rng is None else rng.permutation(n)
    hits = set(order[: round(share * n)].tolist())
    return Probe(
        role,
        role,
        event,
        tuple(
            Answer(f"{role}{tag}-{i:04d}", f"kind {i % 4}", f"{role}{tag}{i}", "an answer", "complied", i in hits)
            for i in range(n)
        ),
    )


def cell(
    attack: str,
    variant: str,
    kind: str,
    goal: float,
    skill: float,
    *,
    seed: int = 0,
    n: int = 100,
    over_refusal: float = 0.05,
    stored: int | None = None,
    family: str | None = None,
    rng: np.random.Generator | None = None,
    **changes,
) -> Cell:
    """One cell with the rates given."""
    found = Cell(
        attack=attack,
        family=family or FAMILIES.get(attack, "alignment"),
        variant=variant,
        kind=kind,
        label=f"the arm {variant}",
        bytes=stored,
        full_bytes=FULL_BYTES,
        bits_per_weight=None if stored is None else 16 * stored / FULL_BYTES,
        fidelity=Fidelity(0.6, 0.8, 0.75, 0.99) if kind in ("codec", "healed") else None,
        merge_survival=None,
        probes={
            "goal": probe("goal", "complied", goal, n, rng, attack),
            "skill": probe("skill", "correct", skill, n, rng),
            "harmless": probe("over_refusal", "refused", over_refusal, n, rng),
        },
        perplexity=Perplexity((100.0, 120.0), (40, 50)),
        seconds=1.0,
        seed=seed,
    )
    return replace(found, **changes)


def run_cells(arms=ARMS, attacks=FAMILIES, seeds=SEEDS, **options) -> list[Cell]:
    """Every arm on every attack and seed."""
    return [
        cell(attack, name, kind, goal, skill, seed=seed, stored=stored, family=family, **options)
        for attack, family in dict(attacks).items()
        for seed in seeds
        for name, (kind, goal, skill, stored) in arms.items()
    ]


def run_info(**changes) -> RunInfo:
    """Where such a run would come from."""
    info = RunInfo(
        command="deltakeeper study studies/synthetic.yaml",
        model={"name": "a synthetic base", "parameters": 130_000},
        versions={"deltakeeper": "0.1.0", "date": "2026-01-31"},
        seeds={"training": list(SEEDS)},
        hardware={"cores": 2},
        judges=(Judge("ours", "1", hashlib.sha256(b"phrases").hexdigest()),),
        stages={"evaluate": 1.0},
        attacks={name: AttackInfo(name, f"What {name} does.") for name in FAMILIES},
        primary="fair",
        study="synthetic",
    )
    return replace(info, **changes)


def write_run(folder, cells=None, info=None) -> RunStore:
    """A run folder with these cells."""
    store = RunStore(folder)
    store.write_run(info or run_info())
    for one in cells if cells is not None else run_cells():
        store.write_cell(one)
    return store
