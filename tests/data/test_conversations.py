"""Which tokens bear loss, proved token by token against what the chat template writes."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rl.data.conversations import read_conversations, read_pairs
from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.errors import DataError
from megatron_rl.types import Message

# Both write <|role|>content<|end|>\n a message; the newline is not the model's to generate.
PLAIN = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{%- generation -%}{{ m['content'] + '<|end|>' }}{%- endgeneration -%}"
    "{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
IDS = {"system": 2, "user": 3, "assistant": 4, "end": 1}


@pytest.fixture(scope="module")
def with_template(tiny_tokenizer_folder, tmp_path_factory):
    def make(template: str) -> ChatTokenizer:
        folder = shutil.copytree(tiny_tokenizer_folder, tmp_path_factory.mktemp("t") / "model")
        (folder / "chat_template.jinja").write_text(template)
        return ChatTokenizer.from_folder(folder)

    return make


@pytest.fixture(scope="module")
def tokenizers(with_template):
    return [with_template(PLAIN), with_template(MARKED)]


def by_hand(tokenizer, messages):
    """(token, bears loss) of every token, written down message by message; a byte is a token."""
    expected = []
    for m in messages:
        own = m.role == "assistant"
        expected.append((IDS[m.role], False))
        expected += [(int(i), own) for i in tokenizer._encode(m.content)]
        expected += [(IDS["end"], own), (int(tokenizer._encode("\n")[0]), False)]
    return expected


turns = st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=5), turns)
def test_every_token_of_a_conversation_is_the_assistants_or_not_as_written_by_hand(tokenizers, system, turns):
    messages = [Message("system", system)]
    messages += [Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    for tokenizer in tokenizers:
        ids, mask = tokenizer.encode_conversation(messages)
        assert ids.dtype == np.int32 and mask.dtype == np.bool_
        assert list(zip(ids.tolist(), mask.tolist(), strict=True)) == by_hand(tokenizer, messages)
        prompt = tokenizer.encode_chat(messages[:-1])
        assert ids[: len(prompt)].tolist() == prompt.tolist(), "what generation would have begun with"


def test_a_token_that_would_lie_across_the_boundary_is_split_there_as_generation_meets_it(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|pad|>", "<|end|>", *alphabet, "ĊĊ"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|pad|>", "<|end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    ours = ChatTokenizer.from_folder(tmp_path)
    for reply in ("\nhi", "hi"):
        ids, mask = ours.encode_conversation([Message("user", "q"), Message("assistant", reply)])
        prompt = ours.encode_chat([Message("user", "q")])
        assert ids[~mask].tolist() == prompt.tolist()
        assert ids[mask].tolist() == [*ours._encode(reply), 1]


def test_templates_whose_tokens_cannot_be_told_apart_are_refused(with_template):
    turns = [Message("user", "1"), Message("assistant", "<t>x</t>2"), Message("user", "3"), Message("assistant", "4")]
    forgetting = PLAIN.replace("m['content']", "(m['content'] if loop.last else m['content'].split('</t>')[-1])")
    with pytest.raises(DataError, match="message 2 of 4: the chat template writes it in another way when messages follow"):
        with_template(forgetting).encode_conversation(turns)
    assert with_template(forgetting).encode_conversation(turns[:2])[1].sum() == len("<t>x</t>2") + 1
    endless = PLAIN.replace("<|end|>", "")
    with pytest.raises(DataError, match=r"without one of the stop tokens \[1\], so the model could not learn to end"):
        with_template(endless).encode_conversation(turns[:2])


def test_lines_become_examples_and_pairs(tokenizers, tmp_path):
    tokenizer = tokenizers[0]
    path = tmp_path / "a.jsonl"
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    lines = [{"prompt": "a", "response": "b"}, {"messages": [*chat, {"role": "assistant", "content": "4"}], "num_tokens": 2}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    single, multi = read_conversations(path, tokenizer, "sft.path")
    assert tokenizer.decode(single.token_ids[single.loss_mask]) == "b"
    assert tokenizer.decode(multi.token_ids[multi.loss_mask]) == "24"
    path.write_text(json.dumps({"messages": chat, "chosen": "5", "rejected": "678"}))
    (pair,) = read_pairs(path, tokenizer, "dpo.path")
    assert tokenizer.decode(pair.chosen.token_ids[pair.chosen.loss_mask]) == "5", "an earlier answer is not judged"
    assert tokenizer.decode(pair.rejected.token_ids[pair.rejected.loss_mask]) == "678"
    assert pair.chosen.prompt_ids.tolist() == tokenizer.encode_chat([Message(m["role"], m["content"]) for m in chat]).tolist()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', "line 1, column 1: `response` is missing; give it as text"),
        ('{"prompt": "a", "response": " "}', "line 1, column 17: `response` is ' '"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "of role user; it must be the assistant's"),
        ('{"messages": []}', r"`messages` is \[\]"),
        ("[1]", r"found \[1\]; a line is an object"),
        ('{"prompt": ', "line 1, column 12: not valid JSON"),
        ("", "there is no conversation in it"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tokenizers, tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        read_conversations(path, tokenizers[0], "sft.path")
