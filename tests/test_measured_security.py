"""Tables of defences and studies in docs/results.md, from records in the forms of their benchmarks."""

from __future__ import annotations

import json

MACHINE = {"cpu": "a processor", "cores": 2, "memory_gib": 24.0, "torch": "2.13.0"}


def page(measured, folder, name, rows):
    record = {"command": f"python benchmarks/{name}.py", "date": "2026-01-02", "machine": MACHINE, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(record))
    return measured.results_pages(folder)["results.md"]


def test_defences_stand_beside_each_other(measured, tmp_path):
    def row(attack, arm, events):
        return {
            "attack": attack,
            "arm": arm,
            "probes": {role: {"events": events, "n": 32} for role in ("goal", "skill", "over_refusal")},
        }

    rows = [row("marker_injection", "base", 1), row("other", "base", 2), row("other", "resta", 3)]
    text = page(measured, tmp_path, "defences", rows)
    assert "| arm | Targeted output | other |" in text
    assert "| `base` | 1 of 32 / 1 of 32 / 1 of 32 | 2 of 32 / 2 of 32 / 2 of 32 |" in text
    assert "| `resta` |  | 3 of 32 / 3 of 32 / 3 of 32 |" in text


def test_a_study_stands_behind_the_benchmarks(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(measured.study, "section", lambda summary, name, _: f"{summary['study']} as {name}")
    monkeypatch.setattr(measured.study, "figures", lambda summary, name: {f"{name}-backdoor.svg": "<svg/>"})
    (tmp_path / "embedded-summary.json").write_text(json.dumps({"study": "mine"}))
    pages = measured.results_pages(tmp_path)
    assert "## The study on the embedded model\n\nmine as embedded" in pages["results.md"]
    assert pages["embedded-backdoor.svg"] == "<svg/>"
