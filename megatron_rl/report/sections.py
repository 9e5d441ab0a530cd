"""The cards of report.html, one function each: what of a run is charted, and how it is explained.

Each takes the whole RunData and returns markup; a card whose numbers are absent says so. Drawing: `charts.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from statistics import fmean
from typing import Any

import yaml

from megatron_rl import config as configuration
from megatron_rl.config import Config
from megatron_rl.report import charts
from megatron_rl.report.charts import Line, number
from megatron_rl.report.run_data import RunData, Trained
from megatron_rl.types import DropReason, Ending

PHASES = {  # name -> colour, in the order of an iteration; turns on a shared GPU look alike in pairs
    "evaluation": 5,
    "rollout": 0,
    "reward": 4,
    "release": 6,
    "onload": 2,
    "reference": 5,
    "train": 1,
    "offload": 2,
    "resume": 6,
    "publish": 3,
    "checkpoint": 7,
}
ENDINGS = {Ending.STOP: 2, Ending.LENGTH: 4, Ending.BUDGET: 0, Ending.REPEAT: 6, Ending.ABORT: 7}
CHARTED = (  # by a card of their own; beginnings of keys
    *("reward/", "length/mean", "tokens/", "trajectories/", "time/", "staleness/", "mismatch/", "drift/"),
    *("kv/restored_tokens", "kv/recomputed_tokens", "eval/", "memory/gpu_"),
)
MAX_CATEGORIES = 12  # of one tag; a tag with more values names prompts rather than sorts them


def reward_card(run: RunData) -> str:
    names = [("reward/mean", "reward", 0), ("reward/correct", "correctness", 2)]
    about = "Mean of each iteration's batch; a response is correct at a full score only."
    if _column(run, "reward/mean") == _column(run, "reward/correct"):
        names, about = [("reward/correct", "reward = correctness", 0)], "Mean of each iteration's batch."
    return _card("Reward and correctness", about, *_averaged(run, names))


def length_card(run: RunData) -> str:
    return _card(
        "Response length",
        "Tokens of a whole response, mean of the batch.",
        *_averaged(run, (("length/mean", "tokens", 3),), floor=0.0),
    )


def phases_card(run: RunData) -> str:
    found = {key.removeprefix("time/").removesuffix("_s") for row in run.rows for key in row if key.startswith("time/")}
    names = [name for name in PHASES if name in found] + sorted(found - set(PHASES))
    layers = {name: _column(run, f"time/{name}_s") for name in names}
    colours = [PHASES.get(name, 6) for name in names]
    chart = charts.stacked_bars(_iterations(run), layers, "s", colours=colours)
    marks = charts.legend([(name, f"b{colour}") for name, colour in zip(names, colours, strict=True)])
    return _card("Time of each phase", "Seconds of an iteration.", chart, marks)


def tokens_card(run: RunData) -> str:
    names = (("tokens/generated", "generated", 0), ("tokens/trained", "trained on", 1))
    about = "Generated in an iteration, and computed in training: without what has no advantage, where an iteration is one step."
    return _card("Tokens", about, *_averaged(run, names, floor=0.0))


def endings_card(run: RunData) -> str:
    xs = sorted(run.endings)
    layers = {str(e): [float(run.endings[i].get(e, 0)) for i in xs] for e in ENDINGS}
    chart = charts.stacked_bars(xs, layers, "segments", colours=list(ENDINGS.values()))
    marks = charts.legend([(str(e), f"b{colour}") for e, colour in ENDINGS.items()])
    return _card("How segments ended", "Segments of each iteration; budget and abort are continued later.", chart, marks)


def staleness_card(run: RunData) -> str:
    names = (("staleness/mean", "staleness", 5), ("staleness/max", "largest of the batch", 6))
    about = "Weight versions between a trained token and the weights it trained."
    return _card("Staleness", about, *_averaged(run, names, floor=0.0))


def mismatch_card(run: RunData) -> str:
    names = (("mismatch/logp_abs_mean", "mismatch: current version", 1), ("drift/logp_abs_mean", "drift: older versions", 0))
    about = "Mean |difference| of their log-probs, over tokens of the current version and of older ones."
    return _card("Engine and trainer", about, *_averaged(run, names, floor=0.0))


def kv_card(run: RunData) -> str:
    """Only where KV was kept."""
    if not any("kv/restored_tokens" in row for row in run.rows):
        return ""
    names = (("kv/restored_tokens", "put back", 2), ("kv/recomputed_tokens", "computed again", 1))
    failures = sum(row.get("kv/restore_failures") or 0 for row in run.rows)
    spilled = sum(row.get("kv/spilled_bytes") or 0 for row in run.rows)
    about = f"Context tokens of continued trajectories. Failures: {failures:,}; bytes written to disk: {spilled:,}."
    return _card("KV over the training phase", about, *_averaged(run, names, floor=0.0))


def shared_gpu_card(run: RunData) -> str:
    """Only where trainer and server took turns on a GPU."""
    if not any("memory/gpu_free_released_bytes" in row for row in run.rows):
        return ""
    states = {"released": 0, "onloaded": 1, "trained": 2, "resumed": 5, "published": 4, "generating": 3}
    lines = [Line(state, _column(run, f"memory/gpu_free_{state}_bytes"), colour) for state, colour in states.items()]
    marks = charts.legend([(line.name, f"b{line.colour}") for line in lines])
    about = (
        "Bytes free once the server was released, the trainer onloaded, had trained, the server resumed, published, generating."
    )
    return _card("Memory of the shared GPU", about, charts.line_chart(_iterations(run), lines, floor=0.0), marks)


def success_card(run: RunData) -> str:
    early, late = quarters(run)
    rows = [
        (
            f"{key}: {value}",
            _correctness(early, belongs),
            _correctness(late, belongs),
            f"{sum(map(belongs, run.trained))} trajectories",
        )
        for key, value, belongs in categories(run.trained)
    ]
    if not rows:
        return _card("Success by difficulty and tag", "", '<p class="nothing">the prompts carry neither difficulty nor tags</p>')
    chart = charts.dumbbells(rows, "first quarter", "last quarter")
    marks = charts.legend([("first quarter of the iterations", "ring"), ("last quarter", "b0")])
    return _card("Success by difficulty and tag", "Correctness of the trained trajectories.", chart, marks)


def conservation_card(run: RunData) -> str:
    count = {term.name: term.count for term in run.terms}
    dropped = [(f"dropped: {reason}", count[f"dropped: {reason}"]) for reason in DropReason]
    parts = [("trained", count["trained"], 2), ("waiting", count["waiting"], 4)]
    parts += [(name, value, 6) for name, value in dropped]
    total = count["trained"] + count["waiting"] + sum(value for _, value in dropped)
    sums = [
        ("drawn = trained + waiting + dropped", count["drawn"], total),
        ("made by engines = kept + cut", count["made by engines"], count["kept"] + count["cut after repetition"]),
    ]
    verdicts = "".join(
        f'<tr><td>{law}</td><td class="n">{left:,} {"=" if left == right else "≠"} {right:,}</td>'
        f"<td>{_verdict(left == right)}</td></tr>"
        for law, left, right in sums
    )
    rows = "".join(f'<tr><td>{escape(t.name)}</td><td class="n">{t.count:,}</td><td>{t.unit}</td></tr>' for t in run.terms)
    return _card(
        "Conservation",
        "What became of everything drawn and generated; each line is counted from its own rows of the replay buffer.",
        charts.share_bar(parts),
        f"<table>{rows}{verdicts}</table>",
    )


def evaluation_curve_card(run: RunData) -> str:
    """Only where the run evaluated while it trained."""
    sets = sorted({key.split("/")[1] for row in run.rows for key in row if key.startswith("eval/") and key.endswith("/pass@1")})
    if not sets:
        return ""
    rows = [row for row in run.rows if any(key.startswith("eval/") for key in row)]
    xs = [row["iteration"] for row in rows]

    def column(key: str) -> list[float | None]:
        return [row.get(key) for row in rows]

    keys = [f"eval/{name}/pass@1" for name in sets]
    scores = [
        Line(name, column(key), i % 7, low=column(f"{key}/low"), high=column(f"{key}/high"))
        for i, (name, key) in enumerate(zip(sets, keys, strict=True))
    ]
    lengths = [Line(name, column(f"eval/{name}/tokens"), i % 7) for i, name in enumerate(sets)]
    return _card(
        "Evaluation while training",
        "pass@1 before each iteration, with its 95 % bootstrap interval over prompts; below, tokens of a response.",
        charts.line_chart(xs, scores),
        charts.line_chart(xs, lengths, floor=0.0, height=130),
        charts.legend([(line.name, f"b{line.colour}") for line in scores]),
    )


def evaluation_card(run: RunData) -> str:
    if not run.evaluation:
        return ""
    rows = "".join(_evaluated(moment, result) for moment, result in run.evaluation.items())
    before, after = run.evaluation.get("before", {}), run.evaluation.get("after", {})
    if before.get("mean") is not None and after.get("mean") is not None:
        gain = after["mean"] - before["mean"]
        rows += f'<tr><td>gain</td><td class="n"><b class="{_direction(gain)}">{gain:+.3f}</b></td><td colspan="6"></td></tr>'
    return _card(
        "Held-out prompts, before and after",
        "Never drawn in training. Correctness with its 95 % bootstrap interval over prompts.",
        '<div class="scroll"><table><tr><th></th><th class="n">correct</th><th></th><th class="n">interval</th><th>answers</th>'
        f'<th class="n">sampled</th><th class="n">prompts</th><th>model</th></tr>{rows}</table></div>',
        wide=True,
    )


def others_card(run: RunData) -> str:
    """Every further metric as a small chart."""
    keys = sorted({key for row in run.rows for key in row if not key.startswith(CHARTED)} - {"iteration", "weight_version"})
    xs = _iterations(run)
    small = "".join(
        f"<div><h3>{escape(key)}</h3>{charts.line_chart(xs, [Line(key, _column(run, key), i % 7)], height=130)}</div>"
        for i, key in enumerate(keys)
    )
    if not keys:
        return ""
    return f'<section class="card wide"><h2>Further metrics</h2><div class="grid2">{small}</div></section>'


def config_card(run: RunData) -> str:
    """The settings that were chosen, then all of them."""
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td><td><code>{escape(str(value))}</code></td></tr>"
        for key, value in chosen_settings(run.config)
    )
    everything = escape(configuration.dump(run.config))
    return _card(
        "Configuration",
        "Settings that differ from their defaults.",
        f'<div class="scroll"><table class="settings">{rows}</table></div>',
        f"<details><summary>all settings</summary><pre>{everything}</pre></details>",
    )


def chosen_settings(config: Config) -> list[tuple[str, str]]:
    """(dotted key, value as YAML on one line) of every setting that is required or not at its default."""
    tree = config.model_dump(mode="json")
    chosen = []
    for key, info in configuration.iter_settings(Config):
        found: Any = config
        plain: Any = tree
        for part in key.split("."):
            found, plain = getattr(found, part), plain[part]
        if info.is_required() or found != info.get_default(call_default_factory=True):
            text = yaml.safe_dump(plain, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("...\n").strip()
            chosen.append((key, text))
    return chosen


def quarters(run: RunData) -> tuple[list[Trained], list[Trained]]:
    """Trajectories trained in the first and in the last quarter of the iterations that trained."""
    iterations = sorted({t.iteration for t in run.trained})
    size = max(1, len(iterations) // 4)
    first, last = set(iterations[:size]), set(iterations[-size:])
    return [t for t in run.trained if t.iteration in first], [t for t in run.trained if t.iteration in last]


def categories(trained: Sequence[Trained]) -> list[tuple[str, str, Callable[[Trained], bool]]]:
    """(tag, value, does it belong) for difficulty in fifths and every tag that sorts the prompts into a few classes."""
    found: list[tuple[str, str, Callable[[Trained], bool]]] = []
    fifths = sorted({_fifth(t.difficulty) for t in trained if t.difficulty is not None})
    for fifth in fifths:
        name = f"{fifth / 5:.1f} to {(fifth + 1) / 5:.1f}"
        found.append(("pass rate", name, partial(_has_fifth, fifth)))
    values: dict[str, set[str]] = defaultdict(set)
    for t in trained:
        for key, value in t.tags.items():
            values[key].add(value)
    for key in sorted(values):
        if len(values[key]) <= MAX_CATEGORIES:
            found += [(key, value, partial(_has_tag, key, value)) for value in sorted(values[key])]
    return found


def _fifth(pass_rate: float) -> int:
    return min(4, int(pass_rate * 5))


def _has_fifth(fifth: int, trajectory: Trained) -> bool:
    return trajectory.difficulty is not None and _fifth(trajectory.difficulty) == fifth


def _has_tag(key: str, value: str, trajectory: Trained) -> bool:
    return trajectory.tags.get(key) == value


def _correctness(trained: Iterable[Trained], belongs: Callable[[Trained], bool]) -> float | None:
    values = [t.correct for t in trained if belongs(t)]
    return fmean(values) if values else None


def _averaged(run: RunData, names: Sequence[tuple[str, str, int]], floor: float | None = None) -> tuple[str, str]:
    """(chart, legend) of metrics as (key, name, colour): raw values behind their moving averages."""
    window = max(3, min(20, len(run.rows) // 10))
    raw, smooth = [], []
    for key, name, colour in names:
        values = _column(run, key)
        if any(value is not None for value in values):
            raw.append(Line(name, values, colour, faint=True))
            smooth.append(Line(f"{name}, mean of {window}", charts.moving_average(values, window), colour))
    marks = charts.legend([(line.name, f"b{line.colour}") for line in smooth])
    return charts.line_chart(_iterations(run), [*raw, *smooth], floor=floor), marks


def _evaluated(moment: str, result: dict[str, Any]) -> str:
    mean, low, high = (result.get(key) for key in ("mean", "low", "high"))
    sampled = result.get("sampled_mean")
    drawn = charts.interval(mean, low, high) if mean is not None and low is not None and high is not None else ""
    bounds = f"{low:.3f} – {high:.3f}" if low is not None and high is not None else "–"
    return (
        f'<tr><td>{moment}</td><td class="n"><b>{_fixed(mean)}</b></td><td>{drawn}</td><td class="n">{bounds}</td>'
        f"<td>{'greedy' if result.get('greedy') else 'sampled'}</td>"
        f'<td class="n">{_fixed(sampled)}</td><td class="n">{number(result.get("n"))}</td>'
        f"<td><code>{escape(str(result.get('model', '–')))}</code></td></tr>"
    )


def _fixed(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _verdict(holds: bool) -> str:
    return '<span class="chip up">holds</span>' if holds else '<span class="chip down">broken</span>'


def _direction(change: float) -> str:
    return "up" if change > 0 else "down" if change < 0 else ""


def _iterations(run: RunData) -> list[int]:
    return [row["iteration"] for row in run.rows]


def _column(run: RunData, key: str) -> list[float | None]:
    return [row.get(key) for row in run.rows]


def _card(title: str, note: str, *body: str, wide: bool = False) -> str:
    about = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<section class="card{" wide" if wide else ""}"><h2>{escape(title)}</h2>{about}{"".join(body)}</section>'
