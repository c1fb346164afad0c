"""The figures of arXiv 2411.19530 that a run stands beside.

The abstract says that, with less than 10 % utility loss, delta compression reduces the risk by up to 66.17 %
(alignment breaking), 64.46 % (backdoors) and 90.53 % (targeted output) for Llama-2-7b-chat. Whether these are points
or shares of the uncompressed rate is not said there, so both readings of ours are given.
"""

from __future__ import annotations

HEADLINES = {"alignment": 0.6617, "backdoor": 0.6446, "targeted": 0.9053}
"""Largest reduction by family."""

LOSS_LIMIT = 0.1
"""Utility loss under which they hold."""
