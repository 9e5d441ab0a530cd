"""The tokenizer of a model folder: messages to token ids once, token ids to text for rewards and logs.

Reads local files only. Refuses folders without a tokenizer, a chat template or a stop token. Text that came out of
`decode` is never encoded again: generation and training go by token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_rl.errors import DataError
from megatron_rl.types import Message

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTokenizer:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.stop_token_ids = tuple(stop_token_ids)  # ascending: any of them ends a response

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTokenizer:
        """Raises DataError for a folder without a usable tokenizer, chat template or stop token."""
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; model.folder must be a Hugging Face model folder")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as e:
            raise DataError(
                f"{folder}: no tokenizer could be read ({e}); put tokenizer.json and tokenizer_config.json there"
            ) from e
        if not tokenizer.chat_template:
            raise DataError(
                f"{folder}: the tokenizer has no chat template, so messages cannot become tokens; add chat_template.jinja "
                "to the folder, or take the model's instruction-tuned variant"
            )
        stop = _stop_token_ids(tokenizer, folder)
        if not stop:
            raise DataError(
                f"{folder}: no stop token in tokenizer_config.json (eos_token), generation_config.json or config.json "
                "(eos_token_id), so no response could end; set one"
            )
        return cls(tokenizer, stop)

    @property
    def vocab_size(self) -> int:
        """Tokens that have a text; the model's table may be padded beyond it."""
        return len(self._tokenizer)

    def encode_chat(self, messages: Sequence[Message]) -> np.ndarray:
        """int32 [prompt_tokens]: the chat template applied, generation prompt added. DataError if the template refuses."""
        chat = [{"role": message.role, "content": message.content} for message in messages]
        try:
            ids = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        except TemplateError as e:
            roles = ", ".join(message.role for message in messages)
            raise DataError(f"the chat template refuses a conversation of roles {roles}: {e}; change the messages") from e
        return np.asarray(ids, dtype=np.int32)

    def encode_conversation(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """int32 [tokens] and bool [tokens]: the whole conversation through the chat template, and which tokens are the
        assistant's, its stop token included.

        A template with {% generation %} marks says so itself. With another, an assistant's message is what the template adds
        to the text of the messages before it and their generation prompt, up to its last stop token: what the model would
        have generated there. Raises DataError for a template in which a later message changes an earlier one's text, or
        whose assistant messages end without a stop token."""
        chat = [{"role": message.role, "content": message.content} for message in messages]
        if _MARKS.search(str(self._tokenizer.chat_template)):
            return self._marked(chat)
        text, spans = self._render(chat), []
        for i in (i for i, message in enumerate(messages) if message.role == "assistant"):
            before, after = self._render(chat[:i], add_generation_prompt=True), self._render(chat[: i + 1])
            if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
                raise DataError(
                    f"message {i + 1} of {len(messages)}: the chat template writes it in another way when messages follow, so "
                    "the assistant's tokens cannot be told; put {% generation %} marks into the template, or give each "
                    "conversation one assistant message, the last"
                )
            spans.append((len(before), len(after)))
        ids, ends = self._encode_parts(text, sorted({cut for span in spans for cut in span}))
        mask = np.zeros(len(ids), np.bool_)
        for start, end in spans:
            own = slice(ends[start], ends[end])
            stops = np.flatnonzero(np.isin(ids[own], self.stop_token_ids))
            if not len(stops):
                raise DataError(
                    f"the chat template ends the assistant's message without one of the stop tokens {list(self.stop_token_ids)}, "
                    "so the model could not learn to end; correct the template, or eos_token"
                )
            mask[own.start : own.start + int(stops[-1]) + 1] = True
        return ids, mask

    def _marked(self, chat: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        try:
            marked: Any = {"return_dict": True, "return_assistant_tokens_mask": True}
            found: Any = self._tokenizer.apply_chat_template(chat, tokenize=True, **marked)
        except TemplateError as e:
            raise DataError(f"the chat template refuses the conversation: {e}; change the messages") from e
        return np.asarray(found["input_ids"], np.int32), np.asarray(found["assistant_masks"], np.bool_)

    def _render(self, chat: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        if not chat and not add_generation_prompt:
            return ""
        try:
            return str(self._tokenizer.apply_chat_template(chat, add_generation_prompt=add_generation_prompt, tokenize=False))
        except TemplateError as e:
            roles = ", ".join(message["role"] for message in chat)
            raise DataError(f"the chat template refuses a conversation of roles {roles}: {e}; change the messages") from e

    def _encode_parts(self, text: str, cuts: Sequence[int]) -> tuple[np.ndarray, dict[int, int]]:
        """The ids of `text`, and how many of them lie before each cut. The text is encoded whole, unless a token would lie
        across a cut; then part by part, as generation meets it: the prompt's ids, then its own."""
        whole = self._encode(text)
        ends = {cut: len(self._encode(text[:cut])) for cut in cuts}
        if all(whole[:end] == self._encode(text[:cut]) for cut, end in ends.items()):
            return np.asarray(whole, np.int32), ends
        parts, start = [], 0
        for cut in [*cuts, len(text)]:
            parts.append(self._encode(text[start:cut]))
            start = cut
        counts = np.cumsum([len(part) for part in parts]).tolist()
        return np.asarray([i for part in parts for i in part], np.int32), dict(zip(cuts, counts, strict=False))

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """The text without special tokens; bytes that are no text become U+FFFD."""
        ids = np.asarray(token_ids, dtype=np.int64).tolist()
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _stop_token_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[int]:
    """What the tokenizer and the model's two configs call end of sequence, together: chat models split them up."""
    found: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            declared = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except json.JSONDecodeError as e:
            raise DataError(f"{path}: not valid JSON at line {e.lineno}, column {e.colno}: {e.msg}") from e
        found.update(declared if isinstance(declared, list) else [] if declared is None else [declared])
    return sorted(found)
