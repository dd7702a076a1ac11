"""Checkpoints as people have them: loaded as what they are, or refused in a sentence."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from brought import brought as row
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA_LIKE, TINY, tiny_checkpoint, tiny_model, tiny_tokenizer

from alps_repro import UserError, evaluate, load_model, localize
from alps_repro.experiments.configs import EvaluateConfig
from alps_repro.experiments.runs import evaluate_run
from alps_repro.models.files import SINGLE

brought = partial(row, "Checkpoints")
TOKENS = torch.arange(4, 20)[None]

Tensors = dict[str, torch.Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = change(load_file(folder / SINGLE))
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, folder / SINGLE, {"format": "pt"})


def settings(folder: Path, file: str = "config.json", **own: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **own}))


def quantized(tensors: Tensors, names: str, dtype: torch.dtype, scale: str | None) -> Tensors:
    """Weights scaled to a dtype of one byte, with or without their scales beside them."""
    out = dict(tensors)
    for name, weight in tensors.items():
        if names in name and name.endswith(".weight"):
            size = weight.abs().max() / 100
            out[name] = (weight / size).to(dtype)
            if scale is not None:
                out[name.removesuffix("weight") + scale] = size.reshape(1, 1)
    return out


def narrow(names: str, dtype: torch.dtype, scale: str | None = None) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: quantized(tensors, names, dtype, scale))


def beside(**tensors: torch.Tensor) -> Callable[[Path], None]:
    """Tensors put beside the model's, whose names have `__` for dots."""
    return lambda folder: rewrite(folder, lambda own: {**own, **{n.replace("__", "."): t for n, t in tensors.items()}})


