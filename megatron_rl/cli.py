"""The command `megatron-rl`. It reads arguments and says errors; what a command does is written where it belongs.

torch and Megatron are imported inside the commands that need them, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from megatron_rl import config as configuration
from megatron_rl.config import Config, DPOConfig, SFTConfig
from megatron_rl.errors import ConfigError, MegatronRLError
from megatron_rl.settings_help import HELP_WIDTH, listing

if TYPE_CHECKING:
    from megatron_rl.rejection import Rules

app = typer.Typer(
    help="Reinforcement learning of language models with partial rollouts: Kimi k1.5 on Megatron-Core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # our own bugs show a plain traceback
)

long2short = typer.Typer(help="Shorter answers from a long-CoT model (paper 2.4).", no_args_is_help=True)
app.add_typer(long2short, name="long2short")

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="OVERRIDES", help="settings that replace the file's: section.key=value")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="run folder")]


class Split(StrEnum):
    HELD_OUT = "held_out"
    TRAIN = "train"


class Moment(StrEnum):
    BEFORE = "before"
    AFTER = "after"


class Form(StrEnum):
    HF = "hf"
    MEGATRON = "megatron"


class Keep(StrEnum):
    SHORTEST = "shortest"
    FIRST = "first"
    ALL = "all"


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@app.command(cls=listing(Config))
def train(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Train as CONFIG says; a run that was interrupted goes on where it stopped."""
    settings = configuration.load(config, overrides)
    _start_logging()
    from megatron_rl.loop import train as run

    _exit_with(lambda: run(settings), "and loses no finished token")


@app.command(cls=listing(SFTConfig))
def sft(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Fine-tune on conversations, loss on the assistant's tokens; an interrupted run goes on from its last checkpoint."""
    settings = configuration.load_supervised(SFTConfig, config, overrides)
    _start_logging()
    from megatron_rl.supervised.sft import sft as run

    _exit_with(lambda: run(settings))


@app.command("eval")
def evaluate(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG|MODEL", help="YAML file; or a Hugging Face model folder, with --set")
    ] = None,
    overrides: OverridesArgument = None,
    model: Annotated[Path | None, typer.Option(help="Hugging Face model folder; default model.folder of the config")] = None,
    split: Annotated[Split, typer.Option(help="prompts to answer")] = Split.HELD_OUT,
    questions: Annotated[
        str | None, typer.Option("--set", help="instead of a split: a ready-made set, or a JSONL file with answers")
    ] = None,
    list_sets: Annotated[bool, typer.Option("--list", help="name the ready-made sets, and do nothing else")] = False,
    greedy: Annotated[bool, typer.Option("--greedy", help="the likeliest token each time; default without --sampled")] = False,
    sampled: Annotated[bool, typer.Option("--sampled", help="sample as `rollout` says; with --greedy, after it")] = False,
    samples: Annotated[int, typer.Option(min=1, help="sampled responses for each prompt")] = 1,
    record: Annotated[
        Moment | None, typer.Option(help="also put the result into the run's evaluation.json, which its report shows")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="also write the result as a page")] = None,
) -> None:
    """Score a model on the prompts that training never draws, or on a set: tables on stderr, one JSON object on stdout:
    the evaluation, or with both --greedy and --sampled an object of these two."""
    if list_sets:
        _wide_console().print(sets_table())
        return
    if samples > 1 and not sampled:
        raise ConfigError(f"--samples {samples}: greedy responses to one prompt are all the same; add --sampled, or leave it out")
    is_bare = config is not None and config.is_dir()
    if config is None or (is_bare and not questions):
        raise ConfigError("eval: give a CONFIG, or a MODEL folder with --set; --list names the ready-made sets")
    if html and greedy and sampled:
        raise ConfigError("--html: a page shows one evaluation; leave out --greedy or --sampled")
    if is_bare and record:
        raise ConfigError("--record: a MODEL folder is no run; give the run's CONFIG, and the folder as --model")
    settings = configuration.load_bare(config, overrides) if is_bare else configuration.load(config, overrides)
    _start_logging()
    from megatron_rl.evaluate import Way, evaluate_ways
    from megatron_rl.report.evaluation import evaluation_page, evaluation_table, record_evaluation
    from megatron_rl.run_folder import write_atomically

    ways = [*([Way(True)] if greedy or not sampled else []), *([Way(False, samples)] if sampled else [])]
    results = evaluate_ways(settings, model or settings.model.folder, ways, split=questions or split.value)
    for result in results:
        Console(stderr=True).print(evaluation_table(result))
    typer.echo(json.dumps(results[0] if len(results) == 1 else dict(zip(("greedy", "sampled"), results, strict=True)), indent=2))
    if html:
        write_atomically(html, evaluation_page(results[0]))
    if record:
        settings.run.folder.mkdir(parents=True, exist_ok=True)
        for result in results:
            record_evaluation(settings.run.folder, record.value, result)


