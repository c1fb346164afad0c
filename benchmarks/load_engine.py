"""The engine alone, in a process that makes the same answers as the service beside it, a round for each line it reads.

A line is JSON: `tenants`, `prompts` (token ids) and `new`, one request each; the answer is a line with `seconds` and
`tokens`. Settings are those that `deltakeeper serve` uses.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from deltakeeper.engine import Engine, EngineSettings, Request
from deltakeeper.engine.store import TenantStore
from deltakeeper.live_base import open_base
from deltakeeper.overlay import attach


def main() -> None:
    """Answer until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--deltas", type=Path, required=True)
    parser.add_argument("--kv-bytes", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = open_base(arguments.base)
    overlay = attach(base.model)
    settings = EngineSettings(kv_bytes=arguments.kv_bytes, threads=arguments.threads)
    with TenantStore(overlay, arguments.deltas, byte_budget=4 << 30, base_root=base.root) as store:
        store.scan()
        with Engine(base.model, base.tokenizer, overlay=overlay, store=store, settings=settings) as engine:
            for line in sys.stdin:
                asked = json.loads(line)
                requests = [
                    Request(tuple(prompt), tenant=tenant, max_new_tokens=asked["new"], ignore_eos=True)
                    for tenant, prompt in zip(asked["tenants"], asked["prompts"], strict=True)
                ]
                began = time.perf_counter()
                answers = engine.generate(requests)
                seconds = time.perf_counter() - began
                print(json.dumps({"seconds": seconds, "tokens": sum(len(a.tokens) for a in answers)}), flush=True)


if __name__ == "__main__":
    main()
