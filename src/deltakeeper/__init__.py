"""deltakeeper: compress, measure and serve the difference between a fine-tuned language model and its base."""

from deltakeeper.apply import apply_delta, iterate_changes, iterate_merged, merge_survival
from deltakeeper.artifact import DeltaArtifact, open_artifact
from deltakeeper.attach import Change, attached
from deltakeeper.checkpoint import Checkpoint, open_checkpoint
from deltakeeper.codecs import CODECS, Codec, parse_codec, register_codec, spell
from deltakeeper.compress import CompressionReport, compress
from deltakeeper.errors import DeltakeeperError
from deltakeeper.export import LoraExport, export_lora
from deltakeeper.fingerprint import Fingerprint, fingerprint
from deltakeeper.heal import HealReport, heal
from deltakeeper.hub import pull, push
from deltakeeper.importing import import_delta
from deltakeeper.layouts import LAYOUTS, Layout, register_layout
from deltakeeper.verify import VerifyReport, verify

__version__ = "0.1.0"

__all__ = [
    "CODECS",
    "LAYOUTS",
    "Change",
    "Checkpoint",
    "Codec",
    "CompressionReport",
    "DeltaArtifact",
    "DeltakeeperError",
    "Fingerprint",
    "HealReport",
    "Layout",
    "LoraExport",
    "VerifyReport",
    "__version__",
    "apply_delta",
    "attached",
    "compress",
    "export_lora",
    "fingerprint",
    "heal",
    "import_delta",
    "iterate_changes",
    "iterate_merged",
    "merge_survival",
    "open_artifact",
    "open_checkpoint",
    "parse_codec",
    "pull",
    "push",
    "register_codec",
    "register_layout",
    "spell",
    "verify",
]
