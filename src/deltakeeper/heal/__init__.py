"""Healing: refit the continuous values of a compressed delta to what its fine-tune, or two teachers, say."""

from deltakeeper.heal.guard import GuardReport, guard
from deltakeeper.heal.guard_settings import GuardSettings
from deltakeeper.heal.lessons import Lesson
from deltakeeper.heal.run import HealReport, heal

__all__ = ["GuardReport", "GuardSettings", "HealReport", "Lesson", "guard", "heal"]