@app.command()
def curate(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option(help="folder to write; an interrupted curation goes on there")],
    overrides: OverridesArgument = None,
    model: Annotated[Path | None, typer.Option(help="Hugging Face model folder; default model.folder of the config")] = None,
    samples: Annotated[int, typer.Option(min=1, help="responses that make a pass rate (paper 2.1)")] = 10,
    temperature: Annotated[
        float, typer.Option(min=0.01, help="their sampling temperature; the config's top_p, top_k and min_p hold too")
    ] = 1.0,
    tries: Annotated[int, typer.Option(min=1, help="answers without reasoning, none of which may be right (paper 2.1)")] = 8,
    lowest: Annotated[float, typer.Option(min=0, max=1, help="least pass rate kept")] = 0.0,
    highest: Annotated[float, typer.Option(min=0, max=1, help="largest pass rate kept")] = 0.9,
    in_flight: Annotated[int, typer.Option(min=1, help="prompts worked on at a time")] = 32,
) -> None:
    """Keep the training prompts that RL can learn from; says of every prompt why it was kept or dropped."""
    settings = configuration.load(config, overrides)
    _start_logging()
    from megatron_rl.curate import Rules
    from megatron_rl.curate import curate as decide

    rules = Rules(samples=samples, temperature=temperature, tries=tries, lowest=lowest, highest=highest, in_flight=in_flight)
    typer.echo(json.dumps(decide(settings, model or settings.model.folder, out, rules)))


@app.command("sft-data")
def sft_data(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option(help="folder to write; an interrupted sampling goes on there")],
    overrides: OverridesArgument = None,
    model: Annotated[Path | None, typer.Option(help="Hugging Face model folder; default model.folder of the config")] = None,
    samples: Annotated[int, typer.Option(min=1, help="responses for each prompt")] = 8,
    keep: Annotated[Keep, typer.Option(help="which of a prompt's right responses")] = Keep.FIRST,
    most: Annotated[int, typer.Option(min=1, help="of one prompt at most, unless all are kept")] = 1,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="a longer response is not kept [tokens]")] = None,
    bare: Annotated[
        bool, typer.Option("--bare", help="write the questions without data.system_message and data.worked_turns")
    ] = False,
) -> None:
    """Sample responses to the training prompts and write the right ones as data for sft."""
    from megatron_rl.rejection import Rules

    _write_data(config, overrides, model, out, Rules(samples, keep.value, most, max_tokens, bare))


@long2short.command()
def merge(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Hugging Face model folders of one shape")],
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    weight: Annotated[list[float] | None, typer.Option(help="one a model, in order; scaled to sum to 1")] = None,
) -> None:
    """Average the weights of models, tensor by tensor."""
    from megatron_rl.long2short.merge import merge as write

    shares = write(models, out, weight or None)
    typer.echo(f"{out}: " + " + ".join(f"{share:.3g} x {model}" for share, model in zip(shares, models, strict=True)))


@long2short.command()
def reject(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option(help="folder to write: sft.jsonl and pairs.jsonl; an interrupted sampling goes on there")],
    overrides: OverridesArgument = None,
    model: Annotated[Path | None, typer.Option(help="Hugging Face model folder; default model.folder of the config")] = None,
    samples: Annotated[int, typer.Option(min=2, help="responses for each prompt (paper 2.4)")] = 8,
) -> None:
    """Sample responses to the training prompts; keep the shortest right one for sft, and it against longer ones for dpo."""
    from megatron_rl.rejection import Rules

    _write_data(config, overrides, model, out, Rules(samples=samples, keep="shortest", pairs=True))


