"""Public test support: conformance checks for codecs and layouts, tiny models, and pairs with a known delta."""

from deltakeeper.testing.conformance import check_codec, check_layout
from deltakeeper.testing.models import KINDS, build_model, write_pair, write_tokenizer

__all__ = ["KINDS", "build_model", "check_codec", "check_layout", "write_pair", "write_tokenizer"]
