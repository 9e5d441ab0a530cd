"""The trainer's state off a GPU and back: its memory is free for another process meanwhile, its bits are the same."""

from __future__ import annotations

import pytest
import torch

from megatron_rl.algorithms.mirror_descent import MirrorDescent
from megatron_rl.model_config import ModelConfig
from megatron_rl.training import parallel
from megatron_rl.training.phase_memory import PARTS, PhaseMemory
from megatron_rl.training.trainer import Trainer
from tests.training.material import flat, make_config, make_groups, make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=[False, True], ids=["whole", "sharded"])
def trainer(request, tmp_path):
    shape = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4096}
    folder = make_model(tmp_path, **shape)
    config = make_config(folder, dtype="bfloat16", training={"distributed_optimizer": request.param})
    parallel.initialize(config)
    made = Trainer(config, ModelConfig.from_folder(folder))
    made.load_hf(folder)
    yield made
    parallel.shutdown()


def test_memory_goes_to_others_and_the_same_bits_come_back(trainer):
    groups = flat(make_groups())
    trainer.step(trainer.distribute([groups]), MirrorDescent(0.3), None)
    memory = PhaseMemory(trainer.chunks, trainer.optimizer)
    weights = [p.detach() for chunk in trainer.chunks for p in chunk.parameters()] + trainer.optimizer.main_weights
    before = [w.detach().cpu() for w in weights]
    shared = weights[0].untyped_storage()._share_cuda_()  # as a publish does, and its receiver lets go
    torch.UntypedStorage._release_ipc_counter(*shared[4:6], device=weights[0].device)
    torch.cuda.ipc_collect()
    allocated = torch.cuda.memory_allocated()
    for _ in range(3):
        memory.offload("gradients", "main_weights")
        memory.begin_copy("parameters")
        memory.offload("parameters")
        assert allocated - torch.cuda.memory_allocated() >= sum(memory.num_bytes(part) for part in PARTS)
        memory.onload(*PARTS)
        assert all(torch.equal(w.detach().cpu(), kept) for w, kept in zip(weights, before, strict=True))
    assert set(memory.memory()) == {"free", "allocated"}
    metrics = trainer.step(trainer.distribute([groups]), MirrorDescent(0.3), None)
    assert metrics["grad_norm"] > 0
