"""Training steps of the paper's models on a GPU: seconds and memory, beside what `alps-repro plan` says of the memory.

`python benchmarks/gpu.py` makes the models' geometry with random weights, which take as long as trained ones, trains a
few steps by every variant of `training.py` that a card of 80 GB holds, in turn, several times, and writes
`results/benchmarks/gpu.json`. Nothing is downloaded. A variant with `_4bit` has a base in NF4.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path

import torch
from measured import median, save
from training import METHOD_OF, VARIANTS, prepare, train

STEPS = 6  # the first warms up and is left out
BATCH, LENGTH, RESPONSE = 8, 512, 128

#: {model: its variants}. Weights that are trained are float32: of the 8B, only heads fit.
MODELS = {
    "meta-llama/Llama-3.2-1B": list(VARIANTS),
    "meta-llama/Llama-3.1-8B": ["alps_heads", "alps_heads_4bit", "lora_128", "offsets", "jola"],
}

#: Whose weights are trained themselves, and are float32 for that.
IN_FLOAT32 = ("alps_all", "full_plain", "full_answer_only", "masking_hooks")


def random_checkpoint(name: str, folder: Path) -> Path:
    """A checkpoint of a known model's geometry, random bfloat16 weights, with a tokenizer that only pads."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from alps_repro.experiments.plan import KNOWN

    shape = KNOWN[name]
    config = LlamaConfig(
        num_hidden_layers=shape.layout.layers,
        hidden_size=shape.layout.hidden_size,
        num_attention_heads=shape.layout.heads,
        num_key_value_heads=shape.layout.groups,
        head_dim=shape.layout.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.total - shape.linear < 1.5 * shape.vocabulary * shape.layout.hidden_size,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == shape.total
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


def measure(name: str, checkpoint: Path, variant: str) -> dict:
    """A variant's steps, the card's peak within torch, and the plan's figure for the same."""
    from alps_repro import HeadLayout, HeadSelection, load_model

    kind = variant.removesuffix("_4bit")
    quantization = "4bit" if variant.endswith("_4bit") else "none"
    torch.manual_seed(0)
    dtype = torch.float32 if kind in IN_FLOAT32 else None
    model, tokenizer = load_model(checkpoint, quantization, dtype=dtype)
    model.config.use_cache = False
    heads = HeadSelection.random(HeadLayout.of(model), 0.1, seed=0)
    ids = torch.randint(2, model.config.vocab_size, (STEPS * BATCH, LENGTH)).tolist()
    rows = [{"input_ids": row, "prompt_length": LENGTH - RESPONSE} for row in ids]
    tuned, rows, collate = prepare(kind, model, tokenizer, heads, rows)
    torch.cuda.reset_peak_memory_stats()
    found = train(
        tuned,
        rows,
        collate,
        per_device_train_batch_size=BATCH,
        bf16=True,
        optim="adamw_torch_fused",
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
    )
    return {**found, "peak_bytes": torch.cuda.max_memory_allocated(), "planned_bytes": planned(name, variant)}


def planned(name: str, variant: str) -> float | None:
    """What the plan says that torch holds at most, for variants that are methods of the package."""
    from alps_repro.experiments.configs import FinetuneConfig
    from alps_repro.experiments.plan import Lengths, memory
    from alps_repro.training.methods import METHODS

    method, scope = METHOD_OF.get(variant.removesuffix("_4bit"), ("", ""))
    if not method or METHODS[method].uses_scores:
        return None
    config = FinetuneConfig.check(
        base=name,
        dataset="alpaca",
        method=method,
        scope=scope,
        quantization="4bit" if variant.endswith("_4bit") else "none",
        recipe={
            "batch_size": BATCH,
            "micro_batch_size": BATCH,
            "precision": "bfloat16",
            "gradient_checkpointing": True,
            "max_length": LENGTH,
        },
    )
    parts = memory(config, Lengths(LENGTH, LENGTH, RESPONSE))
    return sum(size for part, size in parts.items() if part != "overhead")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This measures a GPU, and there is none.")
    words = {**VARIANTS, "alps_heads_4bit": VARIANTS["alps_heads"] + ", base in NF4"}
    found: dict[str, dict[str, list[dict]]] = {name: {v: [] for v in own} for name, own in MODELS.items()}
    for name, variants in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = random_checkpoint(name, Path(folder) / "checkpoint")
            for i in range(arguments.rounds):
                for variant in variants:
                    gc.collect()
                    torch.cuda.empty_cache()
                    found[name][variant].append(measure(name, checkpoint, variant))
                    one = found[name][variant][-1]
                    text = f"{median(one['seconds']):.3f} s a step, {one['peak_bytes'] / 1e9:.1f} GB"
                    print(f"{name}: round {i + 1}: {variant}: {text}", flush=True)
                save("gpu", {"batch": [BATCH, LENGTH, RESPONSE], "variants": words, "models": found})


if __name__ == "__main__":
    main()
