"""The one exception that the package raises on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What was asked for cannot be done; the message is one sentence with what is wrong and what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that refuses `word`: the closest known word, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known are: {', '.join(known)}."


def one_of(what: str, word: str, known: Iterable[str]) -> None:
    """Raise `UserError` unless `word` is one of `known`; `what` names its kind ("metric", "method", ...)."""
    known = list(known)
    if word not in known:
        raise UserError(f"There is no {what} '{word}': {nearest(str(word), known)}")
