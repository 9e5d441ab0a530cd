"""The tokenizer of a local folder, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.errors import DataError
from megatron_rl.types import Message


def test_a_chat_becomes_tokens_with_the_generation_prompt(tiny_tokenizer_folder):
    tokenizer = ChatTokenizer.from_folder(tiny_tokenizer_folder)
    ids = tokenizer.encode_chat([Message("system", "s"), Message("user", "3+4")])
    assert ids.dtype == np.int32 and ids.ndim == 1
    system, user, assistant, end = 2, 3, 4, 1
    assert [i for i in ids.tolist() if i < 5] == [system, end, user, end, assistant]
    assert tokenizer.decode(ids) == "s3+4"
    assert tokenizer.vocab_size == 261


@settings(max_examples=30)
@given(st.text())
def test_text_survives_encoding_and_decoding(tiny_tokenizer_folder, text):
    tokenizer = ChatTokenizer.from_folder(tiny_tokenizer_folder)
    assert tokenizer.decode(tokenizer.encode_chat([Message("user", text)])) == text


def test_all_declared_ends_of_sequence_stop_a_response(tiny_tokenizer_folder, tmp_path):
    folder = shutil.copytree(tiny_tokenizer_folder, tmp_path / "model")
    assert ChatTokenizer.from_folder(folder).stop_token_ids == (1,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1]}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "eos_token_id": 5}))
    assert ChatTokenizer.from_folder(folder).stop_token_ids == (1, 5, 7)


def without_template(folder):
    (folder / "chat_template.jinja").unlink()


def without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def truncated_tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:1000])


def without_end(folder):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))


def broken_config(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": 1,,}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_template, "no chat template.*add chat_template.jinja"),
        (without_tokenizer, "no tokenizer could be read"),
        (truncated_tokenizer, "no tokenizer could be read"),
        (without_end, "no stop token"),
        (broken_config, "generation_config.json: not valid JSON at line 1, column 20"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_unusable_folders_are_refused_by_name(tiny_tokenizer_folder, tmp_path, damage, message):
    folder = shutil.copytree(tiny_tokenizer_folder, tmp_path / "model")
    damage(folder)
    with pytest.raises(DataError, match=f"(?s)model.*{message}"):
        ChatTokenizer.from_folder(folder)


def test_a_template_that_refuses_names_the_roles(tiny_tokenizer_folder, tmp_path):
    folder = shutil.copytree(tiny_tokenizer_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system messages') }}")
    with pytest.raises(DataError, match="roles system, user: no system messages"):
        ChatTokenizer.from_folder(folder).encode_chat([Message("system", "s"), Message("user", "u")])
