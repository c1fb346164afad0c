"""Tables and figures of docs/results.md, from records in the forms of benchmarks/kernels.py and serving.py."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
MACHINE = {"cpu": "a processor", "cores": 2, "memory_gib": 24.0, "torch": "2.13.0"}
KERNELS = {
    "backend": "avx512bf16",
    "rounds": 7,
    "clock": "wall",
    "errors": {"gaussian: y, bfloat16 ulps, worst": 0.5, "gaussian: delta term, relative": 0.00123},
    "timings": [
        {
            "rows": rows,
            "tenants": tenants,
            "threads": threads,
            "ms": ms,
            "range": {name: [0.9 * value, 1.2 * value] for name, value in ms.items()},
        }
        for threads in (1, 2)
        for rows, tenants, ms in (
            (1, 1, {"torch base": 4.0, "base": 5.0, "1 bit alone": 1.0}),
            (1, 1, {"separate models": 4.0, "base": 5.0, "tenants": 6.0}),
            (64, 64, {"separate models": 256.0, "base": 10.0, "tenants": 40.0}),
        )
    ],
}


def contest(name, peer, tokens_s, *, tenants=0, batch=32, model="smollm2-135m", **more):
    found = {"name": name, "peer": peer, "mode": "", "model": model, "batch": batch, "tenants": tenants}
    found |= {"remark": "", "slow": False}
    if tokens_s:
        for rate in ("tokens_s", "decode_tokens_s"):
            known = [value for value in tokens_s if value is not None]
            found |= {rate: sorted(known)[len(known) // 2], f"{rate}_rounds": tokens_s}
            found |= {f"{rate}_min": min(known), f"{rate}_max": max(known)}
        found |= {"first_token_s": 0.25, "peak_rss_mib": 900.0, "versions": {"torch": "2.13.0"}}
    return found | more


SERVING = {
    "workload": {
        "prompt": 32,
        "new": 64,
        "threads": 2,
        "repeats": 2,
        "slow_rounds": 2,
        "rounds": 3,
        "sampling": "greedy, end-of-text ignored",
        "dtype": "bfloat16",
    },
    "environment": {"cpu_flags": [], "load_average": [1.25, 1.0, 1.0]},
    "contests": [
        contest("ours base x32", "ours", [100.0, 110.0, 90.0]),
        contest("llama.cpp base x32", "llamacpp", [50.0, None, 60.0], failed_rounds=["it ended with 1"]),
        contest(
            "ours 1-bit T=32",
            "ours",
            [80.0, 90.0, 70.0],
            tenants=32,
            bytes_per_tenant=20_000_000,
            rss_before_tenants_mib=1000.0,
            rss_with_tenants_mib=1800.0,
            load_s_per_tenant=0.125,
            kernels={"name": "compiled", "isa": "avx512bf16", "reason": ""},
        ),
        contest("peft LoRA T=32", "peft_lora", [10.0, 9.0], tenants=32, bytes_per_tenant=40_000_000, slow=True),
        contest("vllm base x32", "vllm_cpu", None, absent="python is not there"),
        contest("hf generate base x1", "hf", None, batch=1, model="llama-1b", failed="no answer within 1800 s"),
    ],
}


@pytest.fixture
def pages(measured, tmp_path):
    def write(**records):
        for name, rows in records.items():
            value = {"command": f"python {name}.py", "date": "2026-11-26", "machine": MACHINE, "rows": rows}
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return measured.results_pages(tmp_path)

    return write


def row(text, start):
    """The cells of the only table row that begins so."""
    [line] = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_benchmarks_without_a_record_are_left_out(pages, measured):
    found = pages()
    assert found == {"results.md": measured.OPENING}


def test_products_are_told_beside_both_bases(pages):
    text = pages(kernels=KERNELS)["results.md"].split("### 2 threads")[0]
    assert "kernels `avx512bf16`" in text
    assert row(text, "gaussian: delta term, relative")[1] == "0.00123"
    assert row(text, "1 bit alone")[1] == "1.00 (0.25, 0.20)"
    assert row(text, "64")[1:] == [
        "256 (230 to 307)",
        "10.0 (9.00 to 12.0)",
        "40.0 (36.0 to 48.0)",
        "**6.40**",
        "4.00",
    ]


def test_ratios_are_of_one_round_and_of_the_same_requests(pages):
    text = pages(serving=SERVING)["results.md"]
    ratios = text.split("Ours over theirs")[1].split("Not measured")[0]
    rows = [line for line in ratios.splitlines() if line.startswith("| ours ")][1:]
    assert [line.split(" | ")[:2] for line in rows] == [
        ["| ours base x32", "llama.cpp base x32"],
        ["| ours 1-bit T=32", "ours base x32"],
        ["| ours 1-bit T=32", "peft LoRA T=32"],
    ]
    assert rows[0].startswith("| ours base x32 | llama.cpp base x32 | **1.75** | 1.50 to 2.00 |")  # not 100 to 110
    assert rows[0].endswith("| 2 |") and "**0.80**" in rows[1] and "8.00 to 10.00" in rows[2]


def test_memory_and_what_is_missing_are_told(pages):
    text = pages(serving=SERVING)["results.md"]
    assert "20.0 (process: 26.2) | loaded in 0.125 s each |" in text
    assert "failed in 1 round" in text and "torch 2.13.0; our kernels: avx512bf16; load average at the end: 1.2" in text
    assert "- vllm base x32: absent, python is not there" in text
    assert "- hf generate base x1: failed, no answer within 1800 s" in text


def test_figures_are_pictures_that_stand_alone(pages):
    found = pages(kernels=KERNELS, serving=SERVING)
    assert set(found) == {"results.md", "kernels.svg", "serving.svg"} and found == pages()
    for name in ("kernels.svg", "serving.svg"):
        assert f"]({name})" in found["results.md"]
        root = ElementTree.fromstring(found[name])
        assert "http" not in found[name].replace("http://www.w3.org/2000/svg", "")
        _, _, width, height = (float(number) for number in root.get("viewBox").split())
        words = {text.text: text for text in root.iter("{http://www.w3.org/2000/svg}text")}
        assert all(0 <= float(text.get("x", 0)) <= width for text in words.values())
        assert all(0 <= float(text.get("y", 0)) <= height for text in words.values())
    texts = ElementTree.fromstring(found["kernels.svg"]).iter("{http://www.w3.org/2000/svg}text")
    assert {"separate models", "tenants", "1 thread", "64"} <= {text.text for text in texts}
    bars = ElementTree.fromstring(found["serving.svg"]).iter("{http://www.w3.org/2000/svg}rect")
    widths = [float(bar.get("width")) for bar in bars]
    assert len(widths) == 4 and widths[0] / widths[3] == pytest.approx(10, rel=0.02)


def test_answers_over_http_are_told_beside_those_in_process_with_what_parted(pages):
    run = {"dtype": "float32", "arm": "one-bit", "items": 4, "seconds": {"http": 20.0, "in process": 30.0}}
    scores = {
        "http": {"acc, none": 0.5, "acc_norm, none": 0.25},
        "in process": {"acc, none": 0.75, "acc_norm, none": 0.0},
    }
    apart = {"numbers": 8, "worst": 2.5e-5, "mean": 1e-5, "worst_by_token": 2e-6, "same_greedy": 8, "same_choice": 3}
    parted = [{"item": 2, "token": 17, "margin": 0.0625, "http": " a|b", "in process": "\n"}, {"item": 3, "token": 5}]
    parted[1] |= {"http": "the", "in process": "end"}
    rows = {
        "codec": "bitdelta:bits=1",
        "new_tokens": 160,
        "tasks": [{"task": "gsm8k_local", "items": 4, "shots": 3}],
        "runs": [
            run | {"task": "piqa_local", "client": "local-completions", "scores": scores} | apart,
            run | {"client": "local-chat-completions", "scores": scores, "same_answers": 2, "parted": parted},
        ],
    }
    text = pages(**{"service-lm-eval-float32": rows})["results.md"]
    assert "4 items of `gsm8k_local` (3 shots)" in text and "rounds once" not in text
    assert row(text, "float32, one-bit, `local-completions`")[1:] == [
        *("0.500, 0.250", "0.750, 0.000", "3 of 4", "8", "2.5e-05", "1.0e-05", "2.0e-06")
    ]
    [told, *others] = [line for line in text.splitlines() if line.startswith("| float32, one-bit, `local-chat-comp")]
    assert "| 2 of 4 | 20.0 | 30.0 |" in told and len(others) == 2
    rows["runs"][0] |= {"dtype": "bfloat16", "mean_from_float32": {"http": 0.125, "in process": 0.25}}
    rounded = pages(**{"service-lm-eval-bfloat16": rows})["results.md"].split("rounds once")[1]
    assert row(rounded, "bfloat16, one-bit, `local-completions`")[1:] == ["0.125", "0.250"]
    assert "| 2 | 17 | `' a\\|b'` | `'\\n'` | 0.062 |" in others[0] and others[1].endswith("| none: one ends |")
