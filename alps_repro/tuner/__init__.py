"""Selected attention heads as a PEFT tuner; importing this module registers it with `peft`."""

from peft.utils import register_peft_method

from alps_repro.tuner.config import NAME, AlpsConfig
from alps_repro.tuner.layer import ROWS, AlpsLayer
from alps_repro.tuner.model import AlpsModel, fingerprint

register_peft_method(name=NAME.lower(), config_cls=AlpsConfig, model_cls=AlpsModel, prefix=AlpsModel.prefix)

__all__ = ["ROWS", "AlpsConfig", "AlpsLayer", "AlpsModel", "fingerprint"]
