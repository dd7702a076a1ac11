"""The library's words in a shell."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from alps_repro.errors import UserError

app = typer.Typer(
    name="alps-repro",
    help="Find the attention heads that carry a task, fine-tune only those, evaluate; every run leaves a record.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)

Results = Annotated[Path, typer.Option(help="Folder for records, tables, figures and models.")]


def _recipe(assignments: list[str] | None) -> Any:
    import yaml

    from alps_repro.recipe import Recipe

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
    """Score every head by how far it moved, print the highest, write scores and heat map."""
    from rich.table import Table

    from alps_repro import figures
    from alps_repro.recipe import LocalizeConfig, check_ratio
    from alps_repro.runs import localize_run

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
    results: Results = Path("results/shell"),
) -> None:
    """Fine-tune a method's heads and save the model."""
    from alps_repro.errors import one_of
    from alps_repro.methods import METHODS
    from alps_repro.recipe import FinetuneConfig, LocalizeConfig
    from alps_repro.runs import finetune_run

    one_of("method", method, METHODS)
    recipe, localization = _recipe(setting), None
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
    console.print(str(model), soft_wrap=True)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder, hub id, adapter folder, or smollm2-135m.")],
    tasks: Annotated[list[str], typer.Argument(help="lm-eval tasks, such as gsm8k or family_relationships.")],
    quantization: Annotated[str, typer.Option(help="none, 8bit or 4bit.")] = "none",
    limit: Annotated[int | None, typer.Option(help="Questions per task.")] = None,
    batch_size: int = 16,
    template: Annotated[str, typer.Option(help="Around lm-eval's own text: none or alpaca.")] = "none",
    allow_code: Annotated[bool, typer.Option(help="Run code that the model wrote.")] = False,
    results: Results = Path("results/shell"),
) -> None:
    """Evaluate a model with lm-evaluation-harness."""
    from alps_repro.recipe import EvaluateConfig
    from alps_repro.runs import evaluate_run

    config = EvaluateConfig.check(
        model=model,
        tasks=tuple(tasks),
        quantization=quantization,
        limit=limit,
        batch_size=batch_size,
        template=template,
        allow_code=allow_code,
    )
    record = evaluate_run(config, results)
    for task, score in record.result["scores"].items():
        console.print(f"{task}: {100 * score:.2f} %")
    console.print(str(results / "samples" / record.result["samples"]), soft_wrap=True)


@app.command()
def table(results: Annotated[Path, typer.Argument(help="A results folder.")] = Path("results/quick")) -> None:
    """Make the summary table of a results folder from its records."""
    from alps_repro.tables import write_summary

    _, paths = write_summary(results)
    console.print(paths[1].read_text(), soft_wrap=True, markup=False)
    for path in paths:
        console.print(str(path), soft_wrap=True)


@app.command()
def reproduce(profile: Annotated[str, typer.Argument(help="A profile's name, or a path to one.")] = "quick") -> None:
    """Execute a profile's notebooks and print what came out."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from alps_repro.reproduce import reproduce as execute

    start = time.perf_counter()
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as steps:

        def say(line: str) -> None:
            for task in steps.tasks:
                steps.update(task.id, total=1, completed=1)
            if console.is_terminal:
                steps.add_task(line, total=None)
            else:
                console.print(line, markup=False, soft_wrap=True)

        results = execute(profile, say)
        say("report made")
    console.print()
    console.print((results / "tables" / "summary.md").read_text(), soft_wrap=True, markup=False)
    console.print(f"{(time.perf_counter() - start) / 60:.1f} minutes. Look at:")
    for what in ("tables/summary.md", "figures/heatmap.png", "notebooks/06_report.ipynb", "records"):
        console.print(f"  {results / what}", soft_wrap=True)


@app.command()
def doctor() -> None:
    """Check what a run needs and say what to do about what is missing."""
    from alps_repro.doctor import examine

    findings = examine()
    for finding in findings:
        console.print(f"{'ok     ' if finding.good else 'missing'}  {finding.text}", markup=False, soft_wrap=True)
    if not all(finding.good for finding in findings if finding.needed):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: user errors become one line on standard error and exit status 2."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"alps-repro: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
