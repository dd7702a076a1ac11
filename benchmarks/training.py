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
    "full_answer_only": "full fine-tuning with this package's loss",
    "full_plain": "full fine-tuning as plain Trainer runs it",
    "masking_hooks": "q, k, v trainable whole, gradients masked by hooks, this package's loss",
    "lora_128": "LoRA of rank 128 on q, k, v, this package's loss",
}


def run(variant: str) -> dict:
    """One process's measurement."""
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, set_seed

    from alps_repro import HeadLayout, HeadSelection, load_model
    from alps_repro.data import training_examples
    from alps_repro.training import Collate, tokenize, trainable
    from alps_repro.tuner import AlpsModel

    set_seed(0)
    model, tokenizer = load_model("smollm2-135m")
    model.config.use_cache = False
    layout = HeadLayout.of(model)
    heads = HeadSelection.random(layout, 0.1, seed=0)
    rows = tokenize(training_examples("family_relationships", size=STEPS * BATCH), tokenizer, 2048)
    collate = Collate(tokenizer.pad_token_id, "response")
    tuned = model
    if variant in ("alps_heads", "alps_all"):
        tuned = trainable(model, heads, variant.removeprefix("alps_"))
    elif variant == "full_plain":
        tokenizer.padding_side = "right"
        rows = Dataset.from_list(
            [
                {
                    "input_ids": r["input_ids"],
                    "labels": [-100] * r["prompt_length"] + r["input_ids"][r["prompt_length"] :],
                }
                for r in rows
            ]
        )
        collate = DataCollatorForSeq2Seq(tokenizer)
    elif variant == "masking_hooks":
        model.requires_grad_(False)
        for name, own in layout.selected_rows(heads).items():
            weight = model.model.get_submodule(name).weight
            mask = torch.zeros(len(weight), 1)
            mask[own] = 1
            weight.requires_grad_(True).register_hook(lambda grad, mask=mask: grad * mask)
    elif variant == "lora_128":
        from peft import LoraConfig, get_peft_model

        tuned = get_peft_model(model, LoraConfig(r=128, target_modules=["q_proj", "k_proj", "v_proj"]))
    taken: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs) -> None:
            taken.append(time.perf_counter() - self.start)

        def on_pre_optimizer_step(self, *args, model=None, **kwargs) -> None:
            self.gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)

    clock = Clock()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=tuned.model if isinstance(tuned, AlpsModel) else tuned,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                max_steps=STEPS,
                learning_rate=1e-4,
                weight_decay=0.1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                remove_unused_columns=False,
            ),
            train_dataset=rows,
            data_collator=collate,
            callbacks=[clock],
        )
        trainer.train()
    status = Path("/proc/self/status").read_text()
    state = trainer.optimizer.optimizer.state.values()
    return {
        "seconds": taken[1:],
        "trained_parameters": sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        "gradient_bytes": clock.gradients,
        "optimizer_bytes": sum(t.nbytes for s in state for t in s.values() if torch.is_tensor(t)),
        "peak_bytes": int(status.split("VmHWM:")[1].split()[0]) * 1024,
        "floor": floor(variant, model.config, heads, rows),
    }


def floor(variant: str, config: object, heads: object, rows: object) -> dict[str, float]:
    """Multiplications and additions of a step, counted: what no implementation of the variant can do without.

    Per token a weight costs 2 operations forward, 2 for the gradient of its input, and 2 for its own. A frozen weight
    has none of its own; below the lowest selected layer there is no backward pass. Attention itself (q·k and p·v) is
    counted like a product of activations, whose backward pass costs twice the forward one. The output layer counts for
    the positions whose logits are taken.
    """
    layers = config.num_hidden_layers
    lengths = [len(row["input_ids"]) for row in rows]
    answers = [
        len(r["input_ids"]) - r["prompt_length"] + 1 if "prompt_length" in r else len(r["input_ids"]) for r in rows
    ]
    tokens, answer_tokens = sum(lengths) / len(lengths) * BATCH, sum(answers) / len(answers) * BATCH
    qkv = config.hidden_size * config.head_dim * (config.num_attention_heads + 2 * config.num_key_value_heads)
    output_projection = config.hidden_size * config.head_dim * config.num_attention_heads
    linear = qkv + output_projection + 3 * config.hidden_size * config.intermediate_size
    scores = 2 * sum(n * n for n in lengths) / len(lengths) * BATCH * config.num_attention_heads * config.head_dim
    forward = layers * (2 * tokens * linear + 2 * scores)
    output = 2 * answer_tokens * config.vocab_size * config.hidden_size
    lowest = min(layer for layer, _ in heads) if variant in ("alps_heads",) else 0
    backward = (layers - lowest) * (2 * tokens * linear + 4 * scores)
    own = 0.0
    if variant.startswith("full") or variant == "alps_all":
        frozen = 0.0 if variant.startswith("full") else layers * qkv - trained_rows(heads)
        own = 2 * tokens * (layers * linear - frozen) + output
    elif variant == "masking_hooks":
        own = 2 * tokens * layers * qkv
    elif variant == "alps_heads":
        own = 2 * tokens * trained_rows(heads)
    elif variant == "lora_128":
        rank = 128 * (3 * config.hidden_size + config.hidden_size + 2 * config.num_key_value_heads * config.head_dim)
        own = 6 * tokens * layers * rank
    return {"operations": forward + backward + own + 2 * output, "tokens": tokens}


def trained_rows(heads: object) -> int:
    """Weights in the selected rows."""
    rows = heads.layout.selected_rows(heads)
    return sum(map(len, rows.values())) * heads.layout.hidden_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
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
