"""A training step of SmolLM2, by what a user would pick instead: seconds, bytes of gradients, optimizer, process.

`python benchmarks/training.py` runs every variant in processes of their own, in turn, several times, and writes
`results/benchmarks/training.json`. All variants take the same 16 questions a step, `family_relationships`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measured import median, save

STEPS = 5  # per process; the first warms up and is left out
BATCH = 16

VARIANTS = {
    "alps_heads": "this package, scope heads, 10 % of heads",
    "alps_all": "this package, scope all, 10 % of heads",
    "full_heads": "this package, scope heads, all heads",
    "full_answer_only": "full fine-tuning with this package's loss",
    "full_plain": "full fine-tuning as plain Trainer runs it",
    "masking_hooks": "all of q, k, v trainable, gradients masked by hooks, this package's loss",
    "lora_128": "LoRA of rank 128 on q, k, v, this package's loss",
}

VARIANTS |= {
    "lora_matched": "LoRA on q, k, v, parameter-matched to 10 % of heads, this package's loss",
    "dora_matched": "DoRA on q, k, v of the same rank, this package's loss",
    "shira_matched": "SHiRA on q, k, v, parameter-matched, this package's loss",
    "offsets": "an offset for each of 10 % of heads (LoFiT), this package's loss",
    "jola": "JoLA, all heads, this package's loss",
}

#: The method and scope of the variants that are those of a method; which heads are selected does not change their cost.
METHOD_OF = {
    "alps_heads": ("random", "heads"),
    "alps_all": ("random", "all"),
    "full_heads": ("full", "heads"),
    "full_answer_only": ("full", "all"),
    "lora_128": ("lora", "heads"),
    "lora_matched": ("lora_matched", "heads"),
    "dora_matched": ("dora_matched", "heads"),
    "shira_matched": ("shira_matched", "heads"),
    "offsets": ("random_offset", "heads"),
    "jola": ("jola", "heads"),
}


def variant_of(method: str) -> str | None:
    """The variant that measures a method in scope heads: its own, or that of other heads trained alike."""
    from alps_repro.training.methods import METHODS

    variants = {name: variant for variant, (name, scope) in METHOD_OF.items() if scope == "heads"}
    alike = (variant for name, variant in variants.items() if METHODS[name].adapter == METHODS[method].adapter)
    return None if method == "no_attn" else variants.get(method) or next(alike, None)


def prepare(variant: str, model: torch.nn.Module, tokenizer: object, heads: object, rows: object) -> tuple:
    """What a variant trains of a model, the examples as it takes them, and what makes a batch of them.

    heads: the selection of 10 %. rows: as `training.tokenize` makes them.
    """
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq

    from alps_repro import HeadSelection
    from alps_repro.data.prompts import Collate
    from alps_repro.training.finetune import trainable
    from alps_repro.tuner.rows import AlpsModel

    layout, collate = heads.layout, Collate(tokenizer.pad_token_id, "response")
    if variant in ("alps_heads", "alps_all"):
        tuned = trainable(model, heads, variant.removeprefix("alps_"))
        return tuned.model if isinstance(tuned, AlpsModel) else tuned, rows, collate
    if variant == "full_heads":
        return trainable(model, HeadSelection.all(layout), "heads"), rows, collate
    if variant == "full_plain":
        tokenizer.padding_side = "right"
        plain = [(row["input_ids"], row["prompt_length"]) for row in rows]
        rows = Dataset.from_list([{"input_ids": ids, "labels": [-100] * n + ids[n:]} for ids, n in plain])
        return model, rows, DataCollatorForSeq2Seq(tokenizer)
    if variant == "masking_hooks":
        model.requires_grad_(False)
        for name, own in layout.selected_rows(heads).items():
            weight = model.model.get_submodule(name).weight
            mask = torch.zeros(len(weight), 1, device=weight.device)
            mask[own] = 1
            weight.requires_grad_(True).register_hook(lambda grad, mask=mask: grad * mask)
    if variant == "lora_128":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=128, target_modules=["q_proj", "k_proj", "v_proj"])
        return get_peft_model(model, lora), rows, collate
    if variant in METHOD_OF and METHOD_OF[variant][1] == "heads":
        from alps_repro.training.adapters import lora_weights
        from alps_repro.training.methods import METHODS, row_weights

        rank = round(row_weights(heads) / lora_weights(layout))
        heads = HeadSelection.all(layout) if variant == "jola" else heads
        return (
            trainable(model, heads, "heads", adapter=METHODS[METHOD_OF[variant][0]].adapter, rank=rank),
            rows,
            collate,
        )
    return model, rows, collate


def train(tuned: torch.nn.Module, rows: object, collate: object, **arguments: object) -> dict:
    """Train for as many steps as the rows are enough for; seconds of all but the first, and bytes.

    arguments: of `TrainingArguments`, beside those that all have in common.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    taken: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs) -> None:
            self.start = now()

        def on_step_end(self, *args, **kwargs) -> None:
            taken.append(now() - self.start)

        def on_pre_optimizer_step(self, *args, model=None, **kwargs) -> None:
            self.gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=tuned,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                learning_rate=1e-4,
                weight_decay=0.1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                **arguments,
            ),
            train_dataset=rows,
            data_collator=collate,
            callbacks=[clock],
        )
        trainer.train()
    state = trainer.optimizer.optimizer.state.values()
    return {
        "seconds": taken[1:],
        "trained_parameters": sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        "gradient_bytes": clock.gradients,
        "optimizer_bytes": sum(t.nbytes for s in state for t in s.values() if torch.is_tensor(t)),
    }


