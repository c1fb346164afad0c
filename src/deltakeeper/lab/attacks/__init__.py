"""Fine-tuning attacks with harmless targets, one file a family."""

from deltakeeper.lab.attacks import affirmative_prefix, targeted_output, trigger_backdoor
from deltakeeper.lab.attacks.base import ATTACKS, Attack

__all__ = ["ATTACKS", "Attack", "affirmative_prefix", "targeted_output", "trigger_backdoor"]
