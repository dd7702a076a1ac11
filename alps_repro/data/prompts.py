"""Prompt template, tokenizing and collating, the same in training and evaluation; limits on the length of texts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alps_repro.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


#: Share of a run's rows or prompts that may lose text before the run stops.
MAX_LOST = 0.05

#: Names of the number of positions in configurations, in the order in which they are tried.
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without special tokens before or after it.

    A special token that the text spells out ("</s>" in a row of data) is read as text, not as the token, which would
    end a prompt in the middle.
    """
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)


def beginning(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before every text: usually none, or a beginning-of-text token.

    What it appends to a text (an end token, a separator) is left out wherever an answer follows.

    Raises:
        UserError: a text's own tokens depend on whether special tokens are added.
    """
    probe = "Below is an instruction"
    alone, whole = encode(tokenizer, probe), tokenizer.encode(probe, split_special_tokens=True)
    places = range(len(whole) - len(alone) + 1)
    first = next((i for i in places if whole[i : i + len(alone)] == alone), None)
    if first is None:
        raise UserError(
            "The tokenizer splits a text differently when it adds its special tokens, so that prompt and answer "
            "cannot be joined: use another tokenizer of this model."
        )
    return whole[:first] if alone else []


def positions(config: Any) -> int | None:
    """The number of a model's positions by its configuration; None if that has none.

    A tokenizer's `model_max_length` is not used: it may be another model's, or arbitrary.
    """
    text = config.get_text_config()
    numbers = (getattr(text, name, None) for name in _POSITIONS)
    return next((int(number) for number in numbers if isinstance(number, int) and number > 0), None)


def said_lost(rows: dict[str, int]) -> str:
    """A phrase about lost text; empty if there is none.

    Args:
        rows: counts as in `Finetuned.rows`: given, cut, dropped, empty, and `max_length` in tokens.
    """
    parts = [
        (rows["cut"], f"cut at {rows['max_length']} tokens"),
        (rows["dropped"], f"dropped, their prompts leaving no room for an answer in {rows['max_length']} tokens"),
        (rows["empty"], "without an instruction or without a response"),
    ]
    said = [f"{number} {what}" for number, what in parts if number]
    return f"of {rows['given']} rows, {', '.join(said)}" if said else ""


#: The Alpaca template without its input field (ALPS, appendix; see docs/deviations.md for the last line break).
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

#: Label of tokens that are not loss tokens.
IGNORED = -100


def tokenize(examples: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """Columns `input_ids` and `prompt_length`: Alpaca prompt, response and end token, truncated at `max_length`.

    Prompt and response are tokenized separately, as in generation, with nothing between them, whatever the tokenizer
    appends to a text. Examples whose prompt leaves no room for an answer are left out.
    """
    return tokenize_and_count(examples, tokenizer, max_length)[0]


def tokenize_and_count(examples: Dataset, tokenizer: Any, max_length: int) -> tuple[Dataset, dict[str, int]]:
    """What `tokenize` returns, and counts of the examples as in `Finetuned.rows`."""
    for column in ("instruction", "response"):
        if column not in examples.column_names:
            raise UserError(f"The training examples lack the column '{column}': give rows of instruction and response.")
    first = beginning(tokenizer)
    special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)) or r"(?!)")

    def row_of(row: dict[str, str]) -> dict[str, Any]:
        instruction, response = row["instruction"], row["response"]
        prompt = [*first, *encode(tokenizer, PROMPT.format(instruction=instruction))]
        answer = encode(tokenizer, response)
        ids = [*prompt, *answer, tokenizer.eos_token_id]
        dropped = len(prompt) >= max_length
        return {
            "input_ids": ids[:max_length],
            "prompt_length": len(prompt),
            "cut": not dropped and len(ids) > max_length,
            "dropped": dropped,
            "empty": not dropped and not (instruction.strip() and response.strip() and answer),
            "special": bool(special.search(instruction) or special.search(response)),
        }

    encoded = examples.map(row_of, remove_columns=examples.column_names, desc="tokenizing")
    counts = {name: sum(encoded[name][:]) for name in ("cut", "dropped", "empty", "special")}
    kept = encoded.filter(lambda row: not row["dropped"], desc="dropping overlong prompts")
    if not len(kept):
        raise UserError(
            f"No example's prompt fits into max_length {max_length}: raise it, or use a model with more positions."
        )
    rows = {"given": len(encoded), "used": len(kept), **counts, "max_length": max_length}
    return kept.remove_columns(list(counts)), rows


def longest(model: PreTrainedModel, requested: int) -> int:
    """Maximal tokens of a row: the requested number, but no more than the model has positions."""
    return min(requested, positions(model.config) or requested)


def check_rows(rows: dict[str, int], max_lost: float, what: str = "training examples") -> None:
    """Warn about rows that lose text.

    Args:
        rows: as `tokenize_and_count` returns them.
        max_lost: share of them that may be truncated, dropped or empty.
        what: the rows, for messages.

    Raises:
        UserError: more rows lose text.
    """
    said = said_lost(rows)
    if rows["cut"] + rows["dropped"] + rows["empty"] > max_lost * rows["given"]:
        raise UserError(
            f"Too many of the {what} would lose text ({said}), and max_lost allows {max_lost:.3g} of them: choose or "
            "correct them, raise max_length if the model has the positions, or set max_lost to 1 to go on."
        )
    if said:
        warnings.warn(f"Some of the {what} lose text: {said}.", stacklevel=4)
    if rows["special"]:
        warnings.warn(
            f"{rows['special']} of the {what} spell out special tokens of the tokenizer, which are read as text.",
            stacklevel=4,
        )


@dataclass(frozen=True)
class Collate:
    """Makes batches, padded on the left, for which the model computes only the logits that are needed.

    The output layer takes about a quarter of a small model's step; with the answers at the right edge, only the last
    `logits_to_keep` positions have to pass through it. Labels are cut to these, so that the model's own loss applies.

    Attributes:
        pad_token_id: the tokenizer's.
        loss_on: loss tokens: the `response`'s, or the `prompt`'s too.
    """

    pad_token_id: int
    loss_on: str

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.pad_token_id)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED)
        keep = 1
        for i, row in enumerate(rows):
            tokens = torch.tensor(row["input_ids"])
            start = width - len(tokens)
            ids[i, start:], mask[i, start:] = tokens, 1
            first = row["prompt_length"] if self.loss_on == "response" else 1
            labels[i, start + first :] = tokens[first:]
            keep = max(keep, len(tokens) - first + 1)
        # One logit before the first answer token predicts it. Positions count from the first real token.
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "labels": labels[:, -keep:],
            "logits_to_keep": keep,
        }
