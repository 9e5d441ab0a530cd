import json
import logging

import numpy as np
import pytest

from megatron_rl.errors import DataError
from megatron_rl.report.metrics import MetricsLog, read_metrics


def filled(folder, rows):
    log = MetricsLog(folder, tensorboard=False)
    for i in range(rows):
        log.write({"iteration": i, "reward/mean": i / 4})
    return log


def test_a_row_is_on_disk_when_write_returns(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write({"iteration": np.int64(0), "reward/mean": np.float32(0.5), "tokens/trained": 7})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"iteration": 0, "reward/mean": 0.5, "tokens/trained": 7}\n'


def test_every_row_is_strict_json_also_without_a_finite_value(tmp_path):
    MetricsLog(tmp_path, tensorboard=False).write({"iteration": 0, "loss": float("nan"), "norm": float("inf")})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse) == {
        "iteration": 0,
        "loss": None,
        "norm": None,
    }


def test_cut_back_drops_later_rows_and_the_rest_is_byte_for_byte_the_same(tmp_path):
    log = filled(tmp_path, 5)
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    log.cut_back(3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before[:3])
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"], "nothing partial is left"


@pytest.mark.parametrize("length", range(0, 36, 5))
def test_a_line_torn_by_a_kill_is_not_read_and_is_cut_off(tmp_path, length):
    log = filled(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    torn = b'{"iteration": 3, "reward/mean": 0.75}'[:length]
    path.write_bytes(whole + torn)
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1, 2]
    log.cut_back(10)
    assert path.read_bytes() == whole
    log.write({"iteration": 3})
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_a_damaged_line_that_no_kill_explains_is_named(tmp_path):
    log = filled(tmp_path, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 0\n' + path.read_bytes())
    with pytest.raises(DataError, match="metrics.jsonl, line 1"):
        log.cut_back(1)
    with pytest.raises(DataError, match="remove the line"):
        read_metrics(tmp_path)


def test_a_run_that_has_not_begun_has_no_rows(tmp_path):
    MetricsLog(tmp_path, tensorboard=False).cut_back(0)
    assert read_metrics(tmp_path) == []


def test_tensorboard_forgets_what_is_cut_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = MetricsLog(tmp_path, tensorboard=True)
    for i in range(4):
        first.write({"iteration": i, "reward/mean": 1.0})
    first.close()
    again = MetricsLog(tmp_path, tensorboard=True)
    again.cut_back(2)
    again.write({"iteration": 2, "reward/mean": 3.0})
    again.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("reward/mean")] == [(0, 1.0), (1, 1.0), (2, 3.0)]


def test_without_the_tensorboard_package_the_rows_are_written_all_the_same(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        log = MetricsLog(tmp_path, tensorboard=True)
    log.cut_back(0)
    log.write({"iteration": 0})
    assert "tensorboard is not installed" in caplog.text
    assert read_metrics(tmp_path) == [{"iteration": 0}]
