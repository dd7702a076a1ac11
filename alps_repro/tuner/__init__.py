"""Tuners of attention heads for PEFT; importing this module registers them with `peft`.

`AlpsConfig` trains the weights of selected heads; `JolaConfig` and `LofitConfig` edit the results of heads.
"""

from peft.utils import register_peft_method

from alps_repro.tuner import jola, lofit, rows
from alps_repro.tuner.base import add_peft_type, fingerprint
from alps_repro.tuner.jola import JolaConfig, JolaModel, gate_weight
from alps_repro.tuner.lofit import LofitConfig, LofitModel
from alps_repro.tuner.rows import ROWS, AlpsConfig, AlpsLayer, AlpsModel

for name, config, model in (
    (rows.NAME, AlpsConfig, AlpsModel),
    (jola.NAME, JolaConfig, JolaModel),
    (lofit.NAME, LofitConfig, LofitModel),
):
    add_peft_type(name)
    register_peft_method(name=name.lower(), config_cls=config, model_cls=model, prefix=model.prefix)

__all__ = [
    "ROWS",
    "AlpsConfig",
    "AlpsLayer",
    "AlpsModel",
    "JolaConfig",
    "JolaModel",
    "LofitConfig",
    "LofitModel",
    "fingerprint",
    "gate_weight",
]
