"""The scaling benchmark's ranks, which measure one rank alone and then both, in one launch; and what MFU counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_rl.algorithms.mirror_descent import MirrorDescent
from megatron_rl.model_config import ModelConfig
from tests.training.conftest import make_trainer  # noqa: F401  a fixture
from tests.training.material import VOCABULARY, flat, make_config, make_groups, make_model
from tests.zygote import Zygote

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_one_launch_measures_one_rank_and_then_two(tmp_path: Path, zygote: Zygote) -> None:
    from tests.distributed.scaling_ranks import measure

    log = tmp_path / "log"
    assert zygote.run(measure, tmp_path, log=log) == 0, log.read_text()[-6000:]
    told = log.read_text()
    assert "MISSING nothing" in told
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    rates = {row["case"]: row for row in rows if row["unit"] == "tokens/s"}
    assert [case.split(", ")[1] for case in rates] == ["one GPU", "TP=2"]
    alone, both = rates.values()
    assert alone["ratio_to_limit"] == 1.0 and both["limit"] == alone["ours"], "one GPU's rate is the limit"


def test_mfu_counts_the_operations_that_torch_counts(tmp_path: Path, make_trainer) -> None:  # noqa: F811
    """Of the matrices, for a step whose rows, loss-bearing tokens and padding are known; attention is counted by positions."""
    sys.path.insert(0, str(BENCHMARKS))
    from model_flops import matrix_flops

    folder = make_model(tmp_path / "model", "qwen3")
    trainer = make_trainer(make_config(folder, training={"log_prob_chunk": 1024, "max_tokens_per_micro_batch": 1 << 20}))
    batch = trainer.distribute([flat(make_groups(vocabulary=VOCABULARY))])
    with FlopCounterMode(display=False) as counter:
        trainer.step(batch, MirrorDescent(0.3), None)
    found = counter.get_flop_counts()["Global"]
    products = sum(found.get(getattr(torch.ops.aten, name), 0) for name in ("mm", "addmm", "bmm"))
    padded = -(-batch.num_trained_tokens // 64) * 64
    model = ModelConfig.from_folder(folder)
    assert products == matrix_flops(model, batch.num_packed_tokens, padded)
