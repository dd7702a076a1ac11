"""The command line: `alps-repro COMMAND`, one command for each thing the library does."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from alps_repro.data.prompts import MAX_LOST, said_lost
from alps_repro.errors import UserError

app = typer.Typer(
    name="alps-repro",
    help="Find the attention heads that carry a task, fine-tune only those, evaluate; every run leaves a record.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)

Device = Annotated[str | None, typer.Option(help="cpu, cuda, or auto, the default: the GPU where there is one.")]
Results = Annotated[Path, typer.Option(help="Folder for records, tables, figures and models.")]


def _recipe(assignments: list[str] | None) -> Any:
    import yaml

    from alps_repro.training.recipe import Recipe

    settings = {}
    for assignment in assignments or []:
        name, separator, value = assignment.partition("=")
        if not separator:
            raise UserError(f"'{assignment}' is not NAME=VALUE: write, for example, --set learning_rate=1e-4.")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"The value of '{assignment}' is not YAML: close every bracket and quote.") from None
        try:
            parsed = float(parsed) if isinstance(parsed, str) else parsed  # YAML 1.1 reads 1e-4 as text
        except ValueError:
            pass
        settings[name] = parsed
    return Recipe.check(**settings)


@app.command()
def localize(
    base: Annotated[str, typer.Argument(help="Base model: folder, hub id, or smollm2-135m.")],
    task: Annotated[str, typer.Argument(help="Task model: folder, hub id, or adapter folder.")],
    metric: str = "pad",
    head_matrix: str = "product",
    tau: float = 1.0,
    ground: str = "position",
    ratio: Annotated[float, typer.Option(help="Share of heads to print and to mark in the heat map.")] = 0.1,
    results: Results = Path("results/shell"),
) -> None:
    """Score every head by how much it changed, print the highest, write scores and heat map."""
    from rich.table import Table

    from alps_repro.analysis import figures
    from alps_repro.experiments.configs import LocalizeConfig
    from alps_repro.experiments.runs import localize_run
    from alps_repro.training.methods import check_ratio

    check_ratio(ratio)
    config = LocalizeConfig.check(
        base=base, task_model=task, metric=metric, head_matrix=head_matrix, tau=tau, ground=ground
    )
    scores, record = localize_run(config, results)
    top = scores.top(ratio)
    table = Table("layer", "head", scores.metric, title=f"{len(top)} of {scores.values.size} heads, highest first")
    for layer, head in sorted(top, key=lambda pair: -scores.values[pair]):
        table.add_row(str(layer), str(head), f"{scores.values[layer, head]:.4g}")
    console.print(table)
    if scores.compared_in:
        console.print(f"both models compared in {scores.compared_in}, the coarser of what they are stored in")
    paths = figures.save(scores.heatmap(ratio), results / "figures", f"heatmap-{config.name}")
    for path in [results / "scores" / record.result["scores"], *paths]:
        console.print(str(path), soft_wrap=True)


@app.command()
def finetune(
    base: Annotated[str, typer.Argument(help="Base model: folder, hub id, or smollm2-135m.")],
    dataset: Annotated[str, typer.Argument(help="Data set, such as family_relationships or mathinstruct.")],
    method: str = "alps",
    ratio: float = 0.1,
    scope: Annotated[str, typer.Option(help="all (as in the paper) or heads.")] = "all",
    quantization: Annotated[str, typer.Option(help="none, 8bit or 4bit.")] = "none",
    task_model: Annotated[
        str | None, typer.Option(help="For alps: the model to localize with; by default the full run is made.")
    ] = None,
    metric: str = "pad",
    head_matrix: str = "product",
    seed: int = 0,
    choice_seed: int = 0,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of the recipe; the paper's otherwise.")
    ] = None,
    device: Device = None,
    results: Results = Path("results/shell"),
) -> None:
    """Fine-tune a method's heads and save the model."""
    from alps_repro.errors import one_of
    from alps_repro.experiments.configs import FinetuneConfig, LocalizeConfig
    from alps_repro.experiments.runs import finetune_run
    from alps_repro.training.methods import METHODS

    one_of("method", method, METHODS)
    recipe, localization = _recipe([*(setting or []), *([f"device={device}"] if device else [])]), None
    shared = {"base": base, "dataset": dataset, "seed": seed, "recipe": recipe}
    if METHODS[method].uses_scores:
        full = None if task_model else FinetuneConfig.check(method="full", ratio=1.0, scope="all", **shared)
        localization = LocalizeConfig.check(
            base=base, task_model=task_model or full, metric=metric, head_matrix=head_matrix
        )
    config = FinetuneConfig.check(
        method=method,
        ratio=ratio if METHODS[method].uses_ratio else 1.0,
        scope=scope,
        quantization=quantization,
        choice_seed=choice_seed,
        localization=localization,
        **shared,
    )
    record, model = finetune_run(config, results)
    cost, losses = record.cost, record.result["losses"]
    console.print(
        f"trained {cost.trained_parameters:,} of {cost.total_parameters:,} parameters in {cost.seconds:.0f} s"
        + (f", loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else "")
    )
    if record.result.get("rows") and (lost := said_lost(record.result["rows"])):
        console.print(f"lost: {lost}", soft_wrap=True)
    console.print(str(model), soft_wrap=True)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder, hub id, adapter folder, or smollm2-135m.")],
    tasks: Annotated[list[str], typer.Argument(help="lm-eval tasks, such as gsm8k or family_relationships.")],
    quantization: Annotated[str, typer.Option(help="none, 8bit or 4bit.")] = "none",
    limit: Annotated[int | None, typer.Option(help="Questions per task.")] = None,
    batch_size: int = 16,
    template: Annotated[str, typer.Option(help="Around lm-eval's own text: none or alpaca.")] = "none",
    precision: Annotated[str, typer.Option(help="Multiply in: auto, float32, bfloat16 or float16.")] = "auto",
    device: Device = None,
    allow_code: Annotated[bool, typer.Option(help="Run code that the model wrote.")] = False,
    max_lost: Annotated[
        float, typer.Option(help="Share of a task's prompts that may be cut; 1: go on anyway.")
    ] = MAX_LOST,
    results: Results = Path("results/shell"),
) -> None:
    """Evaluate a model with lm-evaluation-harness."""
    from alps_repro.analysis.tables import lower_is_better
    from alps_repro.experiments.configs import EvaluateConfig
    from alps_repro.experiments.runs import evaluate_run

    config = EvaluateConfig.check(
        model=model,
        tasks=tuple(tasks),
        quantization=quantization,
        limit=limit,
        batch_size=batch_size,
        template=template,
        precision=precision,
        device=device or "auto",
        allow_code=allow_code,
        max_lost=max_lost,
    )
    record = evaluate_run(config, results)
    for task, score in record.result["scores"].items():
        shown = f"{score:.4f} nats per token" if lower_is_better(task) else f"{100 * score:.2f} %"
        console.print(f"{task}: {shown}")
    for task, number in record.result.get("truncated", {}).items():
        if number:
            total = record.result["questions"][task]
            console.print(f"{task}: {number} of {total} prompts were cut from the left to fit into the model")
    console.print(str(results / "samples" / record.result["samples"]), soft_wrap=True)


