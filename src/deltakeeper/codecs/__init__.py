"""Codecs: what to keep of a delta; importing this package registers the built-in ones."""

from deltakeeper.codecs.base import CODECS, Codec, Inputs, RowEncoder, Statistics, register_codec
from deltakeeper.codecs.bitdelta import BitDelta
from deltakeeper.codecs.compeft import ComPeft
from deltakeeper.codecs.controls import RandomSign, Shrink
from deltakeeper.codecs.dare import Dare
from deltakeeper.codecs.delta_come import DeltaCome
from deltakeeper.codecs.deltazip import DeltaZip
from deltakeeper.codecs.dense import DenseCodec
from deltakeeper.codecs.dqrelo import DQRelo
from deltakeeper.codecs.impart import ImPart
from deltakeeper.codecs.magnitude import Magnitude
from deltakeeper.codecs.rtn import Rtn
from deltakeeper.codecs.spelling import parse_codec, spell, wants_text
from deltakeeper.codecs.sum import SumCodec
from deltakeeper.codecs.svd import Svd
from deltakeeper.codecs.ultradelta import UltraDelta

__all__ = [
    "CODECS",
    "BitDelta",
    "Codec",
    "ComPeft",
    "DQRelo",
    "Dare",
    "DeltaCome",
    "DeltaZip",
    "DenseCodec",
    "ImPart",
    "Inputs",
    "Magnitude",
    "RandomSign",
    "RowEncoder",
    "Rtn",
    "Shrink",
    "Statistics",
    "SumCodec",
    "Svd",
    "UltraDelta",
    "parse_codec",
    "register_codec",
    "spell",
    "wants_text",
]
