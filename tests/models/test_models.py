"""Models by name: what is readable is read right, and everything else gets one clear sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import TINY, tiny_checkpoint, tiny_model, tiny_tokenizer
from torch import nn

from alps_repro import HeadLayout, UserError, load_model, localize
from alps_repro.models.attention import open_attention
from alps_repro.models.files import INDEX, SINGLE
from alps_repro.models.folders import ADAPTER, adapter_base, is_adapter, load_config, model_hash, resolve
from alps_repro.tuner.base import dense_weight
from alps_repro.tuner.rows import ROWS, AlpsConfig

#: A projection in the middle of the tiny Llama.
KEY = "model.layers.1.self_attn.k_proj.weight"

PROMPT = torch.tensor([[4, 9, 17, 30, 5, 5, 40]])


def refusal(call: Callable, *args, **kwargs) -> str:
    """The message of the `UserError` that this call must end in: one line that ends like a sentence."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert message.endswith((".", "?"))
    return message


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A tiny Llama with its tokenizer; not to be written to."""
    return tiny_checkpoint(tmp_path_factory.mktemp("llama") / "llama")


@pytest.fixture
def broken(llama, tmp_path) -> Path:
    """A copy of it, to be broken."""
    return Path(shutil.copytree(llama, tmp_path / "broken"))


@pytest.fixture
def shards(llama, tmp_path) -> Path:
    """A copy of it in many files, to be broken."""
    tiny_model("llama").save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    tiny_tokenizer().save_pretrained(tmp_path / "shards")
    return tmp_path / "shards"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a checkpoint."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def reconfigure(folder: Path, **settings) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "./none", "tests/none", "/nowhere/at/all", "a/b/c", "a b/c"])
def test_names_that_lead_nowhere(name, llama):
    for call in (resolve, load_model, lambda n: localize(llama, n), lambda n: localize(n, llama)):
        message = refusal(call, name)
        assert f"no checkpoint '{name}'" in message
        assert "smollm2-135m" in message


def test_a_path_below_an_existing_folder_is_no_hub_id(tmp_path, monkeypatch):
    """'results/task' looks like a hub id; where there is a folder 'results', the path was meant."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    assert "no checkpoint 'results/task'" in refusal(resolve, "results/task")


def test_a_file_is_not_a_folder(llama):
    message = refusal(resolve, llama / SINGLE)
    assert "is a file: give the folder" in message


def test_hub_without_network(llama):
    """The tests run without the hub, see conftest.py."""
    message = refusal(localize, llama, "nobody/nothing")
    assert "'nobody/nothing' is no local folder" in message
    assert "check the name and the connection" in message


def test_folder_without_config(broken):
    (broken / "config.json").unlink()
    assert "holds no config.json" in refusal(resolve, broken)


def test_folder_without_weights(broken):
    (broken / SINGLE).unlink()
    assert f"holds no weights: expected {SINGLE}" in refusal(resolve, broken)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickled_weights_are_refused_unread(broken, name):
    """They are not even opened: this one is no pickle at all."""
    (broken / SINGLE).unlink()
    (broken / name).write_bytes(b"not a pickle")
    for call in (resolve, load_model, lambda f: localize(f, f)):
        message = refusal(call, broken)
        assert f"pickled weights ({name})" in message
        assert "save_pretrained" in message


def test_pickled_weights_beside_safetensors_are_left_alone(broken):
    (broken / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert resolve(broken) == broken
    load_model(broken)


def test_adapter_folder_without_weights(tmp_path):
    (tmp_path / ADAPTER).write_text("{}")
    assert "no adapter_model.safetensors" in refusal(resolve, tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"base_model_name_or_path": null}', "does not name its base"),
        ('{"base_model_name_or_path": ""}', "does not name its base"),
    ],
)
def test_adapter_that_names_no_base(tmp_path, llama, content, says):
    (tmp_path / ADAPTER).write_text(content)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert says in refusal(adapter_base, tmp_path)
    assert says in refusal(localize, llama, tmp_path)


