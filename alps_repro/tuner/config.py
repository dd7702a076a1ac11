"""What an ALPS adapter is: a list of heads and the base it belongs to."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from alps_repro.errors import UserError
from alps_repro.heads import HeadSelection

#: The name under which peft knows the tuner.
NAME = "ALPS"


def _add_peft_type() -> PeftType:
    """Add `PeftType.ALPS`.

    `peft.utils.register_peft_method` takes only names that stand in this enum, and an enum with members cannot be
    subclassed, so the member is made by hand. This is the one place that depends on how peft and `enum` work
    inside; if `tests/test_tuner.py::test_registration` fails after an upgrade of peft, look here.
    """
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    # Python 3.11 finds members through the map above, 3.12 and later as attributes, which `EnumType` would not let
    # be set under a member's name.
    type.__setattr__(PeftType, NAME, member)
    return member


PEFT_TYPE = _add_peft_type()


@dataclass
class AlpsConfig(PeftConfig):
    """Train only the rows of the selected heads.

    heads: (layer, head) pairs counted from 0, or a `HeadSelection`. Their query rows and the key and value rows of
        the groups they read are trained, biases of those rows included.
    fingerprint: of the base model (see `alps_repro.tuner.model.fingerprint`); filled in when the adapter is made, and
        checked when it is loaded.
    target_modules: the projections that hold those rows; filled in from the model, as for other tuners.
    """

    heads: Iterable[tuple[int, int]] = field(default_factory=tuple)
    fingerprint: dict[str, Any] | None = None
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        pairs = self.heads.heads if isinstance(self.heads, HeadSelection) else self.heads
        try:
            self.heads = sorted({(operator.index(layer), operator.index(head)) for layer, head in pairs})
        except (TypeError, ValueError):
            raise UserError("AlpsConfig(heads=...) takes (layer, head) pairs, counted from 0.") from None
        if not self.heads:
            raise UserError("AlpsConfig(heads=...) got no head: select at least one.")
