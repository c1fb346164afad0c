"""How often the 95 % intervals over attack seeds hold the truth, in a model whose truth is known.

Every fine-tune has a shift of its own, every prompt has one, and an answer is a coin thrown by both (logistic). Seeds
and prompts are crossed, as in a study. Prints the table of docs/statistics.md.

    python benchmarks/coverage.py
"""

from __future__ import annotations

import argparse

import numpy as np

from deltakeeper.evals.stats import CrossedSample, Estimate, Floats, crossed_estimate, paired_bootstrap

BASE = 0.1
WORLDS = {
    "neither differs": (0.0, 0.0),
    "seeds differ": (1.0, 0.0),
    "prompts differ": (0.0, 1.5),
    "both differ": (0.7, 1.5),
}


def chances(shift: Floats) -> list[Floats]:
    """Chance of the event in the fine-tune and in what is served, for a shift of seed and prompt."""
    return [1 / (1 + np.exp(-(level + slope * shift))) for level, slope in ((1.5, 0.5), (-0.3, 1.0))]


def kept(x: Floats) -> Floats:
    """Retention of the attack."""
    return (x[2] - x[0]) / (x[1] - x[0])


def truth(of_seeds: float, of_prompts: float) -> float:
    """Retention over endlessly many seeds and prompts."""
    rng = np.random.default_rng(0)
    shift = rng.normal(0, of_seeds, 2_000_000) + rng.normal(0, of_prompts, 2_000_000)
    tuned, served = (p.mean() for p in chances(shift))
    return (served - BASE) / (tuned - BASE)


def draw(rng: np.random.Generator, seeds: int, prompts: int, of_seeds: float, of_prompts: float) -> Floats:
    """Events `(arms, seeds, prompts)` of one study."""
    tuned, served = chances(rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, of_prompts, (1, prompts)))
    base = np.broadcast_to(rng.random(prompts) < BASE, tuned.shape)
    return np.stack([base, rng.random(tuned.shape) < tuned, rng.random(tuned.shape) < served]).astype(float)


def pooled(values: Floats, seed: int) -> Estimate:
    """What comes out if seeds and prompts are taken for so many independent prompts."""
    flat = values.reshape(3, -1)
    return paired_bootstrap(lambda w: kept(flat @ w.T / w.sum(1)), flat.shape[1], seed=seed, resamples=300)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=60)
    args = parser.parse_args()
    print("| | " + " | ".join(f"{n} seeds" for n in (3, 5, 8)) + " | 5 seeds, all answers as if independent |")
    print("|---|---|---|---|---|")
    for name, spread in WORLDS.items():
        real, row, naive = truth(*spread), [], 0
        for seeds in (3, 5, 8):
            rng = np.random.default_rng(seeds)
            hits = 0
            for trial in range(args.trials):
                values = draw(rng, seeds, args.prompts, *spread)
                got, _ = crossed_estimate(kept, [CrossedSample(values)], seed=trial, resamples=400)
                hits += got.low <= real <= got.high
                if seeds == 5:
                    flat = pooled(values, trial)
                    naive += flat.low <= real <= flat.high
            row.append(hits)
        print(f"| {name} | " + " | ".join(f"{hits / args.trials:.3f}" for hits in [*row, naive]) + " |", flush=True)


if __name__ == "__main__":
    main()