# --- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"{}",
        b"\xff\xfe\x00",
        b'{"model_type": "nope"}',
        b'{"model_type": "llama", "num_attention_heads": "four"}',
        b'{"model_type": "llama", "num_attention_heads": 0}',
        b'{"model_type": "llama", "dtype": "float99"}',
    ],
)
def test_corrupted_config(broken, llama, content):
    (broken / "config.json").write_bytes(content)
    for call in (load_model, load_config, lambda f: localize(llama, f)):
        assert f"The config.json of '{broken}' cannot be read" in refusal(call, broken)


def test_custom_code_is_never_run(broken, llama):
    """Nor is anybody asked at a prompt whether to."""
    reconfigure(broken, model_type="other", auto_map={"AutoConfig": "run.Me", "AutoModelForCausalLM": "run.Me"})
    (broken / "run.py").write_text(f"open({str(broken / 'ran')!r}, 'w')\nclass Me: pass\n")
    for call in (load_model, lambda f: localize(llama, f)):
        assert "custom code" in refusal(call, broken)
    assert not (broken / "ran").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"head_dim": 16}, "has shape (32, 32), not (64, 32)"),
        ({"hidden_size": 64, "head_dim": 8}, "has shape (32, 32), not (32, 64)"),
        ({"num_hidden_layers": 3}, "lacks the tensor 'model.layers.2.self_attn.q_proj.weight'"),
        ({"num_key_value_heads": 4}, "k_proj' of"),
        ({"num_key_value_heads": 3}, "must divide the heads"),
        ({"model_type": "gpt2"}, "'h.0.attn.c_attn.weight' was found 0 times in this gpt2 model"),
        ({"model_type": "bert"}, "The architecture 'bert' is not known"),
    ],
)
def test_config_that_belongs_to_another_checkpoint(broken, settings, says):
    reconfigure(broken, **settings)
    assert says in refusal(localize, broken, broken)


@pytest.mark.parametrize("settings", [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"model_type": "bert"}])
def test_load_model_never_makes_weights_up(broken, settings):
    """transformers gives random weights to whatever the checkpoint lacks, and warns."""
    reconfigure(broken, **settings)
    message = refusal(load_model, broken)
    assert "of the tensors that its config.json calls for" in message


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 4, 100, 5000, -1])
def test_truncated_weights(broken, llama, size):
    content = (broken / SINGLE).read_bytes()
    (broken / SINGLE).write_bytes(content[:size])
    message = refusal(localize, llama, broken)
    assert f"The weights of '{broken}' cannot be read" in message
    assert "copy them again" in message
    assert f"'{broken}' cannot be loaded" in refusal(load_model, broken)


@pytest.mark.parametrize("damage", ["empty", "half", "gone"])
def test_damaged_shard(shards, llama, damage):
    name = json.loads((shards / INDEX).read_text())["weight_map"][KEY]
    content = (shards / name).read_bytes()
    if damage == "gone":
        (shards / name).unlink()
    else:
        (shards / name).write_bytes(content[: len(content) // 2 if damage == "half" else 0])
    message = refusal(localize, llama, shards)
    assert f"'{shards / name}' cannot be read" in message
    assert "damaged or gone" in message
    assert f"'{shards}' cannot be loaded" in refusal(load_model, shards)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "{}", '{"weight_map": 3}', '{"weight_map": []}', '{"weight_map": {}}', "\0"]
)
def test_corrupt_index(shards, llama, content):
    (shards / INDEX).write_text(content)
    assert str(shards) in refusal(localize, llama, shards)
    assert f"'{shards}' cannot be loaded" in refusal(load_model, shards)


def test_index_without_a_tensor(shards, llama):
    index = json.loads((shards / INDEX).read_text())
    del index["weight_map"][KEY]
    (shards / INDEX).write_text(json.dumps(index))
    assert f"'{shards}' lacks the tensor '{KEY}'" in refusal(localize, llama, shards)


@pytest.mark.parametrize("file", [3, None, ".", "none.safetensors"])
def test_index_that_names_no_file(shards, llama, file):
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"][KEY] = file
    (shards / INDEX).write_text(json.dumps(index))
    assert "cannot be read" in refusal(localize, llama, shards)