def stored(quantization: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        model, _ = load_model(folder, quantization)
        model.save_pretrained(folder)

    return save


def said(**own: Any) -> Callable[[Path], None]:
    return lambda folder: settings(folder, **own)


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def llava(folder: Path) -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision |= {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
    config = LlavaConfig(text_config={"model_type": "llama", **LLAMA_LIKE}, vision_config=vision)
    LlavaForConditionalGeneration(config).save_pretrained(folder)


def without_head(folder: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)


FLOAT8 = torch.float8_e4m3fn
ONE = torch.ones(1)
LAYER = "model__layers__0__self_attn__"


@pytest.mark.parametrize(
    ("name", "change", "asked", "happens"),
    [
        # --- numbers that mean nothing without their scales
        brought(
            "float8 weights with scales beside them and no quantization_config",
            "no quantization_config in its config.json says how",
            "llama",
            narrow("proj", FLOAT8, "weight_scale_inv"),
            "none",
        ),
        brought(
            "float8 weights of a few modules, without scales",
            "is stored in F8_E5M2",
            "llama",
            narrow("down_proj", torch.float8_e5m2),
            "none",
        ),
        brought("int8 weights without scales", "is stored in I8", "gpt2", narrow("c_fc", torch.int8), "none"),
        brought(
            "4-bit weights whose config.json lost its quantization_config",
            "is stored in U8",
            "llama",
            both(stored("4bit"), said(quantization_config=None)),
            "none",
        ),
        brought(
            "float weights with scales beside them",
            "does not use, the first being 'model.layers.0.mlp.down_proj.weight_scale'",
            "llama",
            lambda folder: rewrite(
                folder, lambda own: own | {f"{n}_scale": ONE for n in own if n.endswith("mlp.down_proj.weight")}
            ),
            "none",
        ),
        brought(
            "a quantization_config beside weights that are not quantized",
            "its weights are not quantized: remove it",
            "llama",
            said(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
            "8bit",
        ),
        # --- stored in another quantization than asked for
        brought("stored in 4 bit, asked for as it is", "ask for '4bit'", "llama", stored("4bit"), "none"),
        brought("stored in 4 bit, asked for in 8 bit", "ask for '4bit'", "llama", stored("4bit"), "8bit"),
        brought("stored in 8 bit, asked for in 4 bit", "ask for '8bit'", "llama", stored("8bit"), "4bit"),
        brought(
            "stored in FP4 of bitsandbytes, asked for in 4 bit (NF4)",
            "is stored in bitsandbytes fp4",
            "llama",
            said(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
            "4bit",
        ),
        *(
            brought(
                f"stored by {method}",
                f"is stored in {method}",
                "llama",
                said(quantization_config={"quant_method": method, "bits": 4}),
                asked,
            )
            for method, asked in (("gptq", "4bit"), ("awq", "none"), ("fp8", "none"), ("compressed-tensors", "8bit"))
        ),
        # --- more or less than config.json says
        brought(
            "more layers than config.json says",
            "num_hidden_layers is 1",
            "llama",
            said(num_hidden_layers=1),
            "none",
        ),
        brought(
            "fewer layers than config.json says",
            "of the tensors that its config.json calls for",
            "gpt_neox",
            said(num_hidden_layers=3),
            "none",
        ),
        brought(
            "biases that config.json denies",
            "'model.layers.0.self_attn.k_proj.bias'",
            "llama_mha_bias",
            said(attention_bias=False),
            "none",
        ),
        brought(
            "no biases where config.json asks for some",
            "'model.layers.0.self_attn.k_proj.bias'",
            "llama",
            said(attention_bias=True),
            "none",
        ),
        brought(
            "normalized queries and keys in an architecture without",
            "'model.layers.0.self_attn.k_norm.weight'",
            "qwen3",
            said(model_type="llama"),
            "none",
        ),
        brought(
            "LoRA's matrices beside the weights",
            "'model.layers.0.self_attn.q_proj.lora_A.weight'",
            "llama",
            beside(**{f"{LAYER}q_proj__lora_A__weight": torch.ones(2, 32)}),
            "none",
        ),
        brought(
            "attention's own scale under a name that transformers ignores",
            "'gpt_neox.layers.0.attention.bias_scale'",
            "gpt_neox",
            beside(gpt_neox__layers__0__attention__bias_scale=ONE),
            "none",
        ),
        brought(
            "a tensor under two names",
            "which are one tensor: remove one",
            "gpt2",
            beside(h__0__ln_1__weight=torch.ones(32)),
            "none",
        ),
        brought(
            "a head that differs from the embedding it is tied to",
            "with different values, and its config.json ties them",
            "llama",
            said(tie_word_embeddings=True),
            "none",
        ),
        # --- what is no model of text
        brought(
            "LLaVA",
            "is a llava model, whose language model (llama) is only a part of it",
            "llama",
            llava,
            "none",
        ),
        brought("T5", "is a t5 model: name a causal language model's checkpoint", "llama", without_head, "none"),
    ],
)
def test_refused_checkpoints(
    tmp_path: Path, name: str, change: Callable[[Path], None], asked: str, happens: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", name)
    change(folder)
    with pytest.raises(UserError) as error:
        load_model(folder, asked)
    assert happens in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("llama", narrow("q_proj", FLOAT8, "weight_scale_inv"), "q_proj.weight_scale_inv"),
        ("llama", narrow("v_proj", FLOAT8), "is torch.float8_e4m3fn"),
        ("gpt2", narrow("c_attn", torch.int8, "scales"), "c_attn.scales"),
        ("llama", beside(**{f"{LAYER}k_proj__g_idx": ONE}), "k_proj.g_idx"),
        ("llama", beside(**{f"{LAYER}o_proj__weight_scale": ONE}), "o_proj.weight_scale"),
        ("llama", beside(**{f"{LAYER}sinks": ONE}), "self_attn.sinks"),
        ("llama", stored("4bit"), "is stored in 4bit"),
        ("gpt_neox", stored("8bit"), "pass what load_model(..., '8bit') gives"),
        ("llama", said(quantization_config={"quant_method": "awq"}), "is stored in awq"),
        ("llama", both(stored("4bit"), said(quantization_config=None)), "k_proj.weight.absmax"),
        ("falcon_gqa", said(num_hidden_layers=1), "num_hidden_layers is 1"),
        ("llama_mha_bias", said(attention_bias=False), "self_attn.k_proj.bias"),
        ("falcon_mha", said(bias=False), "query_key_value.bias"),
        ("qwen3", said(model_type="llama"), "self_attn.k_norm.weight"),
        ("qwen2", said(model_type="llama"), "self_attn.k_proj.bias"),
    ],
)
def test_localizing_refuses_them_too(tmp_path: Path, name: str, change: Callable[[Path], None], says: str) -> None:
    """It reads attention alone, and builds no model that could tell."""
    base, task = (tiny_checkpoint(tmp_path / which, name, seed) for seed, which in enumerate(("base", "task")))
    assert localize(base, task).values.any()
    change(task)
    for pair in ((base, task), (task, base)):
        with pytest.raises(UserError) as error:
            localize(*pair)
        assert says in str(error.value)
        assert str(task) in str(error.value)


def frequencies(folder: Path) -> None:
    buffers = dict(tiny_model("llama").named_buffers())
    beside(**{f"{LAYER}rotary_emb__inv_freq": buffers["model.rotary_emb.inv_freq"].half()})(folder)


def masks(layer: str) -> Callable[[Path], None]:
    return beside(
        **{f"{layer}__bias": torch.ones(1, 1, 8, 8).tril().bool(), f"{layer}__masked_bias": torch.tensor(-1e4)}
    )


def tied(folder: Path) -> None:
    settings(folder, tie_word_embeddings=True)
    rewrite(folder, lambda own: own | {"lm_head.weight": own["model.embed_tokens.weight"]})


def predicting(folder: Path) -> None:
    """A layer behind the model's own, as DeepSeek and GLM store it."""
    settings(folder, num_nextn_predict_layers=1)
    rewrite(folder, lambda own: own | {n.replace("layers.1.", "layers.2."): t for n, t in own.items()})


@pytest.mark.parametrize(
    ("name", "change", "happens"),
    [
        brought("rotary frequencies, in half precision", "loaded; computed anew", "llama", frequencies),
        brought("GPT-2's causal masks", "loaded; not used", "gpt2", masks("transformer__h__0__attn")),
        brought("GPT-NeoX's causal masks", "loaded; not used", "gpt_neox", masks("gpt_neox__layers__0__attention")),
        brought("a head equal to the embedding it is tied to", "loaded; tied", "llama", tied),
        brought(
            "a vision tower beside a text model",
            "loaded; not used",
            "gemma3_text",
            beside(
                vision_tower__vision_model__encoder__layers__0__self_attn__q_proj__weight=torch.ones(4, 4),
                multi_modal_projector__mm_input_projection_weight=torch.ones(4, 4),
            ),
        ),
        brought(
            "layers for multi-token prediction behind the model's own (num_nextn_predict_layers)",
            "loaded; not used",
            "llama",
            predicting,
        ),
        brought(
            "layers for multi-token prediction under mtp",
            "loaded; not used",
            "qwen3",
            beside(mtp__fc__weight=torch.ones(4, 8), mtp__layers__0__self_attn__q_proj__weight=torch.ones(4, 4)),
        ),
    ],
)
def test_what_may_stand_beside_the_model(
    tmp_path: Path, name: str, change: Callable[[Path], None], happens: str
) -> None:
    plain, other = (tiny_checkpoint(tmp_path / which, name) for which in ("plain", "other"))
    if happens == "loaded; tied":
        settings(plain, tie_word_embeddings=True)
        rewrite(plain, lambda own: {n: t for n, t in own.items() if n != "lm_head.weight"})
    change(other)
    assert set(load_file(other / SINGLE)) > set(load_file(plain / SINGLE))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, _ = load_model(other)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, load_model(plain)[0](TOKENS).logits)
    task = tiny_checkpoint(tmp_path / "task", name, seed=1)
    assert np.array_equal(localize(other, task).values, localize(plain, task).values)


def test_rotary_frequencies_that_are_not_the_models_are_said(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    beside(**{f"{LAYER}rotary_emb__inv_freq": torch.tensor([1.0, 0.2, 0.04, 0.008])})(folder)
    with pytest.warns(UserWarning, match="check rope_theta"):
        load_model(folder)


def test_a_model_with_vision_keeps_its_tower(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=TINY["gemma3_text"][1], vision_config=vision)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)[0](TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("quantization", "happens"),
    [
        brought("stored in 4 bit (NF4), asked for so", "loaded, and computed as if quantized here", "4bit"),
        brought("stored in 8 bit, asked for so", "loaded, and computed as if quantized here", "8bit"),
    ],
)
def test_stored_and_asked_for_alike(tmp_path: Path, quantization: str, happens: str) -> None:
    plain, folder = (tiny_checkpoint(tmp_path / which) for which in ("plain", "quantized"))
    stored(quantization)(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    settings(folder, quantization_config={**config, "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_threshold": 0.0})
    (here, _), (there, _) = load_model(plain, quantization), load_model(folder, quantization)
    with torch.no_grad():
        assert torch.equal(here(TOKENS).logits, there(TOKENS).logits)
    assert there.num_parameters() == sum(p.numel() for p in load_model(plain)[0].parameters())
    assert np.array_equal(localize(plain, here).values, localize(plain, there).values)


def drop(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in names}))

    return change


def add(special: dict[str, str] | None = None, tokens: tuple[str, ...] = ()) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(list(tokens))
        tokenizer.add_special_tokens(special or {})
        tokenizer.save_pretrained(folder)

    return change


def remove_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


FULL = tuple(f"<{i}>" for i in range(64 - len(tiny_tokenizer())))


@pytest.mark.parametrize(
    ("name", "change", "happens"),
    [
        brought(
            "a padding token beyond the embedding",
            "tokens beyond the 64 rows of the model's embedding",
            "llama",
            add({"pad_token": "[PAD]"}, FULL),
        ),
        brought(
            "added tokens beyond the embedding",
            "(the first is '[A]', number 64)",
            "llama",
            add(tokens=(*FULL, "[A]", "[B]")),
        ),
        brought(
            "a tokenizer of a larger model",
            "has 14 tokens beyond the 50 rows",
            "gpt2",
            both(lambda folder: tiny_checkpoint(folder, "gpt2", vocab_size=50), add(tokens=FULL)),
        ),
        brought("a tokenizer without an end token", "has no end token", "llama", drop("eos_token")),
        brought(
            "a tokenizer with no end, padding and beginning token",
            "has no end token",
            "llama",
            drop("eos_token", "pad_token", "bos_token"),
        ),
        *(
            brought(f"no tokenizer ({name})", "it holds no tokenizer", name, remove_tokenizer)
            for name in ("llama", "gpt2", "qwen2")
        ),
    ],
)
def test_refused_tokenizers(tmp_path: Path, name: str, change: Callable[[Path], None], happens: str) -> None:
    folder = tiny_checkpoint(tmp_path / "model", name)
    change(folder)
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert happens in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("change", "happens"),
    [
        brought("a tokenizer with no beginning token", "loaded", drop("bos_token")),
        brought("a tokenizer with no padding token", "loaded; padded with its end token", drop("pad_token")),
        brought("a vocabulary smaller than the embedding", "loaded", lambda folder: None),
        brought("a vocabulary as large as the embedding", "loaded", add(tokens=FULL)),
        brought(
            "a text model with the tokenizer of its models of pictures, one token too long (Gemma 3)",
            "loaded",
            add(tokens=(*FULL, "<image_soft_token>")),
        ),
    ],
)
def test_accepted_tokenizers(tmp_path: Path, change: Callable[[Path], None], happens: str) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    change(folder)
    _, tokenizer = load_model(folder)
    assert tokenizer.eos_token_id == 2
    assert tokenizer.pad_token_id == (2 if "padded" in happens else 0)


