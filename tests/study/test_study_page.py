import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from rich.console import Console
from study_runs import run_cells, run_info, write_run
from typer.testing import CliRunner

from deltakeeper.report.study_page import frontier_of, study_page
from deltakeeper.report.study_table import print_study
from deltakeeper.study.cells import Utility, UtilityItem
from deltakeeper.study.summarising import summarise
from deltakeeper.study.summary import Summary


@pytest.fixture(scope="module")
def summary():
    cells = run_cells(attacks={"prefix": "alignment", "trigger": "backdoor"}, seeds=(0, 1), n=30)
    return summarise(
        [replace(c, label="<script>alert(1)</script>") if c.variant == "lossy" else c for c in cells], run_info()
    )


def test_the_page_has_a_frontier_an_attack_and_loads_nothing(summary):
    page = study_page(summary)
    assert page.count('<svg class="frontier"') == 2
    assert not re.search(r"(src|href)=\"(?!#)|url\(|<script", page)
    assert "66.17 %" in page and "64.46 %" in page
    assert "&lt;script&gt;" in page
    assert page == study_page(summary)


def test_controls_are_marked_and_what_is_served_lies_on_top(summary):
    root = ET.fromstring(frontier_of(summary.attacks[0]))
    kinds = [g.get("class").split("k-")[1] for g in root.iter("g") if g.get("class", "").startswith("mark")]
    assert kinds.count("control") == 2
    assert set(kinds[-3:]) == {"codec", "healed"}


def test_the_terminal_shows_every_arm_and_the_paper(summary):
    screen = Console(width=160, record=True, force_terminal=False)
    with screen.capture() as capture:
        print_study(summary, screen)
    text = capture.get()
    assert "the arm fair" in text and "66.17 %" in text and "<script>" in text
    assert "+50 (" in text


def test_general_tasks_stand_beside_the_attack():
    def tasks(right, nll):
        return {
            "piqa acc": Utility("acc", tuple(UtilityItem(str(i), float(i < right)) for i in range(50))),
            "text nll": Utility("nll", (UtilityItem("0", nll), UtilityItem("1", 2 * nll))),
            "text tokens": Utility("tokens", (UtilityItem("0", 40.0), UtilityItem("1", 80.0))),
        }

    cells = [
        replace(c, utility=tasks(20, 110.0) if c.variant == "fair" else tasks(40, 100.0))
        for c in run_cells(attacks={"prefix": "alignment"}, seeds=(0, 1), n=30)
    ]
    found = summarise(cells, run_info())
    screen = Console(width=160, record=True, force_terminal=False)
    with screen.capture() as capture:
        print_study(found, screen)
    text, page = capture.get().replace("\u00a0", " "), study_page(found).replace("\u00a0", " ")
    for shown in (text, page):
        assert "piqa acc" in shown and "text perplexity" in shown and "text tokens" not in shown
        assert "40 %" in shown and "50 % (" in shown  # 20 of 50 right where the fine-tune has 40
        assert "15.64" in shown and "28 % (" in shown  # exp(110/40), and exp(10/40) − 1
    with screen.capture() as capture:
        print_study(summarise(run_cells(attacks={"prefix": "alignment"}, seeds=(0,)), run_info()), screen)
    assert "general tasks" not in capture.get()


def test_report_writes_summary_and_page(tmp_path):
    import typer

    from deltakeeper.commands.report import report

    app = typer.Typer()
    app.command()(report)
    write_run(tmp_path / "run", run_cells(attacks={"prefix": "alignment"}, seeds=(0,), n=20))
    done = CliRunner().invoke(app, [str(tmp_path / "run")])
    assert done.exit_code == 0 and "summary.html" in done.output
    stored = Summary.from_text((tmp_path / "run" / "summary.json").read_text())
    assert stored.attacks[0].row("fair").attack.value == pytest.approx(0.4)
    machine = CliRunner().invoke(app, [str(tmp_path / "run"), "--json"])
    assert Summary.from_text(machine.stdout) == stored
