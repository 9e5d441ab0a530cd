"""The scorer under faults: every one is bounded in time, counted, named, and costs no other response its reward."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_rl.config import RewardsConfig, RewardTerm
from megatron_rl.errors import RewardError
from megatron_rl.rewards import process
from megatron_rl.rewards.scorer import Scorer
from megatron_rl.types import Ending, Message, Outcome, OutcomeKind, Prompt

TERMS = """
import os, sys, time
from megatron_rl.types import Outcome, OutcomeKind

def spin(response, answer, prompt):
    while True: pass

def spin_in_c(response, answer, prompt):
    return 9 ** 9 ** 9 ** 9

def sleep(response, answer, prompt):
    time.sleep(3600)

def sleep_in_a_child(response, answer, prompt):
    import subprocess
    child = subprocess.Popen(["sleep", "3600"])
    open(response, "w").write(str(child.pid))
    child.wait()

def leave(response, answer, prompt): sys.exit(3)
def abort(response, answer, prompt): os.abort()
def fail(response, answer, prompt): raise ValueError("boom")
def nan(response, answer, prompt): return float("nan")
def infinite(response, answer, prompt): return float("inf")
def text(response, answer, prompt): return "1.0"
def hoard(response, answer, prompt): return float(len(bytearray(64 << 30)))
def report(response, answer, prompt): return Outcome(OutcomeKind.FAILED, 0.0, False, detail="judge is down")
def no_format(response, answer, prompt): return Outcome(OutcomeKind.WRONG_FORMAT, 0.0, False)
def half(response, answer, prompt): return 0.5

def once(response, answer, prompt):
    if os.path.exists(response): return 1.0
    open(response, "w").close()
    os.abort()

def noisy(response, answer, prompt, factor=1):
    print("printing to stdout, reading stdin:", sys.stdin.read())
    return factor * len(response)

def burn(response, answer, prompt):
    end = time.process_time() + 0.2
    while time.process_time() < end: pass
    return os.getpid()

def loaded_modules(response, answer, prompt):
    return float("torch" in sys.modules or "megatron" in sys.modules)
"""


@pytest.fixture(scope="module")
def terms_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("terms")
    (folder / "user_terms.py").write_text(TERMS)
    (folder / "broken_terms.py").write_text("def f(:\n")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may keep a worker waiting; only the tests of the wall clock let it decide."""
    monkeypatch.setattr(process, "WALL_FACTOR", 1000.0)


def prompt(verifier: str = "exact", answer: str = "12") -> Prompt:
    return Prompt("prompt-7", (Message("user", "?"),), np.zeros(3, np.int32), answer, verifier)


def config(*terms: RewardTerm, **options: object) -> RewardsConfig:
    return RewardsConfig.model_validate({"terms": terms, "timeout_s": 0.2, "memory_bytes": 1 << 30, **options})


def scored(settings: RewardsConfig, *calls: tuple[Prompt, str], penalty: float = 0.0, ending: Ending = Ending.STOP):
    async def run() -> tuple[list[Outcome], dict[str, int]]:
        scorer = Scorer(settings, penalty)
        try:
            return [await scorer.score(p, response, ending) for p, response in calls], scorer.failures
        finally:
            await scorer.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("function", "cause", "detail"),
    [
        ("spin", "deadline", "rewards.timeout_s of CPU time"),
        ("spin_in_c", "deadline", "rewards.timeout_s of CPU time"),
        ("leave", "crash", "exit status 3"),
        ("abort", "crash", "SIGABRT"),
        ("fail", "exception", "ValueError: boom"),
        ("hoard", "exception", "MemoryError"),
        ("nan", "not_a_number", "returned nan"),
        ("infinite", "not_a_number", "returned inf"),
        ("text", "not_a_number", "returned a str"),
        ("report", "reported", "judge is down"),
    ],
)
def test_a_fault_is_tried_twice_counted_and_never_a_reward(terms_folder, function, cause, detail):
    verifier = f"user_terms:{function}"
    outcomes, failures = scored(config(), (prompt(verifier), "12"), (prompt(), "12"))
    assert outcomes[0].kind is OutcomeKind.FAILED
    assert outcomes[0].reward == 0.0 and not outcomes[0].correct
    assert f"term {verifier}, prompt prompt-7: " in outcomes[0].detail and detail in outcomes[0].detail
    assert failures == {cause: 2}
    assert outcomes[1].correct, "the next response is judged by a fresh worker"


