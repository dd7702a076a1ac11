"""`results/benchmarks/table.md`, made from the benchmarks' JSON files."""

from __future__ import annotations

import json

import pandas as pd
from measured import RESULTS, median

from alps_repro.records import write_whole


def spread(values: list[float], unit: str = " s", digits: int = 2) -> str:
    """Median, and the range around it."""
    return f"{median(values):.{digits}f}{unit} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def localization(found: dict) -> list[tuple[str, str, str, str, str]]:
    small, large = found["smollm2"], found["llama_3_1_8b"]
    released = small["seconds"]["released_way"]
    rows = []
    for kind in ("concat", "product"):
        ours = small["seconds"][kind]
        ratio = f"{median(released) / median(ours):.0f} times faster"
        rows.append((f"localize SmolLM2, `{kind}`", spread(ours), "released way: " + spread(released), ratio, "50"))
    for kind in ("concat", "product"):
        own, whole = large[kind], large["released_way_32_layers"]
        ratio = f"{whole / own['seconds_32_layers']:.0f} times faster"
        text = f"{own['seconds_32_layers']:.1f} s (from 4 layers)"
        rows.append((f"localize Llama-3.1-8B's geometry, `{kind}`", text, f"released way: {whole:.0f} s", ratio, "50"))
        passes = median(own["single_pass_per_layer"])
        text = f"{own['times_a_single_pass']:.2f} of it"
        rows.append((f"the same, `{kind}`, a layer", "", f"one exp and cumsum: {passes:.2f} s", text, "at most 2"))
        peak = max(own["peak_bytes_above_imports"].values())
        rows.append((f"the same, `{kind}`, peak memory", f"{peak / 1e6:.0f} MB above imports", "", "", "1 GB"))
    return rows


def training(found: dict) -> list[tuple[str, str, str, str, str]]:
    rounds = found["rounds"]
    seconds = {name: [s for one in each for s in one["seconds"]] for name, each in rounds.items()}
    rows = []
    reach = {"full_plain": "0.50", "full_answer_only": "0.70", "masking_hooks": "0.95", "lora_128": "0.95"}
    against = [("alps_heads", other, bound) for other, bound in reach.items()] + [("alps_all", "full_plain", "0.72")]
    for own, other, bound in against:
        ratio = median([median(a["seconds"]) / median(b["seconds"]) for a, b in zip(rounds[own], rounds[other])])
        counted = rounds[own][0]["floor"]["operations"] / rounds[other][0]["floor"]["operations"]
        rows.append(
            (
                f"step, {found['variants'][own]}",
                spread(seconds[own]),
                f"{found['variants'][other]}: {spread(seconds[other])}",
                f"{ratio:.2f} (operations counted: {counted:.2f})",
                bound,
            )
        )
    own, full = rounds["alps_heads"][0], rounds["full_plain"][0]
    text = f"{own['gradient_bytes'] / 1e6:.1f} and {own['optimizer_bytes'] / 1e6:.1f} MB"
    other = f"{full['gradient_bytes'] / 1e6:.0f} and {full['optimizer_bytes'] / 1e6:.0f} MB"
    exact = own["gradient_bytes"] == 4 * own["trained_parameters"]
    rows.append(("gradients and optimizer, scope heads", text, other, "rows alone" if exact else "more", "rows alone"))
    peaks = [median([one["peak_bytes"] for one in rounds[name]]) / 1e9 for name in ("alps_heads", "full_plain")]
    ratio = f"{peaks[0] / peaks[1]:.2f}"
    rows.append(("peak of the process, scope heads", f"{peaks[0]:.2f} GB", f"{peaks[1]:.2f} GB", ratio, "0.50"))
    return rows


def harness(found: dict) -> list[tuple[str, str, str, str, str]]:
    return [
        ("`import alps_repro`", spread(found["import_seconds"]), "", "", "0.5 s"),
        ("a fine-tuning of one example, whole process", spread(found["one_example_seconds"], digits=1), "", "", "10 s"),
    ]


def main() -> None:
    rows = []
    for name, make in (("localization", localization), ("training", training), ("harness", harness)):
        rows += make(json.loads((RESULTS / f"{name}.json").read_text()))
    table = pd.DataFrame(rows, columns=["what", "this package", "against", "ratio", "reach"])
    write_whole(RESULTS / "table.md", table.to_markdown(index=False, disable_numparse=True) + "\n")
    print((RESULTS / "table.md").read_text())


if __name__ == "__main__":
    main()
