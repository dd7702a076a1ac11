"""The tables in `results/benchmarks`, made from the benchmarks' JSON files."""

from __future__ import annotations

import json
from collections.abc import Callable

import pandas as pd
from measured import RESULTS, median
from training import VARIANTS, variant_of

from alps_repro.experiments.records import load_records, write_whole


def spread(values: list[float], unit: str = " s", digits: int = 2) -> str:
    """Median, and the range around it."""
    return f"{median(values):.{digits}f}{unit} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def localization(found: dict) -> list[tuple[str, str, str, str]]:
    small, large = found["smollm2"], found["llama_3_1_8b"]
    released = small["seconds"]["released_way"]
    rows = []
    for kind in ("concat", "product"):
        ours = small["seconds"][kind]
        ratio = f"{median(released) / median(ours):.0f} times faster"
        rows.append(
            (f"localize SmolLM2, `{kind}`", spread(ours), "authors' implementation: " + spread(released), ratio)
        )
        read, passes = small["read"], small["single_pass"][kind]
        floor = median([one["seconds"] for one in read]) + median(passes)
        text = f"reading {read[0]['bytes'] / 1e6:.0f} MB, one exp and cumsum, one thread: {floor:.2f} s"
        rows.append((f"the same, `{kind}`, against its lower bound", "", text, f"{median(ours) / floor:.2f} of it"))
    for kind in ("concat", "product"):
        own, whole = large[kind], large["released_way_32_layers"]
        ratio = f"{whole / own['seconds_32_layers']:.0f} times faster"
        text = f"{own['seconds_32_layers']:.1f} s (from 4 layers)"
        other = f"authors' implementation: {whole:.0f} s"
        rows.append((f"localize Llama-3.1-8B's geometry, `{kind}`", text, other, ratio))
        passes = median(own["single_pass_per_layer"])
        text = f"{own['times_a_single_pass']:.2f} of it"
        rows.append((f"the same, `{kind}`, a layer", "", f"one exp and cumsum: {passes:.2f} s", text))
        peak = max(own["peak_bytes_above_imports"].values())
        rows.append((f"the same, `{kind}`, peak memory", f"{peak / 1e6:.0f} MB above imports", "", ""))
    return rows


def training(found: dict) -> list[tuple[str, str, str, str]]:
    rounds = found["rounds"]
    seconds = {name: [s for one in each for s in one["seconds"]] for name, each in rounds.items()}
    rows = []
    against = [("alps_heads", other) for other in ("full_plain", "full_answer_only", "masking_hooks", "lora_128")]
    for own, other in [*against, ("alps_all", "full_plain")]:
        ratios = [median(a["seconds"]) / median(b["seconds"]) for a, b in zip(rounds[own], rounds[other])]
        counted = rounds[own][0]["floor"]["operations"] / rounds[other][0]["floor"]["operations"]
        rows.append(
            (
                f"step, {VARIANTS[own]}",
                spread(seconds[own]),
                f"{VARIANTS[other]}: {spread(seconds[other])}",
                f"{spread(ratios, '')}; operations counted: {counted:.2f}",
            )
        )
    own, full = rounds["alps_heads"][0], rounds["full_plain"][0]
    text = f"{own['gradient_bytes'] / 1e6:.1f} and {own['optimizer_bytes'] / 1e6:.1f} MB"
    other = f"{full['gradient_bytes'] / 1e6:.0f} and {full['optimizer_bytes'] / 1e6:.0f} MB"
    exact = own["gradient_bytes"] == 4 * own["trained_parameters"]
    rows.append(("gradients and optimizer, scope heads", text, other, "rows alone" if exact else "more"))
    peaks = {
        name: median([one["peak_bytes"] - one["interpreter_bytes"] for one in each]) for name, each in rounds.items()
    }
    for own in ("alps_heads", "alps_all"):
        counted = rounds[own][0]["floor"]["bytes"] / full["floor"]["bytes"]
        ratio = f"{peaks[own] / peaks['full_plain']:.2f}; bytes counted: {counted:.2f}"
        other = f"{peaks['full_plain'] / 1e9:.2f} GB"
        rows.append((f"peak above the interpreter, {VARIANTS[own]}", f"{peaks[own] / 1e9:.2f} GB", other, ratio))
    for name, each in rounds.items():
        floor = each[0]["floor"]
        speed = f"{floor['operations'] / median(seconds[name]) / 1e9:.0f} · 10⁹ counted operations a second"
        text = f"{floor['operations'] / 1e9:.0f} · 10⁹ operations, {floor['bytes'] / 1e9:.2f} GB counted"
        rows.append(
            (
                f"lower bound: {VARIANTS[name]}",
                text,
                "",
                f"{speed}; {peaks[name] / floor['bytes']:.2f} of the counted bytes",
            )
        )
    return rows