def test_a_call_that_only_waits_ends_by_the_wall_clock(terms_folder, monkeypatch):
    monkeypatch.setattr(process, "WALL_FACTOR", 2.0)
    outcomes, failures = scored(config(), (prompt("user_terms:sleep"), ""))
    assert failures == {"deadline": 2} and "no answer within 0.4 s of wall clock" in outcomes[0].detail


@pytest.mark.parametrize(
    ("term", "response"),
    [
        (RewardTerm(name="math"), "$9^{9^{9^9}}$"),
        (RewardTerm(name="regex", options={"pattern": "(?:a+)+(b)"}), "a" * 64),
    ],
)
def test_a_pathological_response_ends_at_the_deadline(term, response):
    outcomes, failures = scored(config(term, timeout_s=0.8), (prompt(), response))
    assert outcomes[0].kind is OutcomeKind.FAILED and failures == {"deadline": 2}


def test_a_call_that_fails_once_gets_its_reward_from_a_fresh_worker(terms_folder, tmp_path):
    outcomes, failures = scored(config(), (prompt("user_terms:once"), str(tmp_path / "seen")))
    assert outcomes[0].correct and failures == {"crash": 1}


def test_a_killed_call_takes_its_own_children_along(terms_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "WALL_FACTOR", 6.0)
    outcomes, _ = scored(config(timeout_s=0.3), (prompt("user_terms:sleep_in_a_child"), str(tmp_path / "pid")))
    assert outcomes[0].kind is OutcomeKind.FAILED
    child = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_one_stuck_call_does_not_hold_up_another_worker(terms_folder):
    async def run() -> tuple[Outcome, bool]:
        scorer = Scorer(config(workers=2, timeout_s=60.0), 0.0)
        stuck = asyncio.create_task(scorer.score(prompt("user_terms:spin"), "", Ending.STOP))
        outcome = await scorer.score(prompt(), "12", Ending.STOP)
        was_running = not stuck.done()
        await scorer.close()
        assert (await stuck).kind is OutcomeKind.FAILED
        return outcome, was_running

    outcome, was_running = asyncio.run(run())
    assert outcome.correct and was_running


def test_failing_without_end_stops_the_run_with_the_last_cause(terms_folder):
    bad, good = (prompt("user_terms:fail"), "12"), (prompt(), "12")
    with pytest.raises(RewardError, match="rewards.max_failures=2: .*user_terms:fail, prompt prompt-7: ValueError: boom"):
        scored(config(max_failures=2), bad, bad)
    outcomes, _ = scored(config(max_failures=2), bad, good, bad)
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.FAILED, OutcomeKind.VALUE, OutcomeKind.FAILED]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("exakt", {}, "the nearest is exact"),
        ("no_such_module:f", {}, "cannot import no_such_module"),
        ("user_terms:no_such_function", {}, "has no function no_such_function"),
        ("broken_terms:f", {}, "SyntaxError"),
        ("regex", {"pattern": "ab"}, "has 0 groups"),
        ("user_terms:noisy", {"faktor": 2}, "faktor"),
    ],
)
def test_terms_that_cannot_be_loaded_are_refused_at_construction(terms_folder, name, options, message):
    with pytest.raises(RewardError, match=message):
        Scorer(config(RewardTerm(name=name, options=options), workers=2), 0.0)


def test_a_prompts_own_verifier_that_cannot_be_loaded_stops_the_run(terms_folder):
    with pytest.raises(RewardError, match="cannot import no_such_module"):
        scored(config(), (prompt("no_such_module:f"), "12"))


