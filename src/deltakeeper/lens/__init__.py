"""Look inside models while they read: residual streams, decoded by the models themselves, of many variants at once."""

from deltakeeper.lens.blocks import find_blocks
from deltakeeper.lens.changes import weights_of
from deltakeeper.lens.decode import Decoded, decode
from deltakeeper.lens.delta_patching import sweep_deltas
from deltakeeper.lens.identity import Identity, check_identity
from deltakeeper.lens.models import Compared, Models
from deltakeeper.lens.outcomes import token_margin, token_mass
from deltakeeper.lens.patching import Patching, sweep_streams, sweep_with_controls
from deltakeeper.lens.ranking import LayerRanking, rank_places
from deltakeeper.lens.streams import Streams, capture
from deltakeeper.lens.tuned import Translators
from deltakeeper.lens.tuned_file import read_translators, write_translators
from deltakeeper.lens.tuned_fit import fit_translators
from deltakeeper.lens.variants import Compressed, Variants

__all__ = [
    "Compared",
    "Compressed",
    "Decoded",
    "Identity",
    "LayerRanking",
    "Models",
    "Patching",
    "Streams",
    "Translators",
    "Variants",
    "capture",
    "check_identity",
    "decode",
    "find_blocks",
    "fit_translators",
    "rank_places",
    "read_translators",
    "sweep_deltas",
    "sweep_streams",
    "sweep_with_controls",
    "token_margin",
    "token_mass",
    "weights_of",
    "write_translators",
]
