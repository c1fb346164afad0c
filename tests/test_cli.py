"""Errors of use and of the machine: one sentence on standard error, and the exit status that scripts rely on."""

from __future__ import annotations

import importlib

import pytest

from deltakeeper import cli


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["deltakeeper", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("compress", "a"), "deltakeeper: missing argument 'tuned'; see `deltakeeper compress --help`.\n"),
        (("nonsense",), "deltakeeper: no such command 'nonsense'; see `deltakeeper --help`.\n"),
        (("inspect", "a", "--bogus"), "deltakeeper: no such option: --bogus; see `deltakeeper inspect --help`.\n"),
    ],
)
def test_wrong_usage_is_one_sentence(run, arguments, sentence):
    code, out, err = run(*arguments)
    assert (code, out, err) == (2, "", sentence)


def test_no_arguments_show_the_help(run):
    code, out, err = run()
    assert code == 0 and "compress" in out and err == ""


def test_errors_of_the_machine_are_one_sentence(run, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device", "/out/spool")

    # by module: the package exports a function of the same name
    monkeypatch.setattr(importlib.import_module("deltakeeper.compress"), "compress", full)
    code, _, err = run("compress", "a", "b", "-o", "c")
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("deltakeeper: /out/spool: No space left on device;")