@long2short.command(cls=listing(DPOConfig))
def dpo(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Train on preference pairs; an interrupted run goes on from its last checkpoint."""
    settings = configuration.load_supervised(DPOConfig, config, overrides)
    _start_logging()
    from megatron_rl.long2short.dpo import dpo as run

    _exit_with(lambda: run(settings))


@long2short.command()
def rl(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option(help="run folder of the second phase")],
    overrides: OverridesArgument = None,
    model: Annotated[Path | None, typer.Option(help="folder it starts from; default hf/ of the config's run.folder")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="longest response; default half of rollout.max_response_tokens")
    ] = None,
) -> None:
    """Second RL phase: train as CONFIG says, with the length reward and much shorter responses, from a trained model.

    Give the first phase's OVERRIDES again; of lengths, temperature, buffer and length reward they are the second's own."""
    from megatron_rl.long2short.rl import second_phase

    train(config, second_phase(config, overrides or [], out, model=model, max_tokens=max_tokens))


@long2short.command()
def plot(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULT...", help="JSON files from `megatron-rl eval`, or model folders, with --set")
    ],
    out: Annotated[Path, typer.Option(help="file to write, .html or .svg")] = Path("long2short.html"),
    questions: Annotated[str | None, typer.Option("--set", help="what model folders are evaluated on, as in eval")] = None,
    samples: Annotated[int, typer.Option(min=1, help="model folders: responses for each prompt; 1 is greedy")] = 1,
) -> None:
    """Draw tokens against accuracy of several models (paper, figure 7)."""
    from megatron_rl.long2short.plot import Result, read_result, write_plot

    folders = [path for path in results if path.is_dir()]
    if folders and not questions:
        raise ConfigError(f"plot: {folders[0]} is a model folder; say with --set what to evaluate it on")
    read = {path: read_result(path) for path in results if path not in folders}
    if folders:
        _start_logging()
        from megatron_rl.evaluate import evaluate as score
    for path in folders:
        found = score(configuration.load_bare(path), path, split=questions or "", greedy=samples == 1, samples=samples)
        read[path] = Result(path.resolve().parent.name if path.name == "hf" else path.name, found)
    write_plot([read[path] for path in results], out)
    typer.echo(str(out))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Hugging Face folder, or Megatron distributed checkpoint")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="folder to write; must not exist")],
    to: Annotated[Form, typer.Option(help="form of TARGET")],
    tensor_parallel: Annotated[int, typer.Option(min=1, help="ranks that share each layer while converting")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(min=1, help="ranks in a row while converting")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="of a Hugging Face TARGET; a checkpoint always holds float32")] = Dtype.BFLOAT16,
) -> None:
    """Convert between a Hugging Face model folder and a Megatron distributed checkpoint."""
    _start_logging()
    from megatron_rl.weights.convert import convert as write

    write(source, target, to=to.value, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel, dtype=dtype.value)


@app.command()
def inspect(
    run: RunArgument,
    trajectory: Annotated[int | None, typer.Option(metavar="ID", help="show this trajectory with its segments")] = None,
    group: Annotated[int | None, typer.Option(metavar="ID", help="show this group and its members")] = None,
) -> None:
    """Look into a run: conservation table and last iterations, or one group or trajectory."""
    from megatron_rl.report.inspect import show_group, show_run, show_trajectory

    if trajectory is not None and group is not None:
        raise ConfigError("--trajectory and --group: give one of them")
    console = _wide_console()
    if trajectory is not None:
        show_trajectory(run, trajectory, console)
    elif group is not None:
        show_group(run, group, console)
    else:
        show_run(run, console)


@app.command()
def report(run: RunArgument) -> None:
    """Write RUN/report.html anew, also while the run goes on."""
    from megatron_rl.report.html import write_report
    from megatron_rl.report.supervised import write_supervised_report
    from megatron_rl.run_folder import kind_of

    write = write_report if kind_of(run) == Config.kind else write_supervised_report
    typer.echo(str(write(run)))


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="also check this config and what it points at")
    ] = None,
    overrides: OverridesArgument = None,
) -> None:
    """Say what this machine has and lacks for a run; exit code 1 when something required is missing."""
    from megatron_rl.doctor import State, examine, show

    findings = examine(config, overrides)
    show(findings, _wide_console())
    raise typer.Exit(1 if any(f.state is State.MISSING for f in findings) else 0)


def sets_table() -> Table:
    """Every ready-made set."""
    from megatron_rl.data.ready_made import READY_MADE

    table = Table("set", "reasoning-gym task", "", box=None, pad_edge=False)
    for name, ready in READY_MADE.items():
        table.add_row(name, ready.task, ready.about)
    return table


def main() -> None:
    """Entry point. An error that a user can repair is one line on stderr and exit code 2; a bug is a traceback."""
    try:
        app()
    except MegatronRLError as e:
        Console(stderr=True, soft_wrap=True, highlight=False).print(Text(f"error: {e}", style="red"))
        sys.exit(2)


def _write_data(config: Path, overrides: list[str] | None, model: Path | None, out: Path, rules: Rules) -> None:
    settings = configuration.load(config, overrides)
    _start_logging()
    from megatron_rl.rejection import write_data

    typer.echo(json.dumps(write_data(settings, model or settings.model.folder, out, rules)))


def _exit_with(run: Callable[[], int], addition: str = "") -> None:
    """The exit code of a run; 130 after Ctrl-C."""
    try:
        code = run()
    except KeyboardInterrupt as e:
        rich.print(f"interrupted; the same command goes on from the last checkpoint {addition}".rstrip(), file=sys.stderr)
        raise typer.Exit(130) from e
    raise typer.Exit(code)


def _start_logging() -> None:
    """To stderr; in a terminal through the console of the progress line, so that the two do not overwrite each other."""
    console = rich.get_console()
    handler: logging.Handler = logging.StreamHandler()
    pattern = "%(asctime)s %(levelname)s %(message)s"
    if console.is_terminal:
        handler, pattern = RichHandler(console=console, show_path=False, highlighter=None), "%(message)s"
    logging.basicConfig(level=logging.INFO, format=pattern, handlers=[handler])
    logging.getLogger("megatron").setLevel(logging.WARNING)  # it prints its whole configuration at INFO
    warnings.filterwarnings("ignore", module="megatron", category=UserWarning)  # "Apex is not installed": doctor says it


def _wide_console() -> Console:
    """For tables; a pipe or file has no width of its own."""
    console = Console()
    if not console.is_terminal:
        console.width = HELP_WIDTH
    return console
