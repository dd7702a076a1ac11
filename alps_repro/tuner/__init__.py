"""Tuners of attention heads for PEFT; importing this package registers them with `peft`.

`AlpsConfig` trains the weights of selected heads; `JolaConfig` and `LofitConfig` edit per-head attention outputs.
"""

from peft.utils import register_peft_method

from alps_repro.tuner import jola, lofit, rows
from alps_repro.tuner.base import add_peft_type

for name, config, model in (
    (rows.NAME, rows.AlpsConfig, rows.AlpsModel),
    (jola.NAME, jola.JolaConfig, jola.JolaModel),
    (lofit.NAME, lofit.LofitConfig, lofit.LofitModel),
):
    add_peft_type(name)
    register_peft_method(name=name.lower(), config_cls=config, model_cls=model, prefix=model.prefix)
