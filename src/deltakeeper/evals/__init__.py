"""Evaluation: prompts, generation, outcomes, judges and probes; knows nothing of compression."""
