"""Training with the state sent away around every phase is training without, to the bit; what is away holds no memory."""

from __future__ import annotations

import pytest
import torch

from megatron_rl.algorithms.mirror_descent import MirrorDescent
from megatron_rl.errors import MegatronRLError
from megatron_rl.training import phase_memory
from megatron_rl.training.phase_memory import PARTS, PhaseMemory
from tests.training.material import exported, flat, make_config, make_groups, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def held_bytes(trainer) -> int:
    """By every storage that any tensor of the trainer's state is a view of."""
    buffers = [b for chunk in trainer.optimizer.wrapped for b in chunk.buffers]
    tensors = [p for chunk in trainer.chunks for p in chunk.parameters()]
    tensors += [p.main_grad for p in tensors] + [t for b in buffers for t in (b.grad_data, b.param_data) if t is not None]
    tensors += trainer.optimizer.main_weights + [w.grad for w in trainer.optimizer.main_weights if w.grad is not None]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def step(trainer, seed: int) -> None:
    groups = flat(make_groups(seed=seed))
    trainer.step(trainer.distribute([groups]), MirrorDescent(0.3), None)


def state(trainer) -> dict[str, torch.Tensor]:
    main = {str(i): w.clone() for i, w in enumerate(trainer.optimizer.main_weights)}
    return exported(trainer) | main


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distributed", [False, True])
def test_phases_apart_train_to_the_same_bits(dtype, distributed, folder, make_trainer):
    config = make_config(folder, dtype=dtype, training={"distributed_optimizer": distributed})
    plain, shared = make_trainer(config), make_trainer(config)
    memory = PhaseMemory(shared.chunks, shared.optimizer)
    whole = held_bytes(shared)
    assert sum(memory.num_bytes(part) for part in PARTS) == whole
    for iteration in range(3):
        memory.onload(*PARTS)
        assert held_bytes(shared) == whole
        step(plain, iteration), step(shared, iteration)
        memory.begin_copy("parameters")
        memory.offload("gradients", "main_weights")
        published = exported(shared)
        memory.offload("parameters")
        assert held_bytes(shared) == 0 and all(memory.is_away(part) for part in PARTS)
        memory.onload("parameters")  # as an engine that has to be started again needs it, any number of times
        assert all(torch.equal(value, published[name]) for name, value in exported(shared).items())
        memory.offload("parameters", changed=False)
        assert held_bytes(shared) == 0
    memory.onload(*PARTS)
    wanted = state(plain)
    for name, value in state(shared).items():
        assert torch.equal(value, wanted[name]), name
    assert min(memory.seconds.values()) > 0


def test_no_room_is_one_error_and_the_part_can_come_later(folder, make_trainer, monkeypatch):
    trainer = make_trainer(make_config(folder))
    before = exported(trainer)
    memory = PhaseMemory(trainer.chunks, trainer.optimizer)
    memory.offload(*PARTS)
    with monkeypatch.context() as patched:
        patched.setattr(phase_memory, "_ROOM_S", 0.0)
        patched.setattr(torch.UntypedStorage, "resize_", _refuse_growth(torch.UntypedStorage.resize_))
        with pytest.raises(MegatronRLError, match="no room for the trainer's parameters .*rollout.sglang.mem_fraction"):
            memory.onload("parameters")
    assert memory.is_away("parameters")
    monkeypatch.setattr(torch.UntypedStorage, "resize_", _refuse_growth(torch.UntypedStorage.resize_, times=3))
    memory.onload(*PARTS)  # a server's second rank lets go a moment after its first
    assert all(torch.equal(value, before[name]) for name, value in exported(trainer).items())


def _refuse_growth(resize, times=1 << 30):
    """After five calls; so many times."""
    calls, refused = [], []

    def resize_(storage, size):
        calls.append(size)
        if size and len(calls) > 5 and len(refused) < times:
            refused.append(size)
            raise RuntimeError("out of memory")
        return resize(storage, size)

    return resize_
