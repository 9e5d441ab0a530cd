"""Samples per second of a whole iteration against TRL's GRPOTrainer: generate, reward, one optimizer step.

Same model, prompts, groups (8 prompts x 8 responses), lengths (prompts of 76 tokens, responses of 6) and threads; token
counts are asserted equal; no checkpoint and no report on either side. TRL runs in an environment of its own, made under
.cache/venv-trl on first use, with float32 weights: under bfloat16 autocast against our bfloat16 compute with float32 main
weights (the fair form), and in plain float32. Its better batch size counts, as does its better memory setting: activations
kept. Each side is a fresh process; the first iteration is not counted.

    python benchmarks/iteration_vs_trl.py [--model FOLDER] [--iterations 3] [--dtypes bfloat16 float32]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from result_file import Row, write_result

from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.types import Message

HERE = Path(__file__).parent
PROJECT = HERE.parent
PEER_VENV = PROJECT / ".cache" / "venv-trl"
GROUPS, GROUP_SIZE, RESPONSE_TOKENS, THREADS = 8, 8, 6, 2
PEER_BATCHES = (64, 16)
TIMEOUT_S = 3600
OPENING = (
    Message("system", 'Reply with only "Answer: X".'),
    Message("user", "Calculate 7 + 5."),
    Message("assistant", "Answer: 12"),
    Message("user", "Calculate 3 - 8."),
    Message("assistant", "Answer: -5"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PROJECT / ".cache" / "smollm2", help="Hugging Face folder")
    parser.add_argument("--iterations", type=int, default=3, help="counted iterations of each side")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--peer-batches", type=int, nargs="+", default=PEER_BATCHES, help="sequences of one pass of the peer")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    make_peer_venv()
    prompts = make_prompts(arguments.model)
    rows: list[Row] = []
    for dtype in arguments.dtypes:
        job = {
            "model": str(arguments.model.resolve()),
            "dtype": dtype,
            "prompts": prompts,
            "group_size": GROUP_SIZE,
            "response_tokens": RESPONSE_TOKENS,
            "threads": THREADS,
            "iterations": arguments.iterations + 1,
        }
        ours = run_side([sys.executable, str(HERE / "iteration_ours.py")], job)
        peers = {n: run_side(peer_command(n), job) for n in arguments.peer_batches}
        for row in compare(dtype, ours, peers):
            rows.append(row)
            print(f"{row.case}: ours {row.ours} {row.unit}, peer {row.peer}, ratio {row.ratio_to_peer}", flush=True)
    print(write_result("iteration_vs_trl", rows, ceilings={}, packages=["torch", "megatron-core", "transformers"]))


def make_prompts(model: Path) -> list[dict[str, Any]]:
    """Eight additions of one digit, chat messages and answer."""
    tokenizer = ChatTokenizer.from_folder(model)
    found = []
    for a, b in [(2, 3), (4, 5), (6, 1), (8, 9), (5, 7), (9, 4), (3, 6), (1, 8)]:
        messages = (*OPENING, Message("user", f"Calculate {a} + {b}."))
        found.append({"messages": [{"role": m.role, "content": m.content} for m in messages], "answer": str(a + b)})
        print(f"prompt of {len(tokenizer.encode_chat(messages))} tokens: {messages[-1].content}")
    return found


def make_peer_venv() -> None:
    """TRL's environment, once: our torch first and alone, then TRL with it as a constraint."""
    ready = PEER_VENV / "ready"
    if ready.exists():
        return
    torch_version = torch.__version__.split("+")[0]
    pip = [str(PEER_VENV / "bin" / "python"), "-m", "pip", "install", "-q"]
    constraints = PEER_VENV / "constraints.txt"
    subprocess.run([sys.executable, "-m", "venv", str(PEER_VENV)], check=True)
    constraints.write_text(f"torch=={torch_version}\n", encoding="utf-8")
    subprocess.run([*pip, f"torch=={torch_version}"], check=True)
    subprocess.run([*pip, "-r", str(HERE / "trl-requirements.txt"), "-c", str(constraints)], check=True)
    ready.touch()


def peer_command(batch: int) -> list[str]:
    return [str(PEER_VENV / "bin" / "python"), str(HERE / "iteration_trl.py"), "--batch", str(batch)]


def run_side(command: list[str], job: dict[str, Any]) -> dict[str, Any]:
    """A fresh process for one side; returns what its last line says."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "job.json"
        path.write_text(json.dumps({**job, "scratch": scratch}), encoding="utf-8")
        done = subprocess.run([*command, str(path)], stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT_S)
    return json.loads(done.stdout.splitlines()[-1])


def compare(dtype: str, ours: dict[str, Any], peers: dict[int, dict[str, Any]]) -> list[Row]:
    """Speed, and peak memory, against the peer's faster run. Asserts that both sides did the same work."""
    for peer in peers.values():
        assert peer["prompt_ids"] == ours["prompt_ids"], "both sides see the same prompt tokens"
        assert peer["completion_tokens"] == ours["completion_tokens"], "both sides make the same number of tokens"
    num_samples = GROUPS * GROUP_SIZE
    assert ours["completion_tokens"] == [num_samples * RESPONSE_TOKENS] * len(ours["seconds"])
    best = min(peers, key=lambda n: statistics.median(peers[n]["seconds"][1:]))
    speeds = {side: sorted(num_samples / s for s in run["seconds"][1:]) for side, run in (("ours", ours), ("peer", peers[best]))}
    our_speed, peer_speed = (statistics.median(speeds[side]) for side in ("ours", "peer"))
    our_gb, peer_gb = ours["peak_bytes"] / 1e9, peers[best]["peak_bytes"] / 1e9
    form = "bfloat16 autocast over float32 weights" if dtype == "bfloat16" else "float32"
    peer_name = f"TRL GRPOTrainer, {form}, {best} sequences a pass"
    work = f"{num_samples} samples in groups of {GROUP_SIZE}, {len(ours['prompt_ids'][0])} + {RESPONSE_TOKENS} tokens, {dtype}"
    spread = {side: (round(s[0], 3), round(s[-1], 3)) for side, s in speeds.items()}
    speed = Row(
        case=work,
        unit="samples/s",
        ours=round(our_speed, 3),
        peer=round(peer_speed, 3),
        peer_name=peer_name,
        limit=None,
        ratio_to_peer=round(our_speed / peer_speed, 2),
        ratio_to_limit=None,
        spread=spread,
    )
    memory = Row(
        case=f"{work}, peak memory",
        unit="GB",
        ours=round(our_gb, 2),
        peer=round(peer_gb, 2),
        peer_name=peer_name,
        limit=None,
        ratio_to_peer=round(peer_gb / our_gb, 2),
        ratio_to_limit=None,
        spread={},
    )
    return [speed, memory]


if __name__ == "__main__":
    main()
