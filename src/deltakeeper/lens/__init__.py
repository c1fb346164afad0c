"""Look inside models while they read: residual streams, decoded by the models themselves, of many variants at once."""

from deltakeeper.lens.blocks import find_blocks
from deltakeeper.lens.changes import weights_of
from deltakeeper.lens.decode import Decoded, decode
from deltakeeper.lens.identity import Identity, check_identity
from deltakeeper.lens.models import Compared, Models
from deltakeeper.lens.streams import Streams, capture
from deltakeeper.lens.variants import Compressed, Variants

__all__ = [
    "Compared",
    "Compressed",
    "Decoded",
    "Identity",
    "Models",
    "Streams",
    "Variants",
    "capture",
    "check_identity",
    "decode",
    "find_blocks",
    "weights_of",
]
