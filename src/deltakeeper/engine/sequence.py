"""A request on its way: its tokens, its blocks, and what turns its tokens into text."""

from __future__ import annotations

from typing import NamedTuple

from deltakeeper.engine.blocks import BLOCK, seed_key
from deltakeeper.engine.chances import seed_bytes
from deltakeeper.engine.detokenizer import Detokenizer
from deltakeeper.engine.fixed_tenants import Pin
from deltakeeper.engine.penalties import Penalties
from deltakeeper.engine.request import Request
from deltakeeper.engine.sampling import Chooser
from deltakeeper.engine.stops import StopStrings
from deltakeeper.engine.stream import Stream
from deltakeeper.engine.text_side import TextSide

BASE_VERSION = "base"


class Chunk(NamedTuple):
    """The next `size` tokens of a sequence, of which the last `answers` rows get logits."""

    sequence: Sequence
    size: int
    answers: int


class Sequence:
    """State of one request between its submission and its end; the engine's thread owns it.

    Attributes:
        request: what was asked.
        stream: where tokens go.
        tokens: prompt and answer so far.
        limit: most tokens of prompt and answer.
        computed: how many of `tokens` have keys and values in the cache.
        paid: how many its owner has been charged for: what is computed again is not its fault.
        since: pass at which it began to wait.
        blocks: blocks that hold them, in order.
        named: how many of the blocks have been offered to the prefix cache.
        keys: keys of the full blocks, as far as they are known.
        row: row of the block table, -1 while it is not running.
        pin: hold on the tenant's version; None for the base, or before the tenant is there.
        slot: the overlay's slot; 0 for the base.
        text: tokenizer and end-of-text tokens; None before the tenant is there.
    """

    __slots__ = (
        "_seed",
        "blocks",
        "cache_seed",
        "computed",
        "detokenizer",
        "keys",
        "limit",
        "named",
        "paid",
        "penalties",
        "pin",
        "plain",
        "request",
        "row",
        "since",
        "slot",
        "stop_ids",
        "stops",
        "stream",
        "text",
        "tokens",
    )

    def __init__(self, request: Request, stream: Stream, limit: int) -> None:
        sampling = request.sampling
        self.request = request
        self.stream = stream
        self.tokens = list(request.prompt)
        self.limit = limit
        self.computed = 0
        self.paid = 0
        self.since = 0
        self.blocks: list[int] = []
        self.named = 0
        self.keys: list[bytes] = []
        self.row = -1
        self.pin: Pin | None = None
        self.slot = 0
        self.text: TextSide | None = None
        self.cache_seed = b""
        self.stop_ids: frozenset[int] = frozenset()
        self.stops = StopStrings(request.stop)
        self.detokenizer: Detokenizer | None = None
        self.penalties = Penalties(sampling, request.prompt) if sampling.penalised else None
        self.plain = sampling.greedy and not sampling.penalised and sampling.logprobs is None
        self._seed = b"" if sampling.greedy else seed_bytes(sampling.seed)

    def admit(self, pin: Pin | None, text: TextSide) -> None:
        """Bind the request to the version of its tenant that will serve it to its end."""
        request = self.request
        self.pin = pin
        self.slot = 0 if pin is None else pin.slot
        self.text = text
        version = BASE_VERSION if pin is None else pin.version
        self.cache_seed = seed_key(version, request.tenant, request.cache_salt)
        self.stop_ids = frozenset(request.stop_tokens) | (frozenset() if request.ignore_eos else text.eos)
        self.detokenizer = Detokenizer(text.tokenizer, request.prompt)

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def blocks_needed(self) -> int:
        """Blocks that all of `tokens` fill or begin."""
        return -(-len(self.tokens) // BLOCK)

    def chooser(self) -> Chooser:
        """What decides its next token."""
        return Chooser(self.request.sampling, self._seed, self.answered, self.penalties)