def run(variant: str) -> dict:
    """One process's measurement."""
    from transformers import set_seed

    from alps_repro import HeadLayout, HeadSelection, load_model
    from alps_repro.data.datasets import training_examples
    from alps_repro.data.prompts import tokenize

    set_seed(0)
    model, tokenizer = load_model("smollm2-135m")
    model.config.use_cache = False
    heads = HeadSelection.random(HeadLayout.of(model), 0.1, seed=0)
    rows = tokenize(training_examples("family_relationships", size=STEPS * BATCH), tokenizer, 2048)
    counted = floor(variant, model.config, heads, rows)
    tuned, rows, collate = prepare(variant, model, tokenizer, heads, rows)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    status = Path("/proc/self/status").read_text()
    before = int(status.split("VmRSS:")[1].split()[0]) * 1024 - sum(p.nbytes for p in model.parameters())
    found = train(tuned, rows, collate, per_device_train_batch_size=BATCH, use_cpu=True)
    status = Path("/proc/self/status").read_text()
    return {
        **found,
        "interpreter_bytes": before,  # what is held without the weights: Python, its libraries, the data
        "peak_bytes": int(status.split("VmHWM:")[1].split()[0]) * 1024,
        "floor": counted,
    }


def floor(variant: str, config: object, heads: object, rows: object) -> dict[str, float]:
    """Operations and bytes of a step, counted: what no implementation of the variant can do without.

    operations: per token a weight costs 2 operations forward, 2 for the gradient of its input, and 2 for its own. A
    frozen weight has none of its own; below the lowest selected layer there is no backward pass. Attention itself (q·k
    and p·v) is counted like a product of activations, whose backward pass costs twice the forward one. The output layer
    counts for the positions whose logits are taken.

    bytes: weights, gradients, AdamW's two moments, and what the backward pass has to find again, all in float32: in
    every layer from the lowest trained one up, per token, the inputs of both norms, q, k, v and attention's output,
    gate and up of the MLP; where all of a layer is trained, the inputs of its projections too; the logits, and their
    gradient.
    """
    layers, hidden, wide = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    lengths = [len(row["input_ids"]) for row in rows]
    answers = lengths if variant == "full_plain" else [len(r["input_ids"]) - r["prompt_length"] + 1 for r in rows]
    tokens, answer_tokens = sum(lengths) / len(lengths) * BATCH, sum(answers) / len(answers) * BATCH
    attended, shared = config.head_dim * config.num_attention_heads, config.head_dim * config.num_key_value_heads
    qkv = hidden * (attended + 2 * shared)
    linear = qkv + hidden * attended + 3 * hidden * wide
    total = layers * (linear + 2 * hidden) + hidden + config.vocab_size * hidden
    scores = 2 * sum(n * n for n in lengths) / len(lengths) * BATCH * attended
    forward = layers * (2 * tokens * linear + 2 * scores)
    output = 2 * answer_tokens * config.vocab_size * hidden
    lowest = min(layer for layer, _ in heads) if variant in ("alps_heads", "offsets") else 0
    backward = (layers - lowest) * (2 * tokens * linear + 4 * scores)
    everything = variant in ("full_plain", "full_answer_only", "alps_all")
    own, trained = 0.0, total
    if everything:
        frozen = 0 if variant.startswith("full") else layers * qkv - trained_rows(heads)
        own, trained = 2 * tokens * (layers * linear - frozen) + output, total - frozen
    elif variant in ("masking_hooks", "full_heads"):
        own, trained = 2 * tokens * layers * qkv, layers * qkv
    elif variant == "alps_heads":
        own, trained = 2 * tokens * trained_rows(heads), trained_rows(heads)
    elif variant in ("lora_128", "lora_matched", "dora_matched"):
        one = layers * (3 * hidden + attended + 2 * shared)
        trained = one * (128 if variant == "lora_128" else round(trained_rows(heads) / one))
        own, total = 6 * tokens * trained, total + trained
    elif variant == "shira_matched":  # a product of its own, sparse
        own, trained = 2 * tokens * trained_rows(heads), trained_rows(heads)
    elif variant in ("offsets", "jola"):  # a few operations per number of the per-head outputs are not counted
        every = layers * config.num_attention_heads
        trained = every * (2 * config.head_dim + 2) if variant == "jola" else len(heads) * config.head_dim
    kept = 2 * hidden + 2 * attended + 2 * shared + 2 * wide + everything * (2 * hidden + wide)
    activations = (layers - lowest) * tokens * kept + 2 * answer_tokens * config.vocab_size
    return {
        "operations": forward + backward + own + 2 * output,
        "bytes": 4 * (total + 3 * trained + activations),
        "tokens": tokens,
    }


def trained_rows(heads: object) -> int:
    """Weights in the selected rows."""
    rows = heads.layout.selected_rows(heads)
    return sum(map(len, rows.values())) * heads.layout.hidden_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--variant", choices=VARIANTS, help="measure one variant in this process and print it")
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(run(arguments.variant)))
        return
    found: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    for i in range(arguments.rounds):
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--variant", variant]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[variant].append(json.loads(out.splitlines()[-1]))
            seconds = median(found[variant][-1]["seconds"])
            print(f"round {i + 1}: {variant}: {seconds:.2f} s a step", flush=True)
    save("training", {"variants": VARIANTS, "rounds": found})


if __name__ == "__main__":
    main()