def test_missing_tensor(broken, llama):
    rewrite(broken, lambda tensors: tensors.pop(KEY))
    message = refusal(localize, llama, broken)
    assert f"'{broken}' lacks the tensor '{KEY}'" in message
    assert "incomplete" in message
    message = refusal(load_model, broken)
    assert "lacks 1 of the tensors" in message
    assert KEY in message


def test_no_attention_at_all(broken, llama):
    rewrite(broken, lambda tensors: [tensors.pop(name) for name in list(tensors) if "self_attn" in name])
    message = refusal(localize, llama, broken)
    assert str(broken) in message
    assert "'layers.0.self_attn.q_proj.weight' was found 0 times" in message


def test_wrong_shape(broken, llama):
    rewrite(broken, lambda tensors: tensors.update({KEY: torch.zeros(8, 32)}))
    message = refusal(localize, llama, broken)
    assert f"has shape (8, 32), not {(16, 32)}" in message
    assert "layers.1.self_attn.k_proj" in message
    assert KEY in refusal(load_model, broken)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_broken_weights_are_named(broken, llama, value, dtype):
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})
        tensors[KEY][3, 5] = value

    rewrite(broken, damage)
    for pair in ((llama, broken), (broken, llama)):
        message = refusal(localize, *pair)
        assert "layers.1.self_attn.k_proj" in message
        assert str(broken) in message
        assert "NaN or infinite" in message


def test_broken_weights_of_a_loaded_model(llama):
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[0, 40] = float("nan")
    assert "'h.0.attn.c_attn' of GPT2LMHeadModel holds NaN" in refusal(localize, model, model)


def test_large_weights_are_not_called_infinite(broken):
    """Their sum overflows in half precision; they do not."""

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[KEY] = torch.full((16, 32), 6e4, dtype=torch.float16)

    rewrite(broken, enlarge)
    assert "No head of" in refusal(localize, broken, broken)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.float8_e4m3fn])
def test_stored_quantized_weights_are_refused(broken, llama, dtype):
    """Without their scales the numbers mean nothing."""
    rewrite(broken, lambda tensors: tensors.update({KEY: tensors[KEY].to(dtype)}))
    message = refusal(localize, llama, broken)
    assert f"'{KEY}' of '{broken}' is {dtype}" in message
    assert "load_model" in message


def test_weights_that_are_no_matrix(broken, llama):
    rewrite(broken, lambda tensors: tensors.update({KEY: torch.zeros(16 * 32)}))
    assert "not a float matrix" in refusal(localize, llama, broken)


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("mistral", {}, "architecture llama and mistral"),
        ("gpt2", {}, "architecture llama and gpt2, groups 2 and 4"),
        ("llama", {"num_hidden_layers": 3}, "layers 2 and 3"),
        ("llama", {"num_attention_heads": 2}, "heads 4 and 2"),
        ("llama", {"num_key_value_heads": 4}, "groups 2 and 4"),
        ("llama", {"head_dim": 16}, "head_dim 8 and 16"),
        ("llama", {"hidden_size": 64, "head_dim": 8}, "hidden_size 32 and 64"),
    ],
)
def test_pairs_that_do_not_match(llama, tmp_path, name, settings, says):
    other = tiny_model(name, **settings)
    other.save_pretrained(tmp_path)
    for task in (tmp_path, other):
        message = refusal(localize, llama, task)
        assert "not a base and a model tuned from it" in message
        assert says in message


@pytest.mark.filterwarnings("ignore:All adapters are already merged")
def test_models_with_a_foreign_adapter(llama, tmp_path):
    """A LoRA model's projections hold only a part of its weights: scoring them would say that nothing moved."""
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(llama)
    model.save_pretrained(tmp_path)
    assert "layers.0.self_attn.q_proj" in refusal(localize, llama, model)
    assert "merge_and_unload" in refusal(localize, llama, model)
    assert "is a LORA adapter" in refusal(localize, llama, tmp_path)
    with model.disable_adapter():
        assert "No head of" in refusal(localize, llama, model)
    model.merge_adapter()
    merged = localize(llama, model).values
    assert merged.all()
    assert np.array_equal(merged, localize(llama, model.merge_and_unload()).values)


