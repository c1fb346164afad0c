"""Tables of the HTTP service in docs/results.md, from records in the forms of service_load.py and service_soak.py."""

from __future__ import annotations

import json

MACHINE = {"cpu": "a processor", "cores": 2, "memory_gib": 24.0, "torch": "2.13.0"}


def timed(*rates, **more):
    return [{"tokens_s": rate, "seconds": 2.0, **more} for rate in rates]


def wait(requests, first, between, failed=0):
    spread = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    return {
        "requests": requests,
        "failed": failed,
        "first_token_s": {name: first * value for name, value in spread.items()},
        "between_tokens_s": {name: between * value for name, value in spread.items()},
    }


def window(flooded, rate, first, **statuses):
    asked = sum(statuses.values())
    found = {"flooded": flooded, "seconds": 20.0, "quiet_tokens_s": rate, "quiet_first_token_s": {"p95": first}}
    return found | {"other_asked": asked, "other_statuses": {code[1:]: count for code, count in statuses.items()}}


def flood(*windows):
    rates = [one["quiet_tokens_s"] for one in windows]
    return {"windows": list(windows), "ratios": [b / a for a, b in zip(rates[::2], rates[1::2], strict=True)]}


LOAD = {
    "workload": {"threads": 1, "tenants": 32},
    "overhead": {
        "prompt": 32,
        "new": 64,
        "requests": 32,
        "rounds": 3,
        "load_average": 0.5,
        "contests": {
            "engine": timed(100.0, 200.0, 300.0),
            "streams": timed(90.0, 196.0, 270.0, service_cpu_s=2.5, client_cpu_s=0.125),
            "whole": timed(100.0, 198.0, 285.0, service_cpu_s=2.0, client_cpu_s=0.0625),
        },
        "ratios": {"streams": [0.9, 0.98, 0.9], "whole": [1.0, 0.99, 0.95]},
        "median_ratio": {"streams": 0.9, "whole": 0.99},
    },
    "latency": {
        "prompt": 32,
        "new": [16, 48],
        "part": 0.6,
        "load_average": 0.5,
        "closed": {"clients": 32, "requests_s": 5.0, **wait(300, 0.1, 0.01)},
        "open": {"rate": 3.0, "warm": wait(150, 0.05, 0.02, failed=2), "cold": wait(0, 1.0, 1.0)},
    },
    "fairness": {
        "side_by_side": 4,
        "flood": 10,
        "load_average": 0.5,
        "quotas": flood(window(False, 50.0, 0.1, _200=40), window(True, 45.0, 0.2, _200=40, _429=360)),
        "line": flood(window(False, 50.0, 0.1, _200=40), window(True, 30.0, 0.4, _200=80)),
    },
}
REST = {"seconds": 600.0, "files": 15, "threads": 16, "loads": 100, "evictions": {"room": 60, "unloaded": 5}}
SOAK = {
    "workload": {"minutes": 60, "tenants": 64, "clients": 32, "admins": 1, "known_answers": 780},
    "requests": {
        "admin GET /admin: 200": 7,
        "whole: answered": 1000,
        "whole: 503 model_not_loaded": 3,
        "whole: 429": 4,
    },
    "faults": {"status 500": 2},
    "told": [[120.0, "status 500", "what | it\n was `then`"], [180.0, "status 500", "what | it\n was `then`"]],
    "memory": {"rss_mib": {"early": 600.0, "late": 606.0, "growth": 0.01, "mib_per_hour": 7.25}},
    "rests": [REST, REST | {"seconds": 3600.0, "files": 16, "loads": 9000, "evictions": {"room": 7000, "unloaded": 5}}],
    "minutes": [
        {"seconds": float(60 * i), "rss_mib": rss} for i, rss in enumerate([500.0] * 10 + [601.0, 615.5, 603.0])
    ],
    "passed": {"no 500": False, "memory is flat": True},
}


def page(measured, folder, name, rows):
    record = {"command": f"python benchmarks/{name}.py", "date": "2026-11-26", "machine": MACHINE, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(record))
    return measured.results_pages(folder)["results.md"]


