"""Advice: which codec and fidelity a run supports, at what risk and what loss, or that it cannot tell."""

from deltakeeper.advice.choice import advise
from deltakeeper.advice.records import Advice, Arm, Gap, Terms

__all__ = ["Advice", "Arm", "Gap", "Terms", "advise"]
