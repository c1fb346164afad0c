"""Hugging Face transformers: `generate`, its continuous batching, and merged models one after the other."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
import workload

NOISE = 0.02  # of a tensor's standard deviation, as in the tenants


def load(work: workload.Workload) -> Any:
    """The base in bfloat16, with an end-of-text token that ends nothing."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(work.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.bfloat16).eval()
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return model


def generate(model: Any, prompts: workload.Prompts, new: int, **more: Any) -> int:
    """New tokens of one batch."""
    ids = torch.tensor(prompts)  # (batch, prompt)
    with torch.inference_mode():
        said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **more)
    return said.numel() - ids.numel()


def versions() -> dict[str, str]:
    """What ran."""
    return {"transformers": transformers.__version__, "torch": torch.__version__}


def main() -> None:
    """Run one mode."""
    work = workload.parse(("generate", "continuous", "merged"))
    model = load(work)
    if work.mode == "generate":
        samples = workload.measure(work, lambda prompts, new: generate(model, prompts, new))
        workload.report(work, samples, versions(), **workload.memory())
    elif work.mode == "continuous":
        samples = _continuous(model, work)
        workload.report(work, samples, versions(), **workload.memory())
    else:
        _merged(model, work)


def _continuous(model: Any, work: workload.Workload) -> list[Any]:
    """As `generate_batch`, but the manager's own start and end, half a second, are left out of the time."""
    page = 32
    pages = work.batch * -(-(work.prompt + work.new) // page)
    config = transformers.ContinuousBatchingConfig(
        page_size=page,
        num_blocks=pages + 8,
        max_batch_tokens=max(256, work.batch * work.prompt),
        allow_block_sharing=False,
    )
    how = transformers.GenerationConfig(do_sample=False, max_new_tokens=work.new, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(how, continuous_batching_config=config, timeout=5) as manager:

        def run(prompts: workload.Prompts, new: int) -> int:
            manager.add_requests(inputs=prompts, max_new_tokens=new)
            left, made = len(prompts), 0
            while left:
                answer = manager.get_result(timeout=1)
                if answer is None and not manager.is_running():
                    raise SystemExit("transformers' generation thread has ended")
                if answer is not None and answer.is_finished():
                    left, made = left - 1, made + len(answer.generated_tokens)
            return made

        return workload.measure(work, run)


def _merged(model: Any, work: workload.Workload) -> None:
    """A model for each request: its weights are copied in first, and that is not timed."""
    base = [p.detach().clone() for p in model.parameters()]
    generator = torch.Generator()
    swapping = 0.0

    def swap(tenant: int) -> None:
        generator.manual_seed(tenant)
        pool = torch.randn(1 << 24, generator=generator)
        with torch.no_grad():
            for live, kept in zip(model.parameters(), base, strict=True):
                noise = pool.repeat(-(-kept.numel() // len(pool)))[: kept.numel()].view_as(kept)
                live.copy_(kept + NOISE * kept.float().std() * noise)

    def run(prompts: workload.Prompts, new: int) -> int:
        nonlocal swapping
        swapping, made = 0.0, 0
        for tenant, prompt in zip(work.tenant_of, prompts, strict=True):
            started = time.perf_counter()
            swap(tenant)
            swapping += time.perf_counter() - started
            made += generate(model, [prompt], new)
        return made

    samples = workload.measure(work, run, finish=lambda: swapping)
    nbytes = sum(2 * p.numel() for p in base)
    workload.report(work, samples, versions(), bytes_per_tenant=nbytes, **workload.memory())


if __name__ == "__main__":
    main()
