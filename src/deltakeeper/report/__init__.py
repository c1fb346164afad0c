"""What a person looks at after a study: a run folder in, `report.json`, `report.html` and a terminal summary out."""

from deltakeeper.report.html import render
from deltakeeper.report.terminal import print_summary

__all__ = ["print_summary", "render"]
