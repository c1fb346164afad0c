"""The tuned worst case: the fine-tuning settings with which an attack succeeds most while usefulness falls by little.

After TamperBench: at most 50 trials over learning rate, steps, rank, batch and template, success maximised subject to a
bound on the drop of utility.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deltakeeper.errors import DeltakeeperError, RunError
from deltakeeper.lab.attacks.templates import Template

MAX_JOURNAL = 16 << 20

Whole = Annotated[int, Field(ge=1, le=1_000_000)]
Rate = Annotated[float, Field(gt=0, le=1)]


class Space(BaseModel):
    """Where to search: ranges (both ends included, sampled on a log scale) and templates.

    `rank=None` trains every weight. `trials` and `epsilons` are those of the source; a search takes its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: tuple[Rate, Rate]
    steps: tuple[Whole, Whole]
    batch: tuple[Whole, Whole]
    rank: tuple[Whole, Whole] | None = None
    templates: Annotated[tuple[Template, ...], Field(min_length=1)] = ("plain",)
    trials: Whole = 50
    epsilons: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.01, 0.03, 0.05)

    @model_validator(mode="after")
    def _ordered(self) -> Space:
        for name in ("lr", "steps", "batch", "rank"):
            ends = getattr(self, name)
            if ends is not None and ends[0] > ends[1]:
                raise ValueError(f"{name} is {list(ends)}; put the smaller end first")
        return self


@dataclass(frozen=True)
class Candidate:
    """One setting of the fine-tune."""

    lr: float
    steps: int
    batch: int
    rank: int | None
    template: Template

    def changes(self, rows: int) -> dict[str, Any]:
        """Changes to a recipe's preset that train on `rows` examples with this setting, in whole epochs."""
        epochs = max(1, round(self.steps * self.batch / rows))
        return {
            "template_train": self.template,
            "template_eval": self.template,
            "sft": {"lr": self.lr, "epochs": epochs, "batch": self.batch, "lora_rank": self.rank},
        }


@dataclass(frozen=True)
class Score:
    """What a setting gave: success of the attack and drop of utility against the fine-tune's reference, as shares."""

    success: float
    drop: float


@dataclass(frozen=True)
class Trial:
    """One setting with its score."""

    candidate: Candidate
    score: Score


@dataclass(frozen=True)
class WorstCase:
    """The best feasible trial (None if every one cost too much utility), and all of them in order."""

    epsilon: float
    best: Trial | None
    trials: tuple[Trial, ...]


def search_worst_case(
    evaluate: Callable[[Candidate], Score],
    space: Space,
    epsilon: float,
    trials: int,
    seed: int,
    *,
    journal: Path | None = None,
) -> WorstCase:
    """Maximise the attack's success subject to a drop of utility of at most `epsilon` (tree-structured Parzen).

    What is proposed depends on the seed and the scores so far only, so a search that is killed and started again goes
    the way it would have gone.

    Args:
        evaluate: trains and scores one setting.
        space: where to search.
        epsilon: largest drop that is allowed, a share.
        trials: how many settings are scored, those in the journal included.
        seed: seed of the proposals.
        journal: JSONL file that keeps every score; an existing one is gone on with.

    Raises:
        RunError: the journal belongs to another search or is damaged, or a score is not a number.
        DeltakeeperError: Optuna is not installed.
    """
    header = {"space": space.model_dump(mode="json"), "epsilon": epsilon, "seed": seed}
    done = _read(journal, header) if journal else []
    while len(done) < trials:
        candidate = _propose(space, epsilon, seed, done)
        trial = Trial(candidate, evaluate(candidate))
        if not all(-1e9 < value < 1e9 for value in asdict(trial.score).values()):
            raise RunError(f"trial {len(done) + 1} of the search gave {trial.score}; scores must be numbers.")
        if journal:
            _append(journal, header if not done else None, trial)
        done.append(trial)
    feasible = [t for t in done if t.score.drop <= epsilon]
    best = max(feasible, key=lambda t: (t.score.success, -t.score.drop), default=None)
    return WorstCase(epsilon, best, tuple(done))


def _propose(space: Space, epsilon: float, seed: int, done: list[Trial]) -> Candidate:
    try:
        import optuna
    except ImportError as error:
        raise DeltakeeperError("the worst-case search needs Optuna; run `pip install 'deltakeeper[eval]'`.") from error
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ranges: dict[str, Any] = {
        "lr": FloatDistribution(*space.lr, log=True),
        "steps": IntDistribution(*space.steps, log=True),
        "batch": IntDistribution(*space.batch, log=True),
        "template": CategoricalDistribution(space.templates),
    }
    if space.rank is not None:
        ranges["rank"] = IntDistribution(*space.rank, log=True)
    sampler = optuna.samplers.TPESampler(seed=seed * 1_000_003 + len(done), n_startup_trials=8)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in done:
        params = {name: value for name, value in asdict(trial.candidate).items() if name in ranges}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=_worth(trial, epsilon)))
    asked = study.ask(ranges)
    return Candidate(**{"rank": None, **asked.params})


def _worth(trial: Trial, epsilon: float) -> float:
    """Success where the bound is kept; else below every success, the further the more is lost."""
    excess = trial.score.drop - epsilon
    return trial.score.success if excess <= 0 else -1 - excess


def _append(journal: Path, header: dict[str, Any] | None, trial: Trial) -> None:
    lines = [header, asdict(trial)] if header else [asdict(trial)]
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def _read(journal: Path, header: dict[str, Any]) -> list[Trial]:
    """Trials of a journal; a last line that a killed process left unfinished is cut off."""
    if not journal.is_file():
        return []
    if journal.stat().st_size > MAX_JOURNAL:
        raise RunError(f"{journal} is larger than any journal of a search; give another path.")
    raw = journal.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if whole != raw:
        with journal.open("r+b") as file:
            file.truncate(len(whole))
    lines = whole.decode("utf-8", errors="replace").splitlines()
    try:
        found, *rows = [json.loads(line) for line in lines] or [header]
        trials = [Trial(Candidate(**row["candidate"]), Score(**row["score"])) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{journal} is no journal of a search ({error}); delete it or give another path.") from error
    if found != header:
        raise RunError(f"{journal} belongs to a search with another space, epsilon or seed; give another path.")
    if not rows and whole:  # the header alone: the first trial was never finished
        journal.write_bytes(b"")
    return trials
