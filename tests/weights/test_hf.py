from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_rl.errors import DataError
from megatron_rl.model_config import ModelConfig
from megatron_rl.training import cpu
from megatron_rl.training.micro_batch import Place, prepare
from megatron_rl.training.model import PolicyModel
from megatron_rl.training.packing import plan
from megatron_rl.types import TrainingSequence
from megatron_rl.weights import hf
from megatron_rl.weights.folder import write_model_folder
from tests.weights.small import config_for, one_rank, perturbed, same_bytes, stored, unset_model

MakeModel = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank(config_for(tmp_path_factory.mktemp("run"))):
        yield


def megatron_logits(chunk: PolicyModel, token_ids: torch.Tensor) -> torch.Tensor:
    """[tokens - 1, vocabulary], of all but the last token, through a pack of one sequence."""
    ids = token_ids.numpy().astype(np.int32)
    sequence = TrainingSequence(
        group_id=0,
        trajectory_id=0,
        prompt_ids=ids[:4],
        response_ids=ids[4:],
        loss_mask=np.ones(len(ids) - 4, np.bool_),
        behaviour_log_probs=np.zeros(len(ids) - 4, np.float32),
        weight_versions=np.zeros(len(ids) - 4, np.int32),
        advantage=0.0,
        weight=1.0,
    )
    ((packed,),) = plan([sequence], max_tokens=64)
    place = Place(0, 1, cpu.device(), chunk.model_config.inverse_frequencies())
    b = prepare(packed, 0, place)
    with torch.no_grad():
        hidden = chunk(b.token_ids, None, None, packed_seq_params=b.params)
        return hidden[:, 0] @ chunk.output_weight.T


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"heads": 6, "kv_heads": 2, "head_dim": 8, "layers": 3}),
        ("qwen2", {}),
        ("qwen2", {"heads": 6, "kv_heads": 3, "head_dim": 8}),
        ("qwen3", {}),
        ("qwen3", {"heads": 5, "kv_heads": 5, "head_dim": 10, "hidden": 36, "ffn": 52}),
    ],
)
def test_logits_equal_transformers(make_model: MakeModel, tmp_path: Path, family: str, options: dict, tied: bool) -> None:
    folder = perturbed(make_model, tmp_path, family, tied=tied, **options)
    chunks = unset_model(folder)
    hf.load(chunks, folder)
    token_ids = torch.randint(0, 261, (19,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(token_ids[None]).logits[0, :-1]
    ours = megatron_logits(chunks[0], token_ids)
    assert theirs.abs().max() > 1, "a model this flat would hide mistakes"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_import_then_export_is_bit_identical(
    make_model: MakeModel, tmp_path: Path, family: str, tied: bool, dtype: str, sharded: bool
) -> None:
    options = {"max_shard_size": "40KB"} if sharded else {}
    folder = perturbed(make_model, tmp_path / "in", family, dtype=dtype, tied=tied, **options)
    assert (folder / "model.safetensors.index.json").exists() == sharded
    chunks = unset_model(folder, dtype)
    hf.load(chunks, folder)
    assert same_bytes(dict(hf.export(chunks)), stored(folder))

    buckets = hf.export_buckets(chunks, 20_000)
    write_model_folder(buckets, tmp_path / "out", source=folder, write=True, shard_bytes=40_000 if sharded else 1 << 30)
    assert same_bytes(stored(tmp_path / "out"), stored(folder))
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == sharded
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    reread = unset_model(tmp_path / "out", dtype)
    hf.load(reread, tmp_path / "out")
    assert same_bytes(dict(hf.export(reread)), stored(folder))


def test_a_written_folder_names_its_dtype_and_replaces_the_one_before(make_model: MakeModel, tmp_path: Path) -> None:
    folder = perturbed(make_model, tmp_path / "in", "llama")
    chunks = unset_model(folder, "bfloat16")
    hf.load(chunks, folder)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "stale").touch()
    write_model_folder(hf.export_buckets(chunks, 1 << 20), tmp_path / "hf", source=folder, write=True)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert not (tmp_path / "hf" / "stale").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    expected = stored(folder)["model.layers.1.mlp.up_proj.weight"].bfloat16()
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, expected)


def test_one_rank_exports_views_and_copies_only_the_fused_projection(make_model: MakeModel, tmp_path: Path) -> None:
    folder = perturbed(make_model, tmp_path, "llama", tied=False, heads=4, kv_heads=2, head_dim=12)
    chunks = unset_model(folder)
    hf.load(chunks, folder)
    own = {p.untyped_storage().data_ptr() for p in chunks[0].parameters()}
    copied = {name for name, tensor in hf.export(chunks) if tensor.untyped_storage().data_ptr() not in own}
    assert copied and all(name.split(".")[-2] in ("q_proj", "k_proj", "v_proj") for name in copied)


def test_buckets_hold_what_export_gives_and_are_emptied_when_the_next_is_asked_for(make_model: MakeModel, tmp_path: Path) -> None:
    folder = perturbed(make_model, tmp_path, "qwen3")
    chunks = unset_model(folder)
    hf.load(chunks, folder)
    found, before = [], None
    for bucket in hf.export_buckets(chunks, 10_000):
        assert not before, "the bucket before still holds its tensors"
        assert len(bucket) == 1 or sum(tensor.nbytes for _, tensor in bucket) <= 10_000
        found += bucket
        before = bucket
    assert [name for name, _ in found] == [name for name, _ in hf.export(chunks)]
    assert same_bytes(dict(found), stored(folder))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def resized(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(7)


def quantized(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(48, dtype=torch.int8)


def untied(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = torch.zeros(261, 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        (lambda t: t.update({"model.layers.2.x.weight": torch.zeros(2)}), r"extra tensor model\.layers\.2\.x\.weight"),
        (untied, "lm_head.*set tie_word_embeddings to false"),
        (resized, r"model\.norm\.weight has shape \[7\].*\[48\]"),
        (quantized, r"model\.safetensors: tensor model\.norm\.weight is I8; supported are F32, BF16, F16"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(
    make_model: MakeModel, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    folder = perturbed(make_model, tmp_path, "llama", tied=True)
    rewrite(folder, change)
    with pytest.raises(DataError, match=message):
        hf.load(unset_model(folder), folder)


def test_an_incomplete_folder_is_refused_by_name(make_model: MakeModel, tmp_path: Path) -> None:
    folder = perturbed(make_model, tmp_path / "single", "llama")
    chunks = unset_model(folder)
    whole = (folder / "model.safetensors").read_bytes()
    for length in (len(whole) - 1, 100, 4, 0):
        (folder / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"model\.safetensors: truncated or damaged"):
            hf.load(chunks, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"model\.safetensors: missing"):
        hf.load(chunks, folder)

    folder = perturbed(make_model, tmp_path / "sharded", "llama", max_shard_size="40KB")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shard = folder / weight_map["model.norm.weight"]
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard)
    with pytest.raises(DataError, match=rf"tensor model\.norm\.weight should be in {shard.name}"):
        hf.load(chunks, folder)
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard.name}: missing"):
        hf.load(chunks, folder)
    index.write_text("{}")
    with pytest.raises(DataError, match="not an index"):
        hf.load(chunks, folder)


def test_an_unknown_architecture_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    folder = perturbed(make_model, tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="GPT2LMHeadModel is not supported"):
        ModelConfig.from_folder(folder)
