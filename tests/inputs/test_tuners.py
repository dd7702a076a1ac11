"""What people do with adapters: what would pass in silence is refused in a sentence, the rest works."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from brought import brought
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_edits import KINDS, answers, task_model, train_task
from test_tuner import logits, some_model, state, tokens

from alps_repro.errors import UserError
from alps_repro.tuner.base import fingerprint
from alps_repro.tuner.jola import JolaConfig
from alps_repro.tuner.lofit import LofitConfig
from alps_repro.tuner.rows import AlpsConfig

ADAPTERS = "Adapters"


def made(kind: str = "rows", name: str = "llama", **own: Any) -> PeftModel:
    """An adapter that changes the model's results."""
    torch.manual_seed(3)
    model = get_peft_model(some_model(name), KINDS[kind](task_type="CAUSAL_LM", **own)).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.requires_grad and "_gate" not in key:
                value.add_(0.1)
    return model


def file_of(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def changed(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[str, Path], Any]:
    """Load an adapter whose file was changed."""

    def load(kind: str, folder: Path) -> Any:
        made(kind).save_pretrained(folder)
        stored = load_file(file_of(folder))
        change(stored)
        save_file(stored, file_of(folder))
        return PeftModel.from_pretrained(some_model("llama"), folder)

    return load


def first(stored: dict[str, torch.Tensor]) -> str:
    return min(stored)


def mixed(*names: str, generate: bool = False, inner: bool = False) -> Callable[[str, Path], Any]:
    def call(kind: str, folder: Path) -> Any:
        model = made(kind)
        model.add_adapter("two", KINDS[kind](heads=[(1, 0)]))
        if generate:
            return model.generate(input_ids=tokens(), max_new_tokens=2, adapter_names=list(names))
        return (model.base_model if inner else model)(input_ids=tokens(), adapter_names=list(names))

    return call


def merged_then(after: Callable[[PeftModel, Path], Any]) -> Callable[[str, Path], Any]:
    def run(kind: str, folder: Path) -> Any:
        model = made(kind, "gpt2")
        model.save_pretrained(folder)
        model.merge_adapter()
        return after(model, folder)

    return run


def safe(kind: str, folder: Path) -> Any:
    model = made(kind, "gpt2", heads=[(0, 0), (1, 0)])
    model.add_adapter("broken", KINDS[kind](heads=[(0, 2), (1, 2)]))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith(".broken")).view(-1)[0] = float("nan")
    model.base_model.set_adapter(["default", "broken"])
    model.merge_adapter(safe_merge=True)


def too_large_for_half(kind: str, folder: Path) -> Any:
    model = made(kind, "gpt2")
    model.base_model.model.half()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "_gate" not in name:
                p.data = torch.full_like(p, 1e30, dtype=torch.float32)
    model.merge_and_unload(safe_merge=True)


def task_of_a_language_model(kind: str, folder: Path) -> Any:
    return get_peft_model(some_model("llama"), KINDS[kind](task_type="SEQ_CLS"))


def modules(*names: str) -> Callable[[str, Path], Any]:
    return lambda kind, folder: get_peft_model(some_model("llama"), KINDS[kind](modules_to_save=list(names)))