def test_models_of_unknown_architecture():
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32))
    assert "'bert' is not known" in refusal(localize, model, model)


# --- reading what is there -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_folder_model_and_loaded_folder_hold_the_same_rows(tmp_path, name):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path)
    layout = HeadLayout.of(model)
    sources = (model, loaded, tmp_path, str(tmp_path))
    for layer in range(layout.layers):
        for part, count in (("query", layout.heads), ("key", layout.groups), ("value", layout.groups)):
            read = []
            for source in sources:
                with open_attention(source) as attention:
                    assert attention.layout == layout
                    read.append(attention.layer(layer)[part])
            assert read[0].shape == (count * layout.head_dim, layout.hidden_size)
            assert all(torch.equal(read[0], other) for other in read[1:])


def test_checkpoints_with_vision_are_read_at_their_text_part(tmp_path):
    """Gemma 3's language model lies below another prefix there, beside a vision tower with heads of its own."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = dict(TINY["gemma3_text"][1])
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    own = next(m for path, m in model.named_modules() if path.endswith("language_model.layers.1.self_attn.q_proj"))
    for source in (model, tmp_path):
        with open_attention(source) as attention:
            assert attention.layout == HeadLayout("gemma3_text", 2, 4, 2, 16, 32)
            assert torch.equal(attention.layer(1)["query"], own.weight)


def test_half_precision_is_read_as_stored(broken):
    rewrite(broken, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    with open_attention(broken) as attention:
        assert attention.layer(0)["key"].dtype == torch.bfloat16


# --- load_model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "says"), [("4bits", "did you mean '4bit'"), ("nf4", "known are"), (None, "'None'")])
def test_unknown_quantization(llama, word, says):
    message = refusal(load_model, llama, word)
    assert "no quantization" in message
    assert says in message


def test_loaded_model_computes_what_the_saved_one_did(llama):
    model, tokenizer = load_model(llama)
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(model(PROMPT).logits, tiny_model("llama")(PROMPT).logits)
    assert tokenizer.padding_side == "left"
    batch = tokenizer(["abc", "a"], padding=True, return_tensors="pt")
    assert batch.input_ids[1].tolist()[:2] == [tokenizer.pad_token_id] * 2
    assert batch.attention_mask[1].tolist() == [0, 0, 1]


def test_padding_token_is_there_even_if_the_tokenizer_has_none(broken):
    """As Llama 3's has none."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(broken)
    _, tokenizer = load_model(broken)
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"


