"""Calibration: what a model's linear layers are fed on a user's text."""

from deltakeeper.calibration.inputs import Calibration
from deltakeeper.calibration.text import Document, read_text, tokenise

__all__ = ["Calibration", "Document", "read_text", "tokenise"]
