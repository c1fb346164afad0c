"""Published defences against fine-tuning attacks, as transforms of a delta: what codecs are compared with.

Importing this package registers the built-in ones.
"""

from deltakeeper.defences.antidote import Antidote
from deltakeeper.defences.base import DEFENCES, Defence, Defended, Module, register_defence
from deltakeeper.defences.data import DefenceData
from deltakeeper.defences.interpolation import Interpolation
from deltakeeper.defences.modules import Modules
from deltakeeper.defences.norm_matched import NormMatched
from deltakeeper.defences.report import DefenceReport
from deltakeeper.defences.resta import Resta
from deltakeeper.defences.run import defend
from deltakeeper.defences.safe_delta import SafeDelta
from deltakeeper.defences.safelora import SafeLora
from deltakeeper.defences.spelling import parse_defence, spell

__all__ = [
    "DEFENCES",
    "Antidote",
    "Defence",
    "DefenceData",
    "DefenceReport",
    "Defended",
    "Interpolation",
    "Module",
    "Modules",
    "NormMatched",
    "Resta",
    "SafeDelta",
    "SafeLora",
    "defend",
    "parse_defence",
    "register_defence",
    "spell",
]
