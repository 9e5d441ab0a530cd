"""The zygote of all tests, as runs."""

from __future__ import annotations

import pytest

from tests import zygote as forks
from tests.resume.runs import Zygote


@pytest.fixture(scope="session")
def zygote(zygote: forks.Zygote) -> Zygote:
    return Zygote(zygote)
