"""Random tiny models, one or more per architecture that `HeadLayout` knows, made from configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SHARED = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = {**SHARED, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

#: {name: (model_type, settings)}: every architecture, and the variants of attention within it.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA_LIKE),
    "llama_mha_bias": ("llama", {**LLAMA_LIKE, "num_key_value_heads": 4, "attention_bias": True}),
    "llama_mqa_head_dim": ("llama", {**LLAMA_LIKE, "num_key_value_heads": 1, "head_dim": 12}),
    "mistral": ("mistral", LLAMA_LIKE),
    "qwen2": ("qwen2", LLAMA_LIKE),
    "qwen3": ("qwen3", {**LLAMA_LIKE, "head_dim": 16}),
    "gemma": ("gemma", {**LLAMA_LIKE, "head_dim": 16}),
    "gemma2": ("gemma2", {**LLAMA_LIKE, "head_dim": 16}),
    "gemma3_text": ("gemma3_text", {**LLAMA_LIKE, "head_dim": 16}),
    "olmo2": ("olmo2", LLAMA_LIKE),
    "smollm3": ("smollm3", LLAMA_LIKE),
    "phi": ("phi", LLAMA_LIKE),
    "phi3": ("phi3", LLAMA_LIKE),
    "opt": ("opt", {**SHARED, "ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 32}),
    "gpt2": ("gpt2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("gpt_neox", {**SHARED, "intermediate_size": 48, "max_position_embeddings": 128}),
    "falcon_mqa": ("falcon", {**SHARED, "multi_query": True, "new_decoder_architecture": False}),
    "falcon_mha": ("falcon", {**SHARED, "multi_query": False, "new_decoder_architecture": False, "bias": True}),
    "falcon_gqa": ("falcon", {**SHARED, "new_decoder_architecture": True, "num_kv_heads": 2}),
}


def tiny_model(name: str, seed: int = 0, **settings: Any) -> torch.nn.Module:
    """A random model of `TINY`, float32, in eval mode."""
    model_type, own = TINY[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**own, **SPECIAL, **settings})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Characters as tokens, 64 at most; 0 pads, 1 begins, 2 ends, 3 is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = "abcdefghijklmnopqrstuvwxyz0123456789 .,:?!-#\nABDIRSWTMEFGH"
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def tiny_checkpoint(folder: Path, name: str = "llama", seed: int = 0, **settings: Any) -> Path:
    """Save a tiny model with its tokenizer; returns the folder."""
    settings = {"max_position_embeddings": 1024, **settings} if name != "gpt2" else settings
    tiny_model(name, seed, **settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