def cells(text, start):
    [line] = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_overhead_is_told_round_by_round(measured, tmp_path):
    text = page(measured, tmp_path, "service-load", LOAD)
    assert cells(text, "engine alone") == ["200 (100 to 300)", "", "", "", "2.00"]
    assert cells(text, "HTTP, streamed") == ["196 (90.0 to 270)", "0.90 (0.90 to 0.98)", "2.50", "0.125", "2.00"]
    assert cells(text, "HTTP, in one piece")[1] == "0.99 (0.95 to 1.00)"


def test_waits_are_percentiles_and_loops_without_requests_are_left_out(measured, tmp_path):
    text = page(measured, tmp_path, "service-load", LOAD)
    assert cells(text, "closed, 5.00 requests/s") == ["300", "0.100", "0.200", "0.300", "0.0100", "0.0200", "0.0300"]
    assert cells(text, "open, 3.00 requests/s, warm")[:2] == ["150 (2 more failed)", "0.0500"]
    assert "requests/s, cold" not in text and "60 % of the rate" in text


def test_a_flood_is_told_with_what_was_kept_and_refused(measured, tmp_path):
    text = page(measured, tmp_path, "service-load", LOAD)
    past = cells(text, "past its quota")
    assert past[2:] == ["0.90 (0.90 to 0.90)", "0.100 and 0.200", "400 (360 refused)"]
    assert cells(text, "without quotas")[2:] == ["0.60 (0.60 to 0.60)", "0.100 and 0.400", "80 (0 refused)"]


def test_parts_that_were_not_measured_are_left_out(measured, tmp_path):
    text = page(measured, tmp_path, "service-load", {key: LOAD[key] for key in ("workload", "fairness")})
    assert "Who keeps what" in text and "What HTTP costs" not in text and "How long" not in text


def test_a_soak_tells_what_failed_as_plainly_as_what_held(measured, tmp_path):
    text = page(measured, tmp_path, "service-soak", SOAK)
    assert "- no 500: **no**" in text and "- memory is flat: yes" in text
    assert "Faults: status 500 2. Of the first 2" in text
    assert text.count("- status 500, first after 2 minutes: `what | it was 'then'`") == 1
    assert cells(text, "whole") == ["answered 1,000; 429 4; 503 model_not_loaded 3"]
    assert cells(text, "`admin GET /admin`") == ["200 7"]
    assert "32 clients and 1 administrator" in text and "12 prompts" in text and "1,014 requests, 9,000 loads" in text
    assert "7,005 deltas" in text and "15 and 16 open files" in text
    assert "resident 600.0 and 606.0 MiB (+1.00 %; a straight line" in text and "+7.2 MiB an hour" in text
    assert "between 601.0 and 615.5 MiB" in text  # what was before the first rest is warm-up


def test_a_crowd_is_told_by_kind_of_request_with_what_failed_and_was_refused(measured, tmp_path):
    def entry(method, name, requests, failed=0):
        seconds = {"p50": 0.5, "p95": 2.0, "p99": 4.0}
        return {"method": method, "name": name, "requests": requests, "failed": failed, "seconds": seconds}

    work = {"tenants": 3, "users": 9, "spawn_rate": 2, "seconds": 60, "tokens": 32, "threads": 1, "locust": "2.47.0"}
    rows = {"workload": work, "service_cpu_s": 55.5, "load_average": 2.5}
    rows["entries"] = [
        entry("SSE", "first token", 40),
        entry("POST", "/v1/completions", 30, failed=2),
        entry("POST", "/v1/completions refused 503", 5),
    ]
    text = page(measured, tmp_path, "service-locust", rows)
    assert "9 users of locust 2.47.0" in text and "3 one-bit tenants" in text and "on\n1 thread." in text
    assert "Of 35 requests 2 failed and 5 were refused." in text and "55.5 s of CPU time" in text
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert lines[0] == "| `POST /v1/completions` | 30 | 2 | 0.500 | 2.00 | 4.00 |"
    assert lines[2] == "| first token | 40 | 0 | 0.500 | 2.00 | 4.00 |"
