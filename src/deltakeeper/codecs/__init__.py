"""Codecs: what to keep of a delta; importing this package registers the built-in ones."""

from deltakeeper.codecs.base import CODECS, Codec, register_codec
from deltakeeper.codecs.bitdelta import BitDelta
from deltakeeper.codecs.controls import RandomSign, Shrink
from deltakeeper.codecs.dare import Dare
from deltakeeper.codecs.dense import DenseCodec
from deltakeeper.codecs.magnitude import Magnitude
from deltakeeper.codecs.spelling import parse_codec, spell
from deltakeeper.codecs.sum import SumCodec
from deltakeeper.codecs.svd import Svd

__all__ = [
    "CODECS",
    "BitDelta",
    "Codec",
    "Dare",
    "DenseCodec",
    "Magnitude",
    "RandomSign",
    "Shrink",
    "SumCodec",
    "Svd",
    "parse_codec",
    "register_codec",
    "spell",
]