def harness(found: dict) -> list[tuple[str, str, str, str]]:
    quick: dict[str, float] = {}
    for record in load_records(RESULTS.parent / "reference" / "quick" / "records"):
        quick[record.kind] = quick.get(record.kind, 0.0) + record.cost.seconds
    parts = ", ".join(f"{kind} {seconds:.0f} s" for kind, seconds in quick.items())
    return [
        ("`import alps_repro`", spread(found["import_seconds"]), "", ""),
        ("a fine-tuning of one example, whole process", spread(found["one_example_seconds"], digits=1), "", ""),
        ("profile `quick`, its runs", f"{sum(quick.values()) / 60:.1f} min", parts, ""),
    ]


def gpu(found: dict) -> pd.DataFrame:
    """Steps of the paper's models on a GPU, as a share of plain Trainer's full fine-tuning where a card holds that."""
    rows = []
    for model, variants in found["models"].items():
        measured = {name: rounds for name, rounds in variants.items() if rounds}
        seconds = {name: [s for one in rounds for s in one["seconds"]] for name, rounds in measured.items()}
        full = median(seconds["full_plain"]) if "full_plain" in seconds else None
        for name, rounds in measured.items():
            peak, planned = median([one["peak_bytes"] for one in rounds]), rounds[0]["planned_bytes"]
            rows.append(
                {
                    "model": model.split("/")[-1],
                    "what is trained": {**found["variants"], **VARIANTS}[name],
                    "trained parameters": f"{rounds[0]['trained_parameters']:,}",
                    "a step, s": spread(seconds[name], "", 3),
                    "of full": f"{median(seconds[name]) / full:.2f}" if full else "–",
                    "memory, GB": f"{peak / 1e9:.1f}",
                    "planned, GB": f"{planned / 1e9:.1f}" if planned else "–",
                }
            )
    return pd.DataFrame(rows)


def checks(found: dict) -> pd.DataFrame:
    """What `gpu_checks.py` measured on a card, and whether each check's criterion was met."""
    by_name = {one["check"]: one for one in found["checks"] if one["check"] != "model"}
    met = {True: "yes", False: "no", None: "–"}
    rows = [
        {"check": name, "measured": MEASURED[name](one), "criterion": one["criterion"], "met": met[one["ok"]]}
        for name, one in by_name.items()
    ]
    return pd.DataFrame(rows)


#: {check: what of its values a reader needs, in words}.
MEASURED: dict[str, Callable[[dict], str]] = {
    "versions": lambda one: (
        f"{one['gpu']}, driver {one['nvidia_smi']['driver_version']}, torch {one['torch_build']}, bitsandbytes "
        f"{one['bitsandbytes']}; 4-bit product off by {one['four_bit_relative_error']:.1e}"
    ),
    "rates": lambda one: (
        ", ".join(f"{name} {one[f'{name}_tflops']:.0f} TFLOP/s" for name in ("bfloat16", "float16", "float32"))
        + f"; copy {one['copy_tb_a_second']:.1f} TB/s"
    ),
    "frozen": lambda one: "; ".join(
        f"{name}: {one[name]['frozen_rows_changed']} frozen and {one[name]['selected_rows_changed']} of "
        f"{one[name]['selected_rows']} selected rows changed"
        for name in ("float32", "bfloat16", "float16")
    ),
    "precision": lambda one: "; ".join(
        f"{name}: {one[name]['skipped']} steps skipped, loss {one[name]['losses'][0]:.2f} to "
        f"{one[name]['losses'][-1]:.2f}"
        for name in ("bfloat16", "float16")
    ),
    "quantized": lambda one: "; ".join(
        f"{name}: loaded off by {one[name]['loaded_difference']:g}, merged by {one[name]['merged_difference']:.2g} of "
        f"logits up to {one[name]['largest_logit']:.1f}, peak {one[name]['peak_gb']:.2f} GB "
        f"({one[name]['peak_gb_checkpointing']:.2f} with checkpointing)"
        for name in ("8bit", "4bit")
    ),
    "large": lambda one: (
        f"peak {one['peak_gb']:.1f} GB, planned {one['planned_gb']:.1f}; {one['seconds_a_step']:.3f} s a step, "
        f"{one['tokens_a_second']:,} tokens a second"
    ),
    "heads_alone": lambda one: "; ".join(
        f"{words}: {one[name]['seconds_a_step']:.3f} and {one[f'{name} again']['seconds_a_step']:.3f} s a step, "
        f"{one[name]['peak_gb']:.1f} GB"
        for name, words in (("as stored", "in bfloat16"), ("rounded", "in float32"))
    ),
    "loss_memory": lambda one: "; ".join(
        f"{size.replace('x', ' · ')} tokens: {one[size]['own']['peak_gb']:.1f} GB against "
        f"{one[size]['plain']['peak_gb']:.1f}, {one[size]['own']['seconds_a_step']:.3f} s against "
        f"{one[size]['plain']['seconds_a_step']:.3f}"
        for size in ("8x512", "2x2048")
    ),
    "resume": lambda one: (
        f"largest difference of a weight: two runs {one['two_runs_differ_by']:g}, resumed {one['resumed_differs_by']:g}"
    ),
    "evaluation": lambda one: "; ".join(
        f"{name}: {one[name]['seconds']:.1f} s, {one[name]['loglikelihood']:.3f} nats, {one[name]['grades_changed']} "
        "grades changed"
        for name in one
        if ", batch" in name
    ),
    "generation": lambda one: "; ".join(
        f"{name}: {one[name]['rate']:,} tokens a second" for name in one if "batch" in name
    ),
    "agreement": lambda one: "; ".join(
        f"{name}: rank correlation {one[name]['rank_correlation']:.6f}, off by "
        f"{one[name]['largest_difference']:.1e} of {one[name]['largest_value']:.2g}"
        for name in ("importance", "hifi")
    ),
    "release": lambda one: (
        f"{one['left_gb']:.2f} GB stay allocated; peaks {one['peak_gb_trained']:.2f} and "
        f"{one['peak_gb_evaluated']:.2f} GB"
    ),
    "tests": lambda one: f"{one['passed']} passed, {len(one['failed'])} failed, {len(one['skipped'])} skipped",
}


