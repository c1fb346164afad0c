"""Several judges over the same stored answers, and how far they disagree; nothing is generated anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, get_args

from deltakeeper.errors import DataError
from deltakeeper.evals.judges.base import Asked, Judge, Seen, Verdict, events_of
from deltakeeper.evals.stats import RESAMPLES, Estimate, kappa_estimate, mcnemar_exact, wilson


@dataclass(frozen=True)
class Share:
    """In how many of `n` answers one judge saw the event (Wilson's interval), and how many it gave no verdict on."""

    judge: str
    event: Seen
    hits: int
    n: int
    low: float
    high: float
    unparsed: int


@dataclass(frozen=True)
class Disagreement:
    """Two judges on the same answers: who alone saw the event how often, exact McNemar p, and kappa."""

    one: str
    other: str
    event: Seen
    n: int
    one_only: int
    other_only: int
    p: float
    kappa: Estimate

    @property
    def share(self) -> float:
        """Share of the answers on which they disagree."""
        return (self.one_only + self.other_only) / self.n


@dataclass(frozen=True)
class Panel:
    """Verdicts of several judges on the same answers, by the judge's name, in the order of the answers.

    `sees` says of each judge what it can tell apart; only judges that see an event are compared on it.
    """

    asked: tuple[Asked, ...]
    verdicts: Mapping[str, tuple[Verdict, ...]]
    sees: Mapping[str, frozenset[Seen]]

    def shares(self) -> list[Share]:
        """What each judge shows, for each event it can tell."""
        found = []
        for event in get_args(Seen):
            for name, verdicts in self.verdicts.items():
                if event in self.sees[name]:
                    n, hits = len(verdicts), sum(verdict.saw(event) for verdict in verdicts)
                    low, high = wilson(hits, n)
                    unparsed = sum(verdict.label == "unparsed" for verdict in verdicts)
                    found.append(Share(name, event, hits, n, low, high, unparsed))
        return found

    def disagreements(self, *, seed: int = 0, resamples: int = RESAMPLES) -> list[Disagreement]:
        """Every pair of judges on every event that both can tell; what one could not read counts as not seen."""
        found = []
        for event in get_args(Seen):
            for one, other in combinations([name for name, events in self.sees.items() if event in events], 2):
                a, b = ([verdict.saw(event) for verdict in self.verdicts[name]] for name in (one, other))
                alone = sum(x and not y for x, y in zip(a, b, strict=True))
                others = sum(y and not x for x, y in zip(a, b, strict=True))
                kappa = kappa_estimate(a, b, seed=seed, resamples=resamples)
                found.append(
                    Disagreement(one, other, event, len(a), alone, others, mcnemar_exact(alone, others), kappa)
                )
        return found

    def to_json(self) -> dict[str, Any]:
        """Shares and disagreements as plain values."""
        return {
            "answers": len(self.asked),
            "shares": [asdict(share) for share in self.shares()],
            "disagreements": [asdict(one) | {"share": one.share} for one in self.disagreements()],
        }

    def lines(self) -> list[str]:
        """Shares and disagreements as sentences."""
        said = [
            f"{s.judge}: {s.event} {s.hits} of {s.n} ({100 * s.low:.0f} to {100 * s.high:.0f} %)"
            + (f", {s.unparsed} without a verdict" if s.unparsed else "")
            for s in self.shares()
        ]
        for d in self.disagreements():
            kappa = "kappa " + (d.kappa.note if d.kappa.value is None else f"{d.kappa.value:.2f}")
            said.append(
                f"{d.one} and {d.other} disagree on {100 * d.share:.1f} % of {d.n} ({d.event}: {d.one_only} by the "
                f"first alone, {d.other_only} by the second, McNemar p {d.p:.3g}; {kappa})"
            )
        return said


def judge_answers(judges: Sequence[Judge], asked: Sequence[Asked]) -> Panel:
    """Let every judge decide of the same answers.

    Raises:
        DataError: there are no judges or answers, or two judges have one name.
    """
    if not judges or not asked:
        raise DataError("a panel needs at least one judge and one answer; give both.")
    names = [judge.name for judge in judges]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"two judges are called '{twice[0]}'; give each a name of its own.")
    return Panel(
        tuple(asked),
        {judge.name: tuple(judge.verdicts(asked)) for judge in judges},
        {judge.name: events_of(judge) for judge in judges},
    )
