"""Alembic's folder: how the state's tables came to be as they are, step by step; run when a state is opened."""
