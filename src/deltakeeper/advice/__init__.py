"""Advice: which codec and fidelity a run supports, at what risk and what loss."""
