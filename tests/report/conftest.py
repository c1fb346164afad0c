import pytest
from synthetic_cells import full_run, run_info

from deltakeeper.report.digest import digest


@pytest.fixture(scope="session")
def full_digest():
    return digest(full_run(), run_info(), "2026-01-31")
