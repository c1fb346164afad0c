"""`python -m deltakeeper`, and what our commands keep off the screen."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from deltakeeper.quiet_loading import quiet_imports


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "deltakeeper", "--version"], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.startswith("deltakeeper ")


@pytest.fixture
def loggers():
    found = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    before = [list(logger.filters) for logger in found]
    yield found
    for logger, filters in zip(found, before, strict=True):
        logger.filters = filters


def test_only_what_torchao_says_of_its_own_loading_is_kept_quiet(loggers, caplog):
    torchao, pytree = loggers
    handler = caplog.handler
    for logger in loggers:
        logger.addHandler(handler)
    quiet_imports()
    quiet_imports()
    torchao.warning("Failed to load /x/_C.so: Could not load this library")
    pytree.warning("%s is an Enum subclass and is now natively supported by torch.compile", "<enum>")
    torchao.warning("this kernel is slow")
    pytree.warning("%s is registered twice", "x")
    for logger in loggers:
        logger.removeHandler(handler)
        assert len(logger.filters) == 1
    said = list(dict.fromkeys(record.getMessage() for record in caplog.records))
    assert said == ["this kernel is slow", "x is registered twice"]


def test_the_import_of_transformers_models_says_nothing():
    code = "from deltakeeper.quiet_loading import quiet_imports; quiet_imports(); import transformers.modeling_utils"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=True)
    assert done.stderr == ""
