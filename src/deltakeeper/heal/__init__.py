"""Healing: refit the continuous values of a compressed delta to what its fine-tune says on a text."""

from deltakeeper.heal.run import HealReport, heal

__all__ = ["HealReport", "heal"]
