from pathlib import Path

import pytest
from make_run import make_run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    """A made-up run, for reading only."""
    return make_run(tmp_path_factory.mktemp("report") / "run", tiny_tokenizer_folder)