# --- generation_config.json ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which one answer ends soon, and another one does not; not to be written to."""
    return tiny_checkpoint(tmp_path_factory.mktemp("talker") / "model", seed=24)


@torch.no_grad()
def said_greedily(folder: Path, prompt: str, count: int) -> str:
    """The likeliest token each time, up to the end token or a line break."""
    model, tokenizer = load_model(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    while ids.shape[1] < start + count and (ids.shape[1] == start or ids[0, -1] != tokenizer.eos_token_id):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    said = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    return said.partition("\n")[0].partition("###")[0]


ASIDE = "set aside, said and recorded"


@pytest.mark.parametrize(
    ("own", "aside", "happens"),
    [
        *(
            brought(f"{name} in generation_config.json", ASIDE, {name: value}, (name,))
            for name, value in {
                "repetition_penalty": 3.0,
                "no_repeat_ngram_size": 1,
                "suppress_tokens": [41, 51],
                "begin_suppress_tokens": [14],
                "bad_words_ids": [[41], [51, 63]],
                "min_new_tokens": 20,
                "max_new_tokens": 2,
                "forced_eos_token_id": 2,
                "num_beams": 3,
                "stop_strings": ["."],
                "sequence_bias": [[[41], -10.0]],
                "guidance_scale": 3.0,
                "exponential_decay_length_penalty": [1, 9.0],
            }.items()
        ),
        brought(
            "an ordinary token among the end tokens of generation_config.json",
            ASIDE,
            {"eos_token_id": [2, 41]},
            ("eos_token_id",),
        ),
        brought(
            "a generation_config.json that has another end token than the tokenizer",
            "both end an answer, said and recorded",
            {"eos_token_id": 3},
            ("eos_token_id",),
        ),
        brought(
            "settings of sampling in generation_config.json",
            "answers are greedy all the same",
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 5},
            (),
        ),
    ],
)
def test_settings_of_generation(
    talker: Path, tmp_path: Path, own: dict[str, Any], aside: tuple[str, ...], happens: str
) -> None:
    folder = Path(shutil.copytree(talker, tmp_path / "model"))
    settings(folder, "generation_config.json", **own)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = evaluate(folder, ["chain_sum"], limit=2, batch_size=2, progress=False)
    told = [str(w.message) for w in caught if "generation_config.json" in str(w.message)]
    assert len(told) == bool(aside)
    assert found.neutralized == {name: own[name] for name in aside}
    for sample in found.samples["chain_sum"]:
        assert sample["resps"][0][0] == said_greedily(talker, sample["arguments"][0][0], 24)


