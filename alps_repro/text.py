"""How text becomes tokens, in training and in evaluation alike, and how much of it a model can take."""

from __future__ import annotations

from typing import Any

from alps_repro.errors import UserError

#: Share of a run's rows or prompts that may lose text before the run stops.
MAX_LOST = 0.05

#: What configurations call the number of positions, in the order in which they are asked.
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, with nothing before or behind it.

    A special token that the text spells out ("</s>" in a row of data) is read as text, not as the token: it would end
    a prompt in the middle.
    """
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)


def beginning(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before every text: mostly nothing, or a beginning token.

    What it puts behind a text (an end token, a separator) is left out wherever an answer follows.
    """
    probe = "Below is an instruction"
    alone, whole = encode(tokenizer, probe), tokenizer.encode(probe, split_special_tokens=True)
    places = range(len(whole) - len(alone) + 1)
    first = next((i for i in places if whole[i : i + len(alone)] == alone), None)
    if first is None:
        raise UserError(
            "The tokenizer makes other tokens of a text once it adds its special tokens, so that prompt and answer "
            "cannot be joined: use another tokenizer of this model."
        )
    return whole[:first] if alone else []


def positions(config: Any) -> int | None:
    """How many tokens a model can take at once, by its configuration; None where that says nothing.

    A tokenizer's `model_max_length` is no answer: it may be of another model, or mean nothing.
    """
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _POSITIONS)
    return next((int(number) for number in found if isinstance(number, int) and number > 0), None)


def said_lost(rows: dict[str, int]) -> str:
    """A phrase of what rows lost, as `Finetuned.rows` counts it; empty where nothing did.

    rows: given, cut, dropped, empty, and `max_length`, the tokens that a row may have.
    """
    parts = [
        (rows["cut"], f"cut at {rows['max_length']} tokens"),
        (rows["dropped"], f"dropped, their prompts leaving no room for an answer in {rows['max_length']} tokens"),
        (rows["empty"], "without an instruction or without a response"),
    ]
    said = [f"{number} {what}" for number, what in parts if number]
    return f"of {rows['given']} rows, {', '.join(said)}" if said else ""