def test_dtype_by_choice(llama):
    model, _ = load_model(llama, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_folder_without_a_tokenizer(broken):
    for file in broken.glob("tokenizer*"):
        file.unlink()
    assert f"'{broken}' cannot be loaded" in refusal(load_model, broken)


def test_embedded_model_knows_the_capital_of_france(smollm2):
    assert resolve("smollm2-135m") == smollm2
    model, tokenizer = load_model("smollm2-135m")
    assert HeadLayout.of(model) == HeadLayout("llama", layers=30, heads=9, groups=3, head_dim=64, hidden_size=576)
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert "Paris" in tokenizer.decode(logits[0, -1].argmax())
    assert not [*smollm2.glob("*.bin"), *smollm2.glob("*.gguf")]


# --- quantized -------------------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 64, "intermediate_size": 128}


def projections(model: nn.Module) -> dict[str, nn.Module]:
    return {path: m for path, m in model.named_modules() if path.endswith(("q_proj", "k_proj", "v_proj"))}


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A tiny Llama of a width that bitsandbytes' blocks of 64 divide."""
    return tiny_checkpoint(tmp_path_factory.mktemp("wide") / "wide", "llama", **WIDE)


@pytest.mark.parametrize(("quantization", "kind"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_quantized_weights_are_close_to_the_original(wide, quantization, kind):
    model, _ = load_model(wide, quantization)
    original = projections(tiny_model("llama", **WIDE))
    assert len(original) == 6
    for path, module in projections(model).items():
        assert type(module).__name__ == kind
        weight = dense_weight(module)
        exact = original[path].weight.detach()
        assert weight.is_floating_point()
        assert not weight.requires_grad
        assert weight.shape == exact.shape
        assert 0 < (weight - exact).norm() / exact.norm() < (0.2 if quantization == "4bit" else 0.02)
    with torch.no_grad():
        assert torch.isfinite(model(PROMPT).logits).all()


def test_quantized_conv1d_is_read_as_outputs_by_inputs(tmp_path):
    """bitsandbytes stores GPT-2's projections the other way round than GPT-2 does."""
    tiny_checkpoint(tmp_path, "gpt2", n_embd=64)
    model, _ = load_model(tmp_path, "4bit")
    exact = dense_weight(tiny_model("gpt2", n_embd=64).transformer.h[1].attn.c_attn)
    weight = dense_weight(model.transformer.h[1].attn.c_attn)
    assert weight.shape == exact.shape == (192, 64)
    assert (weight - exact).norm() / exact.norm() < 0.2


def test_forward_passes_leave_4bit_weights_alone(wide):
    """Where the processor has AVX512-BF16, bitsandbytes would repack them in the first pass, for good."""
    model, _ = load_model(wide, "4bit")
    modules = projections(model)
    assert all(module.support_avx512bf16_for_cpu is False for module in modules.values())
    before = {path: dense_weight(module).clone() for path, module in modules.items()}
    with torch.no_grad():
        first, second = (model.eval()(PROMPT).logits for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(dense_weight(module), before[path]) for path, module in modules.items())


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_models_can_be_localized(wide, quantization):
    """Against the original, each head moved by what quantizing did to it."""
    model, _ = load_model(wide, quantization)
    scores = localize(wide, model, metric="relative_l2", head_matrix="concat")
    assert scores.values.all()
    assert scores.values.max() < 0.2


def test_dense_weight_of_plain_projections():
    llama, gpt2 = tiny_model("llama"), tiny_model("gpt2")
    linear, conv = llama.model.layers[0].self_attn.k_proj, gpt2.transformer.h[0].attn.c_attn
    assert torch.equal(dense_weight(linear), linear.weight)
    assert torch.equal(dense_weight(conv), conv.weight.T)
    assert dense_weight(linear).data_ptr() == linear.weight.data_ptr()  # a view, no copy
    assert not dense_weight(linear).requires_grad


# --- adapters --------------------------------------------------------------------------------------------------------

HEADS = [(0, 1), (1, 0), (1, 3)]


def trained_adapter(base: Path, name: str, folder: Path) -> nn.Module:
    """An ALPS adapter on a saved tiny model, with other rows (and biases) than the base's, saved."""
    model = get_peft_model(tiny_model(name), AlpsConfig(heads=HEADS))
    model.peft_config["default"].base_model_name_or_path = str(base)
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ["llama", "llama_mha_bias", "gpt2", "gpt_neox", "phi3", "falcon_gqa", "opt"])
def test_adapter_folder_stands_for_the_merged_model(tmp_path, name):
    base = tmp_path / "base"
    tiny_model(name).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    model = trained_adapter(base, name, tmp_path / "adapter")
    assert is_adapter(tmp_path / "adapter")
    assert adapter_base(tmp_path / "adapter") == str(base)
    with torch.no_grad():
        logits = model(PROMPT).logits
    attached, _ = load_model(tmp_path / "adapter")
    before_merge = localize(base, model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for head_matrix in ("product", "concat", "released"):
        expected = localize(base, tmp_path / "merged", head_matrix=head_matrix)
        # Folder of the adapter, model that carries it, and merged model.
        for task in (tmp_path / "adapter", attached, merged):
            assert np.array_equal(localize(base, task, head_matrix=head_matrix).values, expected.values)
    assert np.array_equal(before_merge.values, localize(base, merged).values)
    layout = HeadLayout.of(merged)
    groups = {(layer, layout.group(head)) for layer, head in HEADS}
    moved = {(lr, h) for lr in range(2) for h in range(layout.heads) if (lr, layout.group(h)) in groups}
    assert set(zip(*np.nonzero(before_merge.values))) == moved
    with torch.no_grad():
        assert torch.allclose(attached(PROMPT).logits, logits, atol=1e-6)


def test_adapter_as_base(tmp_path, llama):
    """What stands for a task may stand for a base, too."""
    trained_adapter(llama, "llama", tmp_path)
    assert "No head of" in refusal(localize, tmp_path, tmp_path)
    assert localize(tmp_path, llama, metric="l2").values == pytest.approx(localize(llama, tmp_path, metric="l2").values)


def test_reading_an_adapter_builds_no_model(tmp_path, llama, monkeypatch):
    trained_adapter(llama, "llama", tmp_path)
    expected = localize(llama, tmp_path).values

    def no_module(*args, **kwargs):
        raise AssertionError("a module was built")

    monkeypatch.setattr(nn.Module, "__init__", no_module)
    assert np.array_equal(localize(llama, tmp_path).values, expected)


def test_adapters_that_do_not_fit(tmp_path, llama):
    folder = tmp_path / "adapter"
    trained_adapter(llama, "llama", folder)
    stored = load_file(folder / "adapter_model.safetensors")
    settings = json.loads((folder / ADAPTER).read_text())

    def change(tensors: dict[str, torch.Tensor], **other) -> str:
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / ADAPTER).write_text(json.dumps({**settings, **other}))
        return refusal(localize, llama, folder)

    rows = next(name for name in stored if name.endswith(f"layers.1.self_attn.k_proj.{ROWS}"))
    assert "layers.1.self_attn.k_proj" in change({n: t for n, t in stored.items() if n != rows})
    assert "does not fit its base" in change({**stored, rows: stored[rows][:3].contiguous()})
    assert "NaN or infinite" in change({**stored, rows: stored[rows] * float("nan")})
    assert "no head 4 in layer 0" in change(stored, heads=[[0, 4]])
    assert "does not fit its base" in change(stored, heads=[[0, 2], [1, 0], [1, 1], [1, 3]])
    assert "no checkpoint 'gone'" in change(stored, base_model_name_or_path="gone")
    (folder / ADAPTER).write_text(json.dumps(settings))
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[:-5])
    assert "is not a readable ALPS adapter" in refusal(localize, llama, folder)


def test_adapter_on_another_shape_of_base(tmp_path, llama):
    other = tiny_checkpoint(tmp_path / "other", "llama", num_key_value_heads=4)
    trained_adapter(llama, "llama", tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / ADAPTER).read_text())
    settings["base_model_name_or_path"] = str(other)
    (tmp_path / "adapter" / ADAPTER).write_text(json.dumps(settings))
    assert "does not fit its base" in refusal(localize, other, tmp_path / "adapter")


# --- hashes ----------------------------------------------------------------------------------------------------------


def test_hash_depends_on_content_alone(llama, tmp_path):
    copy = Path(shutil.copytree(llama, tmp_path / "zzz"))
    assert model_hash(copy) == model_hash(llama)
    (copy / "README.md").write_text("something beside the model")
    assert model_hash(copy) == model_hash(llama)
    hashes = {model_hash(llama)}
    rewrite(copy, lambda tensors: tensors[KEY][0, 0].add_(1e-3))
    hashes.add(model_hash(copy))
    reconfigure(copy, rms_norm_eps=1e-3)
    hashes.add(model_hash(copy))
    (copy / SINGLE).rename(copy / "other.safetensors")
    hashes.add(model_hash(copy))
    assert len(hashes) == 4
    assert all(len(h) == 64 for h in hashes)


def test_hash_of_adapters(llama, tmp_path):
    trained_adapter(llama, "llama", tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert model_hash(tmp_path / "one") == model_hash(tmp_path / "two")
    settings = json.loads((tmp_path / "two" / ADAPTER).read_text())
    (tmp_path / "two" / ADAPTER).write_text(json.dumps({**settings, "revision": "other"}))
    assert model_hash(tmp_path / "one") != model_hash(tmp_path / "two")
