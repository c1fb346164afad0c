"""Artifacts in the formats of other tools."""

from deltakeeper.export.lora import LoraExport, export_lora

__all__ = ["LoraExport", "export_lora"]
