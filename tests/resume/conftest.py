"""One zygote for all tests of this folder: its imports cost more than a run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.resume.runs import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    z = Zygote()
    yield z
    z.close()
