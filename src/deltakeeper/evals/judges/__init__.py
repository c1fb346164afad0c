"""Judges: what decides whether an answer is a refusal."""

from deltakeeper.evals.judges.keyword import KeywordJudge, Verdict, normalise
from deltakeeper.evals.judges.loader import load_judge, load_judges, parse_judge

__all__ = ["KeywordJudge", "Verdict", "load_judge", "load_judges", "normalise", "parse_judge"]
