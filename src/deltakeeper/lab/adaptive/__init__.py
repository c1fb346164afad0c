"""Attackers who know the codec: through it, within what it does not see, or in what it leaves as it is."""

from deltakeeper.lab.adaptive.run import clean_examples, probe_examples, train_adaptively, train_rows
from deltakeeper.lab.adaptive.settings import Adaptive, GuardCopy, Repair
from deltakeeper.lab.adaptive.survival import AdaptiveLog, Survival

__all__ = [
    "Adaptive",
    "AdaptiveLog",
    "GuardCopy",
    "Repair",
    "Survival",
    "clean_examples",
    "probe_examples",
    "train_adaptively",
    "train_rows",
]
