"""The tokenizer of a model folder: messages to token ids once, token ids to text for rewards and logs.

Reads local files only. Refuses folders without a tokenizer, a chat template or a stop token. Text that came out of
`decode` is never encoded again: generation and training go by token ids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_rl.errors import DataError
from megatron_rl.types import Message


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