def test_terms_are_added_by_weight_and_only_full_scores_are_correct(terms_folder):
    terms = (RewardTerm(name="exact"), RewardTerm(name="user_terms:half", weight=0.5))
    outcomes, _ = scored(config(*terms), (prompt(), "12"), (prompt(), "13"))
    assert outcomes[0] == Outcome(OutcomeKind.VALUE, 1.25, False, {"exact": 1.0, "user_terms:half": 0.5})
    assert outcomes[1] == Outcome(OutcomeKind.VALUE, 0.25, False, {"exact": 0.0, "user_terms:half": 0.5})
    bonus = (RewardTerm(name="exact"), RewardTerm(name="user_terms:half", weight=-0.5))
    outcomes, _ = scored(config(*bonus), (prompt(), "12"))
    assert outcomes[0].correct and outcomes[0].reward == 0.75


def test_a_value_outside_its_declared_range_stops_the_run(terms_folder):
    inside = RewardTerm(name="user_terms:half", range=(0, 0.5))
    assert scored(config(inside), (prompt(), "12"))[0][0].reward == 0.5
    outside = RewardTerm(name="user_terms:half", range=(0.6, 1))
    with pytest.raises(RewardError, match=r"user_terms:half gave 0.5 for prompt prompt-7, outside its range \[0.6, 1.0\]"):
        scored(config(outside), (prompt(), "12"))


def test_two_terms_of_one_name_are_told_apart():
    terms = [RewardTerm(name="regex", options={"pattern": pattern}) for pattern in (r"<(\d+)>", r"\[(\d+)\]")]
    outcomes, _ = scored(config(*terms), (prompt(), "<12> [13]"))
    assert outcomes[0].terms == {"regex": 1.0, "regex#2": 0.0} and outcomes[0].reward == 1.0 and not outcomes[0].correct


def test_no_answer_is_wrong_format_with_reward_zero(terms_folder):
    outcomes, failures = scored(
        config(RewardTerm(name="exact", options={"prefix": "Answer:"})), (prompt(), "12"), (prompt(), "Answer: 12")
    )
    assert outcomes[0] == Outcome(OutcomeKind.WRONG_FORMAT, 0.0, False, {"exact": 0.0})
    assert outcomes[1].correct and failures == {}
    outcomes, _ = scored(config(), (prompt("user_terms:no_format"), "12"))
    assert outcomes[0].kind is OutcomeKind.WRONG_FORMAT


def test_the_repetition_penalty_falls_on_repeating_responses_only():
    assert scored(config(), (prompt(), "12"), penalty=0.3, ending=Ending.REPEAT)[0][0].reward == pytest.approx(0.7)
    assert scored(config(), (prompt(), "12"), penalty=0.3, ending=Ending.LENGTH)[0][0].reward == 1.0


def test_a_terms_own_prints_and_reads_do_not_disturb_the_answer(terms_folder):
    terms = RewardTerm(name="user_terms:noisy", options={"factor": 3})
    assert scored(config(terms), (prompt(), "x" * 100_000))[0][0].reward == 300_000


def test_workers_load_neither_torch_nor_megatron(terms_folder):
    assert scored(config(), (prompt("user_terms:loaded_modules"), ""))[0][0].reward == 0.0


def test_the_cpu_deadline_is_of_each_call_not_of_the_worker(terms_folder):
    outcomes, failures = scored(config(timeout_s=0.6), *[(prompt("user_terms:burn"), "")] * 5)
    assert failures == {} and len({outcome.reward for outcome in outcomes}) == 1, "one worker spent 1 s in five calls"


OWNER = """
import asyncio, sys
from megatron_rl.config import RewardsConfig
from megatron_rl.rewards.scorer import Scorer

async def main():
    scorer = Scorer(RewardsConfig(workers=2, timeout_s=600), 0.0)
    print(*[worker._process.pid for worker in scorer._workers], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_no_worker_outlives_an_owner_that_was_killed():
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
    assert len(workers) == 2
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
