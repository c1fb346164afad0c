"""The study: its arms, its pipeline, and the run folder that it fills."""
