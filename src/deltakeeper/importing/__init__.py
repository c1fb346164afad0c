"""Deltas that other tools wrote, as artifacts: PEFT's LoRA adapters and BitDelta's `.pt` files."""

from deltakeeper.importing.write import import_delta

__all__ = ["import_delta"]