def test_settings_of_generation_are_recorded_and_put_back(talker: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(talker, tmp_path / "model"))
    config = EvaluateConfig(model=str(folder), tasks=("chain_sum",), limit=2)
    assert "neutralized" not in evaluate_run(config, tmp_path / "plain", progress=False).result
    settings(folder, "generation_config.json", repetition_penalty=3.0)
    with pytest.warns(UserWarning, match="repetition_penalty = 3.0"):
        record = evaluate_run(config, tmp_path / "other", progress=False)
    assert record.result["neutralized"] == {"repetition_penalty": 3.0}
    model, tokenizer = load_model(folder)
    own = model.generation_config
    with pytest.warns(UserWarning, match="set aside"):
        evaluate(model, ["chain_sum"], tokenizer=tokenizer, limit=2, progress=False)
    assert model.generation_config is own
    assert own.repetition_penalty == 3.0


def test_settings_of_generation_under_an_adapter(talker: Path, tmp_path: Path) -> None:
    from peft import get_peft_model

    from alps_repro import AlpsConfig

    folder = Path(shutil.copytree(talker, tmp_path / "model"))
    settings(folder, "generation_config.json", no_repeat_ngram_size=1)
    model, tokenizer = load_model(folder)
    own = model.generation_config
    tuned = get_peft_model(model, AlpsConfig(heads=[(0, 1)])).eval()
    with pytest.warns(UserWarning, match="no_repeat_ngram_size = 1"):
        found = evaluate(tuned, ["chain_sum"], tokenizer=tokenizer, limit=4, progress=False)
    assert model.generation_config is own
    plain = evaluate(talker, ["chain_sum"], limit=4, progress=False)
    assert [row["resps"] for row in found.samples["chain_sum"]] == [row["resps"] for row in plain.samples["chain_sum"]]