@app.command()
def table(
    of: Annotated[str, typer.Argument(help="A results folder, or a profile (its name, or its file).")] = "quick",
    tables: Annotated[list[str] | None, typer.Argument(help="Which of the profile's tables; all by default.")] = None,
) -> None:
    """Make tables from records: a folder's summary, or a profile's tables of the paper."""
    from alps_repro.analysis.tables import of_profile, write_paper_table, write_summary

    if tables is None and (Path(of) / "records").is_dir():
        made = [write_summary(of)[1]]
    else:
        from alps_repro.experiments.profile import Profile

        profile = Profile.load(of)
        made = [write_paper_table(profile, name) for name in tables or of_profile(profile)]
    for paths in made:
        console.print(paths[1].read_text(), soft_wrap=True, markup=False)
        for path in paths:
            console.print(str(path), soft_wrap=True)


@app.command()
def tidy(profile: Annotated[str, typer.Argument(help="A profile's name, or its file.")]) -> None:
    """Remove the tuned models that no run of a profile needs any more; records stay."""
    from alps_repro.experiments.profile import Profile
    from alps_repro.experiments.workflow import remove_models

    for path in remove_models(Profile.load(profile)):
        console.print(f"removed {path}", soft_wrap=True)


@app.command()
def figure(
    profile: Annotated[str, typer.Argument(help="A profile's name, or its file.")] = "quick",
    figures: Annotated[list[str] | None, typer.Argument(help="Which of its figures; all by default.")] = None,
) -> None:
    """Make a profile's figures of the paper from its records."""
    from alps_repro.analysis.figures import of_profile, write_figure
    from alps_repro.experiments.profile import Profile

    settings = Profile.load(profile)
    for name in figures or of_profile(settings):
        for path in write_figure(settings, name):
            console.print(str(path), soft_wrap=True)


@app.command()
def reproduce(profile: Annotated[str, typer.Argument(help="A profile's name, or a path to one.")] = "quick") -> None:
    """Make all of a profile's runs, tables, figures and notebooks, and print the results."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from alps_repro.experiments.workflow import reproduce as execute

    start = time.perf_counter()
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as steps:

        def say(line: str) -> None:
            if not console.is_terminal:
                console.print(line, markup=False, soft_wrap=True)
                return
            for task in steps.tasks:
                steps.update(task.id, total=1, completed=1)
            if line.endswith(" ..."):
                steps.add_task(line, total=None)

        results = execute(profile, say)
    console.print()
    console.print((results / "tables" / "summary.md").read_text(), soft_wrap=True, markup=False)
    console.print(f"{(time.perf_counter() - start) / 60:.1f} minutes. Look at:")
    for what in ("claims.md", "tables/summary.md", "figures", "notebooks/06_report.ipynb", "records"):
        console.print(f"  {results / what}", soft_wrap=True)


@app.command()
def report(profile: Annotated[str, typer.Argument(help="A profile's name, or its file.")] = "quick") -> None:
    """Make a profile's report: static pages in which every number leads to its runs."""
    from alps_repro.experiments.profile import Profile
    from alps_repro.report.build import write_report

    console.print(str(write_report(Profile.load(profile))), soft_wrap=True)


