import io
import logging

from rich.console import Console

from megatron_rl.report.progress import Progress, summary

ROW = {
    "iteration": 4,
    "reward/mean": 0.5,
    "reward/correct": 0.25,
    "length/mean": 12.0,
    "time/rollout_s": 3.0,
    "time/train_s": 1.5,
}


def rendered(progress):
    out = Console(file=io.StringIO(), width=140)
    out.print(progress.line())
    return out.file.getvalue()


def test_without_a_terminal_there_is_one_log_line_an_iteration_and_nothing_else(caplog):
    console = Console(file=io.StringIO(), force_terminal=False)
    progress = Progress(10, 4, console)
    with caplog.at_level(logging.INFO):
        progress.phase("rollout", groups=8)
        progress.tokens(1000)
        progress.group_complete()
        progress.phase("train")
        progress.iteration_done(ROW)
    progress.close()
    assert console.file.getvalue() == ""
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("iteration 5/10, reward 0.500, correct 0.250, length 12, 4.5 s")


def test_the_live_line_tells_iteration_phase_speed_groups_and_scores():
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    progress = Progress(10, 4, console)
    progress.iteration_done(ROW)
    progress.phase("rollout", groups=8)
    progress.tokens(1000)
    progress.group_complete(3)
    line = rendered(progress)
    progress.close()
    for part in ("iteration 5/10", "rollout", "groups 3/8", "tokens/s", "reward 0.500", "correct 0.250", "left"):
        assert part in line
    assert "\x1b[" in console.file.getvalue(), "drawn live in a terminal"


def test_a_phase_counts_only_its_own_tokens():
    progress = Progress(10, 0, Console(file=io.StringIO(), force_terminal=False))
    progress.phase("rollout", groups=2)
    progress.tokens(5)
    progress.phase("train")
    assert "tokens/s" not in rendered(progress) and "groups" not in rendered(progress)


def test_an_iteration_without_a_batch_says_so():
    assert summary({"iteration": 0, "tokens/generated": 64}, 3, None) == "iteration 1/3, no batch, tokens 64, 0.0 s, ? left"


def test_time_left_is_that_of_the_iterations_this_start_still_has_to_do():
    assert summary(ROW, 10, 3725.0).endswith("1:02:05 left")
    assert summary(ROW, 10, 65.0).endswith("1:05 left")
