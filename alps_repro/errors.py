"""The one exception that the package raises on purpose."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable


class UserError(ValueError):
    """A request that cannot be fulfilled; the message is one sentence with what is wrong and what to do."""

    def __init__(self, sentence: object) -> None:
        super().__init__(" ".join(str(sentence).splitlines()))  # quoted text may contain line breaks


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message about `word`: the closest known word, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known are: {', '.join(known)}."


def one_of(what: str, word: str, known: Iterable[str]) -> str:
    """Check that a word is known.

    Args:
        what: kind of the word ("metric", "method", ...).
        word: the word.
        known: all words of this kind.

    Returns:
        The word.

    Raises:
        UserError: it is not known.
    """
    known = list(known)
    if word not in known:
        raise UserError(f"There is no {what} '{word}': {nearest(str(word), known)}")
    return word


def explained(error: BaseException) -> UserError | None:
    """An error due to the machine's limits (memory, disk, permission to write) as a `UserError`; None for all others.

    Libraries raise errors of their own on top of the system's, so an error's causes are checked, too.
    """
    if isinstance(error, UserError):
        return None
    text, number = str(error), getattr(error, "errno", None)
    out_of_memory = "out of memory|can't allocate memory|Cannot allocate memory|std::bad_alloc"
    if isinstance(error, MemoryError) or re.search(out_of_memory, text):
        return UserError(
            "There is not enough memory: lower micro_batch_size, set gradient_checkpointing, or load the base with "
            "quantization '4bit' in scope 'heads'."
        )
    # torch's file writer only reports that a file is not as long as it should be.
    disk_full = "No space left|os error 28|inline_container.*unexpected pos|PytorchStreamWriter failed"
    if number in (errno.ENOSPC, errno.EDQUOT) or re.search(disk_full, text):
        return UserError("The disk is full: make room, or choose a results folder elsewhere; then run again.")
    if number in (errno.EROFS, errno.EACCES, errno.EPERM) or "Read-only file system" in text:
        return UserError(f"A folder cannot be written ({text[:120]}): choose another results folder.")
    cause = error.__cause__ or error.__context__
    return explained(cause) if cause is not None else None
