"""Long2short from one checkpoint (paper 2.4): tokens against accuracy. `long2short.py [--seeds 0 1 2]`

The long model of a seed is what the run `sum` trains, without a length reward. From it: the average with a short model (the
warmed-up model fitted to answers without steps, of which a share SHORT_RIGHT is right); shortest rejection sampling, its
selection fitted by the warm-up's supervised steps; DPO on the pairs of the same responses (`dpo.yaml`); and a second phase of RL
with the length reward and at most RL_TOKENS tokens. Each is scored on the held-out questions, sampled. Keeps finished scores in
runs/ablations/long2short; writes benchmarks/results/ablation_long2short.json and docs/ablation_long2short.svg.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from picture import scatter
from run import ROOT, Row, beside, measure, print_rows, python, where, write_result
from run import folder_of as run_folder

if TYPE_CHECKING:
    from megatron_rl.config import Config

LONG, LONG_RUN = "long", "sum"
METHODS = {
    "short": "the short model itself",
    "merge": "equal average of long and short",
    "merge_3to1": "average, 3 parts long to 1 short",
    "reject": "shortest rejection sampling",
    "dpo": "DPO",
    "rl": "RL with the length reward",
}
SHORT_RIGHT = 0.6
FIT_STEPS, FIT_LR = 100, 5e-4
RL_TOKENS, RL_ITERATIONS = 16, 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--score", action="store_true", help="in a process of its own: score the one seed and write nothing else")
    arguments = parser.parse_args()
    if arguments.score:
        score_seed(arguments.seeds[0])
        return
    outcomes = [outcome_of(seed) for seed in arguments.seeds]
    scores = [outcome["scores"] for outcome in outcomes]
    rows = compared(scores)
    print_rows(rows)
    write_result("ablation_long2short", rows, ceilings={}, packages=[], measured_on=where(outcomes))
    names = {LONG: "long: no length reward", **METHODS}
    points = {name: [(s[method]["tokens"], s[method]["correct"]) for s in scores] for method, name in names.items()}
    seeds = f"Seeds {', '.join(map(str, arguments.seeds))} (faint), their mean"
    foot = f"{seeds}; RL: {RL_ITERATIONS} more; {outcomes[0]['said']}."
    iterations = len(measure(LONG_RUN, arguments.seeds[0]).batches)
    picture = scatter(f"Long2short from one checkpoint of {iterations} iterations, sums", points, foot)
    (ROOT / "docs" / "ablation_long2short.svg").write_text(picture, encoding="utf-8")


def outcome_of(seed: int) -> dict:
    """`scores`: method -> correct, tokens; made if there is nothing."""
    path = folder_of(seed) / "scores.json"
    if not path.is_file():
        measure(LONG_RUN, seed)
        python("long2short.py", "--score", "--seeds", str(seed))
    return json.loads(path.read_text(encoding="utf-8"))


def folder_of(seed: int) -> Path:
    return ROOT / f"runs/ablations/long2short/seed{seed}"


def long_model(seed: int) -> Path:
    return run_folder(LONG_RUN, seed) / "hf"


def overrides(seed: int) -> list[str]:
    return [f"run.folder={folder_of(seed) / 'rl'}", f"run.seed={seed}", f"run.iterations={RL_ITERATIONS}"]


def train_rl(seed: int) -> None:
    limits = [f"rollout.max_response_tokens={RL_TOKENS}", f"rollout.token_budget={RL_TOKENS}"]
    settings = [f"model.folder={long_model(seed)}", "rewards.length.schedule=constant", *limits]
    python("measured_train.py", str(Path(__file__).parent / "sum.yaml"), *overrides(seed), *settings)


def score_seed(seed: int) -> None:
    """Make every model of a seed, whose long one there is, and score it as that is scored."""
    from measured_train import PACKAGES, machine
    from measured_train import scores as scores_of

    from megatron_rl import config as configuration

    shutil.rmtree(folder_of(seed), ignore_errors=True)
    train_rl(seed)
    config = configuration.load(Path(__file__).parent / "sum.yaml", overrides(seed))
    models = {LONG: long_model(seed), **made_models(config, seed)}
    found = {name: scores_of(config, model)["held_out"] for name, model in models.items()}
    scores = {name: {"correct": f["mean"], "tokens": f["mean_tokens"]} for name, f in found.items()}
    said = "{n} held-out questions, {samples} responses each".format(**found[LONG])
    outcome = {"scores": scores, "said": said, "machine": machine(PACKAGES)}
    (folder_of(seed) / "scores.json").write_text(json.dumps(outcome, indent=1), encoding="utf-8")


def made_models(config: Config, seed: int) -> dict[str, Path]:
    """Of every method, in the order of METHODS; the RL one is there already."""
    from tasks import TASKS, split

    from megatron_rl import config as configuration
    from megatron_rl.long2short.dpo import dpo
    from megatron_rl.long2short.merge import merge
    from megatron_rl.rejection import Rules, write_data

    folder, draw, questions = folder_of(seed), random.Random(seed), split(TASKS["sum"].questions())[0]

    def short() -> tuple[str, str]:
        question, answer = draw.choice(questions)
        return question, f"={answer if draw.random() < SHORT_RIGHT else draw.randrange(10)}"

    fitted(config.model.folder, folder / "short", short)
    merge([long_model(seed), folder / "short"], folder / "merge")
    merge([long_model(seed), folder / "short"], folder / "merge_3to1", weights=[3, 1])
    write_data(config, long_model(seed), folder / "rejection", Rules(keep="shortest", pairs=True))
    lines = (folder / "rejection" / "sft.jsonl").read_text(encoding="utf-8").splitlines()
    selected = [json.loads(line)["messages"] for line in lines]
    right = [(messages[-2]["content"], messages[-1]["content"]) for messages in selected]
    fitted(long_model(seed), folder / "reject", lambda: draw.choice(right))
    paths = [
        f"run.folder={folder / 'dpo'}",
        f"model.folder={long_model(seed)}",
        f"dpo.path={folder / 'rejection' / 'pairs.jsonl'}",
    ]
    settings = [*paths, f"run.seed={seed}"]
    dpo(configuration.load_supervised(configuration.DPOConfig, Path(__file__).parent / "dpo.yaml", settings))
    trained = {name: folder / name / "hf" for name in ("dpo", "rl")}
    return {name: trained.get(name, folder / name) for name in METHODS}


def fitted(source: Path, target: Path, texts: Callable[[], tuple[str, str]]) -> None:
    from tasks import warm_up

    shutil.copytree(source, target)
    warm_up(target, texts, steps=FIT_STEPS, lr=FIT_LR)


def compared(scores: Sequence[Mapping[str, Mapping[str, float]]]) -> list[Row]:
    rows = []
    for method, name in METHODS.items():
        for key, unit in (("correct", "share"), ("tokens", "tokens")):
            ours, peers = [s[method][key] for s in scores], [s[LONG][key] for s in scores]
            rows.append(beside(f"{name}: {key}", unit, ours, peers, "the long model", less_is_better=key == "tokens"))
    return rows


if __name__ == "__main__":
    main()
