"""Public test support: conformance checks for codecs and layouts."""

from deltakeeper.testing.conformance import check_codec, check_layout

__all__ = ["check_codec", "check_layout"]
