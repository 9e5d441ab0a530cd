"""Data is read on rank 0 alone; what is wrong with it ends every rank, with one message."""

from pathlib import Path

from tests.distributed.bad_data import COMMANDS, start
from tests.resume.recipe import write_recipe
from tests.supervised.recipes import write_recipe as write_supervised
from tests.zygote import Zygote


def test_an_error_in_the_data_is_said_by_every_rank(tmp_path: Path, zygote: Zygote) -> None:
    write_recipe(tmp_path, iterations=1)
    for name in ("sft", "dpo"):
        (tmp_path / name).mkdir()
        write_supervised(tmp_path / name, name, {}, [])
    log = tmp_path / "log"
    assert zygote.run(start, 2, tmp_path, log=log) == 0, log.read_text()[-6000:]
    for name in COMMANDS:
        first, second = ((tmp_path / f"{name}_{rank}").read_text() for rank in range(2))
        assert first == second and "nowhere.jsonl: cannot read it" in first
