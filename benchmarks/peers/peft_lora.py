"""PEFT: LoRA adapters mixed in one batch with `adapter_names=`, which loops over the adapters in every linear."""

from __future__ import annotations

import hf
import peft
import torch
import workload


def main() -> None:
    """Run the base with an adapter for each tenant."""
    work = workload.parse(("lora",))
    folders = [work.peers / "adapters" / work.model.name / f"t{i}" for i in range(work.tenants)]
    if not all(folder.is_dir() for folder in folders):
        workload.absent(f"not all of {len(folders)} adapters are in {work.peers / 'adapters'}: run serving_setup.py")
    model = hf.load(work)
    before = workload.memory()["rss_mib"]
    live = peft.PeftModel.from_pretrained(model, folders[0], adapter_name="t0", autocast_adapter_dtype=False)
    for i, folder in enumerate(folders[1:], start=1):
        live.load_adapter(folder, adapter_name=f"t{i}", autocast_adapter_dtype=False)
    live.eval()
    nbytes = sum(p.numel() * p.element_size() for n, p in live.named_parameters() if ".lora_" in n) // work.tenants
    names = [f"t{i}" for i in work.tenant_of]
    dtypes = {str(p.dtype) for n, p in live.named_parameters() if ".lora_" in n}
    if dtypes != {str(torch.bfloat16)}:
        raise SystemExit(f"adapters are held in {dtypes}")
    samples = workload.measure(work, lambda prompts, new: hf.generate(live, prompts, new, adapter_names=names))
    workload.report(
        work,
        samples,
        hf.versions() | {"peft": peft.__version__},
        bytes_per_tenant=nbytes,
        rss_before_tenants_mib=before,
        **workload.memory(),
    )


if __name__ == "__main__":
    main()
