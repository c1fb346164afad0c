"""This package's engine: the base, and one-bit tenants mixed in one batch."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
import transformers
import workload

BUDGET = 12 << 30


def main() -> None:
    """Run the base, or tenants that lie in memory before the clock starts."""
    work = workload.parse(("base", "tenants"))
    try:
        from deltakeeper.engine import Engine, EngineSettings, Request
        from deltakeeper.engine.store import TenantStore
        from deltakeeper.kernels import backend
        from deltakeeper.overlay import attach
    except ImportError as error:
        workload.absent(f"the engine is not there: {error}")
    made = sorted((work.peers / "tenants" / work.model.name).glob("t*[0-9]"))
    if work.tenants and not made:
        workload.absent(f"no tenants are in {work.peers / 'tenants'}: run serving_setup.py")
    # More tenants than artifacts read the same file, each into memory of its own: the work is that of different ones.
    folders = {f"t{i}": made[i % len(made)] for i in range(work.tenants)}
    torch.set_num_threads(work.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.bfloat16).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(work.model)
    more: dict[str, Any] = {"rss_before_tenants_mib": workload.memory()["rss_mib"]}
    if folders:
        more["artifacts"] = len(set(folders.values()))
    overlay = store = None
    if folders:
        overlay = attach(model)
        store = TenantStore(overlay, byte_budget=BUDGET)
        started = time.perf_counter()
        for name, folder in folders.items():
            store.register(name, folder)
            loaded = store.load(name)
            while not loaded.done():
                store.poll()
                time.sleep(0.001)
            loaded.result()
        more["load_s_per_tenant"] = (time.perf_counter() - started) / len(folders)
        more["bytes_per_tenant"] = store.stats().resident_bytes // len(folders)
        more["rss_with_tenants_mib"] = workload.memory()["rss_mib"]
    settings = EngineSettings(
        kv_bytes=_kv_bytes(model, work), max_running=work.batch, prefix_sharing=False, threads=work.threads
    )
    engine = Engine(model, tokenizer, overlay=overlay, store=store, settings=settings)
    tenants = [f"t{i}" for i in work.tenant_of] if folders else [None] * work.batch

    def run(prompts: workload.Prompts, new: int) -> int:
        asked = [
            Request(tuple(prompt), tenant=tenant, max_new_tokens=new, ignore_eos=True)
            for prompt, tenant in zip(prompts, tenants, strict=True)
        ]
        return sum(len(answer.tokens) for answer in engine.generate(asked))

    samples = workload.measure(work, run)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    workload.report(work, samples, versions, kernels=asdict(backend()), **more, **workload.memory())


def _kv_bytes(model: Any, work: workload.Workload) -> int:
    """Twice what the requests need, so that blocks that are half full fit too."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * width  # keys and values, two bytes each
    return 2 * token * (work.batch + 1) * (work.prompt + work.new + 32)


if __name__ == "__main__":
    main()
