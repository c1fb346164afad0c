"""Judges: what decides whether an answer is a refusal, or does what was asked."""

from deltakeeper.evals.judges.base import LABELS, Asked, Judge, Label, Verdict, events_of
from deltakeeper.evals.judges.keyword import KeywordJudge, normalise
from deltakeeper.evals.judges.loader import load_judge, load_judges, parse_judge

__all__ = [
    "LABELS",
    "Asked",
    "Judge",
    "KeywordJudge",
    "Label",
    "Verdict",
    "events_of",
    "load_judge",
    "load_judges",
    "normalise",
    "parse_judge",
]