@app.command()
def cite(
    profile: Annotated[str, typer.Argument(help="A profile's name, or its file.")],
    table: Annotated[str, typer.Argument(help="One of its tables, such as table1.")],
    row: Annotated[str, typer.Argument(help="A row of it, such as alps.")],
    column: Annotated[str, typer.Argument(help="A column of it, such as avg.")],
    model: Annotated[str | None, typer.Option(help="Where the profile has several.")] = None,
) -> None:
    """Print a number of a table with its interval, what was run for it, and BibTeX."""
    from alps_repro.analysis.cite import cite as cited
    from alps_repro.experiments.profile import Profile

    console.print(str(cited(Profile.load(profile), table, row, column, model)), soft_wrap=True, markup=False)


@app.command()
def verify(
    record: Annotated[Path, typer.Argument(help="A record, such as results/quick/records/evaluate-....json.")],
    results: Annotated[
        Path | None, typer.Option(help="Folder to run in, instead of a temporary one; finished runs in it are reused.")
    ] = None,
) -> None:
    """Run a record's configuration again and compare the numbers with the record's."""
    from alps_repro.analysis.cite import what_was_run
    from alps_repro.analysis.verify import verify as verified

    found = verified(record, results)
    say = [what_was_run([found.record]), "", *found.lines()]
    console.print("\n".join(say), soft_wrap=True, markup=False)
    if not found.holds:
        raise typer.Exit(1)


@app.command()
def plan(
    profile: Annotated[str, typer.Argument(help="A profile's name, or its file.")],
    card: Annotated[float, typer.Option(help="Memory of a GPU in GB, to compare the totals with.")] = 80.0,
) -> None:
    """Count a profile's runs and estimate what each kind of fine-tuning needs, before anything is run."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from alps_repro.experiments.plan import assumptions
    from alps_repro.experiments.plan import plan as planned
    from alps_repro.experiments.profile import Profile

    settings = Profile.load(profile)
    kinds = planned(settings, card)
    counts = ", ".join(f"{number} {name}" for name, number in kinds.attrs.items())
    if settings.about:
        console.print(settings.about, soft_wrap=True)
    console.print(f"{counts}; {kinds['models'].sum():,.1f} GB of saved models", soft_wrap=True)
    wide = Console(highlight=False, width=max(console.width, 132))  # rich would cut numbers where lines are shorter
    names = {"weights": "weights", "copies": "copies", "gradients": "grads", "optimizer": "AdamW"}
    names |= {"activations": "activ.", "logits": "logits", "total": "total"}
    columns = ("runs", "trained, M", *names.values(), "fits", "tokens, M", "models", "beside")
    for model, rows in kinds.groupby("model", sort=False):
        table = Table("method, scope", title=f"{model}, GB", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in columns:
            table.add_column(column, justify="right")
        for row in rows.to_dict("records"):
            table.add_row(*_plan_row(row, list(names)))
        wide.print(table)
    for line in assumptions(settings):
        console.print(line, soft_wrap=True)


def _plan_row(row: Mapping[Any, Any], sizes: list[str]) -> list[str]:
    """A row of the plan's table; `sizes`: the names of its columns in GB."""
    share = "" if math.isnan(row["ratio"]) else f" {100 * row['ratio']:g} %"  # NaN: the ratio changes nothing
    base = "" if row["quantization"] == "none" else f", {row['quantization']}"
    weights = (row["trained_least"], row["trained_most"])
    trained = dict.fromkeys(f"{n / 1e6:,.1f}" if not 0 < n < 5e4 else f"{n / 1e6:.3f}" for n in weights)
    cells = [f"{row['method']}{share}, {row['scope']}{base}", str(row["runs"]), "-".join(trained)]
    cells += [f"{row[name]:.1f}" for name in sizes] + ["yes" if row["fits"] else "no"]
    return [*cells, f"{row['tokens'] / 1e6:,.2f}", f"{row['models']:,.1f}", f"{row['checkpoints']:.1f}"]


@app.command()
def doctor() -> None:
    """Check that everything a run needs is installed, and say what to do where it is not."""
    from alps_repro.doctor import examine

    findings = examine()
    for finding in findings:
        console.print(f"{'ok     ' if finding.good else 'missing'}  {finding.text}", markup=False, soft_wrap=True)
    if not all(finding.good for finding in findings if finding.needed):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: user errors become one line on standard error and exit status 2, and warnings one line each."""
    show = warnings.showwarning

    def in_one_line(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if category is UserWarning:
            print(f"alps-repro: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            show(message, category, *where, **more)

    warnings.showwarning = in_one_line
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"alps-repro: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