def other_head_merged(kind: str, folder: Path) -> Any:
    model = get_peft_model(task_model("gpt2", "SEQ_CLS", 1), KINDS[kind](task_type="SEQ_CLS"))
    model.add_adapter("two", KINDS[kind](heads=[(1, 0)], task_type="SEQ_CLS"))
    return model.merge_and_unload(adapter_names=["two"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("act", "words"),
    [
        brought(
            ADAPTERS,
            "an adapter's file that lacks a tensor",
            "which its configuration calls for",
            changed(lambda stored: stored.pop(first(stored))),
        ),
        brought(
            ADAPTERS,
            "an adapter's file that lacks all tensors of a layer",
            "which its configuration calls for",
            changed(lambda stored: [stored.pop(name) for name in list(stored) if "layers.1." in name]),
        ),
        brought(
            ADAPTERS,
            "an adapter's file with a tensor of a layer that it does not train",
            "which its configuration does not call for",
            changed(lambda stored: stored.update({"base_model.model.model.layers.7.alps_rows": torch.ones(2)})),
        ),
        brought(
            ADAPTERS,
            "an adapter's file with weights of the base in it (embeddings)",
            "which its configuration does not call for",
            changed(lambda stored: stored.update({"base_model.model.model.embed_tokens.weight": torch.zeros(64, 32)})),
        ),
        brought(
            ADAPTERS,
            "an adapter's file with fewer rows than its configuration has heads",
            "in another shape",
            changed(lambda stored: stored.update({first(stored): stored[first(stored)][:1]})),
        ),
        brought(
            ADAPTERS,
            "adapter_names in a forward pass, to mix adapters in a batch",
            "cannot be mixed by adapter_names",
            mixed("default", "two"),
        ),
        brought(
            ADAPTERS,
            "adapter_names in generate",
            "cannot be mixed by adapter_names",
            mixed("default", "two", generate=True),
        ),
        brought(
            ADAPTERS,
            "adapter_names with __base__",
            "cannot be mixed by adapter_names",
            mixed("__base__", "default"),
        ),
        brought(
            ADAPTERS,
            "adapter_names handed to the tuner inside the PEFT model",
            "cannot be mixed by adapter_names",
            mixed("default", "default", inner=True),
        ),
        brought(
            ADAPTERS,
            "an adapter to merge that does not exist",
            "There is no adapter 'defualt': did you mean 'default'",
            lambda kind, folder: made(kind).merge_adapter(["defualt"]),
        ),
        brought(
            ADAPTERS,
            "adapters to activate of which one does not exist",
            "There is no adapter 'tow'",
            lambda kind, folder: made(kind).base_model.set_adapter(["default", "tow"]),
        ),
        brought(
            ADAPTERS,
            "an adapter to merge, given as a word instead of a list",
            "given as a list",
            lambda kind, folder: made(kind).merge_and_unload(adapter_names="default"),
        ),
        brought(
            ADAPTERS,
            "new tensors for an adapter while it is merged",
            "call unmerge_adapter",
            merged_then(lambda model, folder: model.load_adapter(folder, "default")),
        ),
        brought(
            ADAPTERS,
            "safe_merge of two adapters of which the second holds NaN",
            "Merging broken would write NaN or infinite weights",
            safe,
        ),
        brought(
            ADAPTERS,
            "safe_merge of weights too large for the base's float16",
            "would write NaN or infinite weights",
            too_large_for_half,
        ),
        brought(
            ADAPTERS,
            "task_type SEQ_CLS for a language model without such a head",
            "with a new head",
            task_of_a_language_model,
        ),
        brought(
            ADAPTERS,
            "modules_to_save with a misspelt module",
            "There is no module 'lm_haed' in this model",
            modules("lm_haed"),
        ),
        brought(
            ADAPTERS,
            "modules_to_save with the attention that the adapter trains heads of",
            "holds heads that the adapter trains itself",
            modules("self_attn"),
        ),
        brought(
            ADAPTERS,
            "modules_to_save given as a word instead of a list",
            "takes a list of names",
            lambda kind, folder: KINDS[kind](modules_to_save="lm_head"),
        ),
        brought(
            ADAPTERS,
            "an adapter with a classification head merged while another one is active",
            "has modules of its own",
            other_head_merged,
        ),
    ],
)
def test_refused(kind: str, act: Callable[[str, Path], Any], words: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(UserError, match=words.replace("(", r"\(")) as error:
            act(kind, tmp_path)
    assert "\n" not in str(error.value)


def same_rows(folder: Path) -> None:
    model = made()
    model.add_adapter("two", AlpsConfig(heads=[(0, 1)]))
    before = state(model)
    model.merge_adapter()
    merged = state(model)
    with pytest.raises(UserError, match="train the same heads or groups"):
        model.merge_adapter(["two"])
    assert all(torch.equal(value, merged[name]) for name, value in state(model).items())
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def unloaded(folder: Path) -> None:
    model = made()
    model.merge_adapter()
    base = some_model("llama").state_dict()
    assert all(torch.equal(value, base[name]) for name, value in model.unload().state_dict().items())


def twice(folder: Path) -> None:
    model = made("jola", "gpt2")
    once = logits(model)
    model.base_model.set_adapter(["default", "default"])
    assert torch.equal(logits(model), once)
    model.merge_adapter(["default", "default"])
    torch.testing.assert_close(logits(model), once, rtol=1e-4, atol=1e-5)


def some_merged(folder: Path) -> None:
    """Their layers differ: one is in layer 0, the other in layer 1."""
    model = made(heads=[(0, 0)])
    alone = logits(model)
    model.add_adapter("two", AlpsConfig(heads=[(1, 0)]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".two"):
                p.add_(0.1)
    model.base_model.set_adapter(["default", "two"])
    both = logits(model)
    with pytest.warns(UserWarning, match="active adapters two are not merged"):
        model.merge_adapter(["default"])
    assert torch.equal(logits(model), alone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(["two"])
    assert torch.equal(logits(model), both)


def deleted(folder: Path) -> None:
    model = made()
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["default"]


def named_like_its_tensors(folder: Path) -> None:
    for kind, name in (("rows", "alps"), ("rows", "rows"), ("jola", "jola_scale"), ("lofit", "lofit_")):
        model = made(kind)
        model.save_pretrained(folder / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = PeftModel.from_pretrained(some_model("llama"), folder / name, adapter_name=name)
        assert torch.equal(logits(again.eval()), logits(model))


def inference_mode(folder: Path) -> None:
    model = get_peft_model(some_model("llama"), AlpsConfig(heads=[(0, 0)], inference_mode=True))
    assert not any(p.requires_grad for p in model.parameters())
    model.add_adapter("two", AlpsConfig(heads=[(1, 0)]))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "two" not in n)


def one_configuration(folder: Path) -> None:
    config = AlpsConfig(heads=[(0, 0)])
    for seed in (0, 1):
        model = get_peft_model(some_model("llama", seed=seed), config)
        assert model.peft_config["default"].fingerprint == fingerprint(some_model("llama", seed=seed))
    assert config == AlpsConfig(heads=[(0, 0)])


def added_while_merged(folder: Path) -> None:
    model = made()
    model.merge_adapter()
    model.add_adapter("two", AlpsConfig(heads=[(0, 0)], task_type="CAUSAL_LM"))
    model.unmerge_adapter()
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(some_model("llama"), folder / "two").eval()
    assert torch.equal(logits(loaded), logits(some_model("llama")))


def classification(folder: Path) -> None:
    for kind in KINDS:
        model = get_peft_model(task_model("llama", "SEQ_CLS", 1), KINDS[kind](task_type="SEQ_CLS"))
        train_task(model)
        model.save_pretrained(folder / kind)
        loaded = PeftModel.from_pretrained(task_model("llama", "SEQ_CLS", 2), folder / kind)
        assert torch.equal(answers(loaded.eval()), answers(model.eval()))


def in_training_mode(folder: Path) -> None:
    model = get_peft_model(some_model("llama_mha_bias"), JolaConfig(init_std=0.5)).eval()
    expected = logits(model)
    torch.testing.assert_close(logits(model.train().merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def scale_then_offset(folder: Path) -> None:
    model = get_peft_model(some_model("opt"), LofitConfig(stage="offset", init_std=0.3)).eval()
    model.add_adapter("scale", LofitConfig(stage="scale", init_std=0.3))
    model.base_model.set_adapter(["default", "scale"])
    active = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(["default"])
        model.merge_adapter(["scale"])
    torch.testing.assert_close(logits(model), active, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("act", "happens"),
    [
        brought(
            ADAPTERS,
            "edits of two adapters merged one after the other",
            "the same as both active at once, in the order of merging",
            scale_then_offset,
        ),
        brought(ADAPTERS, "JoLA merged in training mode", "its gates are folded in as in evaluation", in_training_mode),
        brought(
            ADAPTERS,
            "two adapters of the same heads merged one after the other",
            "the second is refused, and the first stays as it was",
            same_rows,
        ),
        brought(ADAPTERS, "unload() while an adapter is merged", "the base's own weights come back", unloaded),
        brought(ADAPTERS, "an adapter named twice, to activate or to merge", "it counts once", twice),
        brought(
            ADAPTERS,
            "some of the active adapters merged",
            "the merged ones alone are in use in every layer, with a warning",
            some_merged,
        ),
        brought(ADAPTERS, "a merged adapter to delete", "refused by peft until it is unmerged", deleted),
        brought(
            ADAPTERS,
            "an adapter named like its tensors (alps, jola_scale)",
            "it loads as any other",
            named_like_its_tensors,
        ),
        brought(ADAPTERS, "inference_mode in a configuration", "nothing is trained", inference_mode),
        brought(
            ADAPTERS,
            "one configuration for two bases",
            "it stays as it was, and serves both",
            one_configuration,
        ),
        brought(
            ADAPTERS,
            "an adapter added while another one is merged",
            "it starts from the base and loads onto it",
            added_while_merged,
        ),
        brought(
            ADAPTERS,
            "an adapter with task_type SEQ_CLS",
            "its new head is trained and saved with it",
            classification,
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Adapter cannot be set", "ignore:Already following adapters were merged")
def test_works(act: Callable[[Path], None], happens: str, tmp_path: Path) -> None:
    act(tmp_path)
