"""Continuous batching for a live transformers decoder and the tenants of an overlay on it."""

from deltakeeper.engine.engine import Engine
from deltakeeper.engine.fixed_tenants import FixedTenants, Tenants
from deltakeeper.engine.request import QueueFullError, Request, Sampling
from deltakeeper.engine.settings import EngineSettings
from deltakeeper.engine.stats import EngineStats
from deltakeeper.engine.stream import Completion, Logprobs, Stream, Token

__all__ = [
    "Completion",
    "Engine",
    "EngineSettings",
    "EngineStats",
    "FixedTenants",
    "Logprobs",
    "QueueFullError",
    "Request",
    "Sampling",
    "Stream",
    "Tenants",
    "Token",
]
