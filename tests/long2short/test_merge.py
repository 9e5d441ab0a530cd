"""Merged weights are the average of the files'; models that do not fit are refused by name."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from examples.quickstart.make_model import make_model
from megatron_rl.errors import DataError
from megatron_rl.long2short import merge as merging
from megatron_rl.long2short.merge import merge
from megatron_rl.weights.reader import TensorFiles


def test_every_tensor_is_the_weighted_average_and_the_folder_loads(tmp_path):
    folders = [make_model(tmp_path / str(seed), hidden=32, seed=seed) for seed in range(3)]
    assert merge(folders, tmp_path / "merged", [2, 1, 1]) == [0.5, 0.25, 0.25]
    a, b, c, merged = (load_file(f / "model.safetensors") for f in (*folders, tmp_path / "merged"))
    assert set(merged) == set(a)
    for name, value in merged.items():
        torch.testing.assert_close(value, 0.5 * a[name] + 0.25 * b[name] + 0.25 * c[name], rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(merged[name], a[name]) for name in merged)
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (folders[0] / "tokenizer.json").read_bytes()
    merge(folders[:2], tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.allclose(value, (a[name] + b[name]) / 2) for name, value in plain.items())


def test_one_tensor_of_each_model_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """Sharded folders, as large models have, written tensor by tensor."""
    folders = [make_model(tmp_path / str(seed), hidden=32, seed=seed) for seed in range(3)]
    for folder in folders[1:]:
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
        (folder / "model.safetensors").unlink(missing_ok=True)
        assert len(list(folder.glob("*.safetensors"))) > 2
    events = []
    read, average = TensorFiles.read, merging._averaged

    def reading(self, name, *place):
        events.append(name)
        return read(self, name, *place)

    def writing(*arguments):
        for name, value in average(*arguments):
            assert events[-3:] == [name] * 3 and len(events) % 3 == 0, "nothing is read ahead of what is written"
            yield name, value

    monkeypatch.setattr(TensorFiles, "read", reading)
    monkeypatch.setattr(merging, "_averaged", writing)
    merge(folders, tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert events[::3] == list(dict.fromkeys(events)) and set(written) == set(events)


def test_what_cannot_be_averaged_is_refused_and_leaves_nothing(tmp_path):
    one, other = make_model(tmp_path / "one", hidden=32), make_model(tmp_path / "other", hidden=48)
    deep = make_model(tmp_path / "deep", hidden=32, layers=3)
    for models, weights, message in [
        ([one, other], None, r"tensor model.embed_tokens.weight is \[\d+, 32\] in .*one, \[\d+, 48\] in .*other; only models of"),
        ([one, deep], None, r"tensor model.layers.2.* is absent in .*one, \[.*\] in .*deep"),
        ([one], None, "1 model folder given"),
        ([one, one], [1.0], "1 weights for 2 models"),
        ([one, one], [1.0, -1.0], r"sum to 0.0; their sum must be positive"),
    ]:
        with pytest.raises(DataError, match=message):
            merge(models, tmp_path / "merged", weights)
        assert not list(tmp_path.glob("*merged*"))
    with pytest.raises(DataError, match="exists already"):
        merge([one, one], other)
