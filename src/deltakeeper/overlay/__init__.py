"""Many fine-tunes on one live Hugging Face decoder: packed terms beside the base's weights, chosen row by row."""

from deltakeeper.overlay.overlay import Overlay, attach
from deltakeeper.overlay.tenant import TenantDelta

__all__ = ["Overlay", "TenantDelta", "attach"]
