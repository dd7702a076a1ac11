"""The one exception that the package raises on purpose."""

from __future__ import annotations

import difflib
import errno
import re
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


def explained(error: BaseException) -> UserError | None:
    """What a machine's limits did to a run, as a sentence: no memory, no disk, no leave to write. None for the rest."""
    text = str(error)
    out_of_memory = "out of memory|can't allocate memory|Cannot allocate memory|std::bad_alloc"
    if isinstance(error, MemoryError) or re.search(out_of_memory, text):
        return UserError(
            "The memory does not suffice: lower micro_batch_size, set gradient_checkpointing, or load the base with "
            "quantization '4bit' in scope 'heads'."
        )
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in text or "os error 28" in text:
        return UserError("The disk is full: make room, or choose a results folder elsewhere; then run again.")
    if number in (errno.EROFS, errno.EACCES, errno.EPERM) or "Read-only file system" in text:
        return UserError(f"A folder cannot be written ({text[:120]}): choose another results folder.")
    return None