def engine(found: dict) -> pd.DataFrame:
    """Steps, peaks and an evaluation on a processor, beside those of an earlier version."""
    rows = []
    for name, rounds in found["cases"].items():
        seconds = [s for one in rounds for s in one["seconds"]]
        peak = max(one["peak_bytes"] for one in rounds)
        rows.append({"what": name, "seconds": spread(seconds, ""), "peak, GB": f"{peak / 1e9:.2f}"})
    return pd.DataFrame(rows)


def variants() -> pd.DataFrame:
    """Variants of a training step on a processor, as a share of the first in the same round."""
    rows: dict[str, dict[str, str]] = {}
    for scope in ("heads", "all"):
        found = json.loads((RESULTS / f"variants-{scope}.json").read_text())["variants"]
        first = next(iter(found.values()))["seconds"]
        for name, own in found.items():
            ratios = [a / b for a, b in zip(own["seconds"], first)]
            rows.setdefault(name, {"variant": name})[f"scope {scope}, s"] = spread(own["seconds"], "")
            rows[name][f"scope {scope}, ratio"] = f"{median(ratios):.2f}"
            rows[name][f"scope {scope}, first step, s"] = f"{own['first']:.0f}"
    return pd.DataFrame(rows.values())


#: The model that methods are compared on.
BENCH = "meta-llama/Llama-3.2-1B"


def methods(found: dict) -> pd.DataFrame:
    """Every method in scope heads: what it trains, which heads, of what base; trained parameters, and a step's time."""
    from alps_repro.experiments.configs import FinetuneConfig, LocalizeConfig
    from alps_repro.experiments.plan import trained_parameters
    from alps_repro.training.adapters import ADAPTERS
    from alps_repro.training.methods import METHODS

    rows = []
    for name, method in METHODS.items():
        adapter = ADAPTERS[method.adapter]
        asked = {"localization": LocalizeConfig.check(base=BENCH, task_model=BENCH)} if method.uses_scores else {}
        config = FinetuneConfig.check(base=BENCH, dataset="alpaca", method=name, scope="heads", **asked)
        least, most = (0, 0) if name == "no_attn" else trained_parameters(config)
        variant = variant_of(name)
        rounds = found["models"][BENCH][variant] if variant else []
        rows.append(
            {
                "method": f"`{name}`",
                "trains": method.about,
                "base in": ", ".join(kind.replace("bit", " bit") for kind in adapter.quantized) or "full precision",
                "parameters": f"{most:,}" if least == most else f"{least:,} to {most:,}",
                "a step, s": f"{median([s for one in rounds for s in one['seconds']]):.3f}" if rounds else "–",
                "from": method.source,
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    found = json.loads((RESULTS / "gpu.json").read_text())
    made = {"gpu": gpu(found), "methods": methods(found), "variants": variants()}
    made |= {
        name: make(json.loads((RESULTS / f"{name}.json").read_text()))
        for name, make in (("gpu-checks", checks), ("engine", engine))
    }
    for name, table in made.items():
        write_whole(RESULTS / f"{name}.md", table.to_markdown(index=False, disable_numparse=True) + "\n")
    rows = []
    for name, make in (("localization", localization), ("training", training), ("harness", harness)):
        rows += make(json.loads((RESULTS / f"{name}.json").read_text()))
    table = pd.DataFrame(rows, columns=["what", "this package", "against", "ratio"])
    write_whole(RESULTS / "table.md", table.to_markdown(index=False, disable_numparse=True) + "\n")
    print((RESULTS / "table.md").read_text())


if __name__ == "__main__":
    main()
