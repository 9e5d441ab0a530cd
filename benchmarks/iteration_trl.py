"""The peer's side of `iteration_vs_trl.py`: whole GRPOTrainer steps, run in TRL's own environment. Prints one JSON object.

One step is 8 prompts x 8 completions, rewards, one optimizer step: no reference model, no checkpoint, no logging.
End of text is suppressed until the forced length, so that both sides make the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Stopwatch(TrainerCallback):
    """Seconds of every optimizer step, generation included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


class Counter:
    """The reward: 1 for the right answer. Counts what it is given."""

    __name__ = "right_answer"

    def __init__(self) -> None:
        self.completion_tokens: list[int] = []  # of every step

    def __call__(self, completions: list[Any], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        self.completion_tokens.append(sum(len(ids) for ids in completion_ids))
        texts = [completion[0]["content"] for completion in completions]
        return [float(text.rpartition("Answer:")[2].strip() == wanted) for text, wanted in zip(texts, answer, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path, help="JSON written by iteration_vs_trl.py")
    parser.add_argument("--batch", type=int, required=True, help="sequences of one forward and backward pass")
    job = json.loads(parser.parse_args().job.read_text(encoding="utf-8"))
    batch = parser.parse_args().batch
    torch.set_num_threads(job["threads"])
    watch, counter = Stopwatch(), Counter()
    trainer = GRPOTrainer(
        model=job["model"],
        reward_funcs=counter,
        args=settings(job, batch),
        train_dataset=Dataset.from_list([{"prompt": p["messages"], "answer": p["answer"]} for p in job["prompts"]]),
        callbacks=[watch],
    )
    trainer.train()
    apply = trainer.processing_class.apply_chat_template
    prompts = [apply(p["messages"], add_generation_prompt=True, return_dict=True)["input_ids"] for p in job["prompts"]]
    print(
        json.dumps(
            {
                "seconds": watch.seconds,
                "prompt_ids": prompts,
                "completion_tokens": counter.completion_tokens,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def settings(job: dict[str, Any], batch: int) -> GRPOConfig:
    samples = len(job["prompts"]) * job["group_size"]
    return GRPOConfig(
        output_dir=job["scratch"],
        use_cpu=True,
        bf16=job["dtype"] == "bfloat16",
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=samples // batch,
        num_generations=job["group_size"],
        max_completion_length=job["response_tokens"],
        generation_kwargs={"min_new_tokens": job["response_tokens"]},
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=0.0,
        num_iterations=1,
        max_steps=job["iterations"],
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


if __name__ == "__main__":
    main()
