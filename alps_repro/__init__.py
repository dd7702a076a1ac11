"""ALPS (arXiv 2505.18799), reproduced: find the attention heads that carry a task, fine-tune only those, evaluate.

Importing this package is cheap: torch, transformers, peft and lm-eval are imported when they are used.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alps_repro.errors import UserError
    from alps_repro.evaluation.harness import Evaluation, evaluate
    from alps_repro.experiments.notebooks import check_parameters
    from alps_repro.experiments.profile import Profile
    from alps_repro.experiments.runs import (
        embed_run,
        evaluate_run,
        finetune_run,
        importance_run,
        localize_run,
        recall_run,
    )
    from alps_repro.heads.layout import HeadLayout
    from alps_repro.heads.selection import HeadSelection
    from alps_repro.localization.scores import HeadScores, localize
    from alps_repro.models.loading import load_model
    from alps_repro.training.finetune import Finetuned, finetune
    from alps_repro.training.recipe import Recipe
    from alps_repro.tuner.jola import JolaConfig
    from alps_repro.tuner.lofit import LofitConfig
    from alps_repro.tuner.rows import AlpsConfig

_WHERE = {
    "AlpsConfig": "tuner.rows",
    "Evaluation": "evaluation.harness",
    "Finetuned": "training.finetune",
    "HeadLayout": "heads.layout",
    "HeadScores": "localization.scores",
    "HeadSelection": "heads.selection",
    "JolaConfig": "tuner.jola",
    "LofitConfig": "tuner.lofit",
    "Profile": "experiments.profile",
    "Recipe": "training.recipe",
    "UserError": "errors",
    "check_parameters": "experiments.notebooks",
    "evaluate": "evaluation.harness",
    "embed_run": "experiments.runs",
    "evaluate_run": "experiments.runs",
    "finetune": "training.finetune",
    "finetune_run": "experiments.runs",
    "importance_run": "experiments.runs",
    "load_model": "models.loading",
    "localize": "localization.scores",
    "localize_run": "experiments.runs",
    "recall_run": "experiments.runs",
}

__all__ = sorted(_WHERE)
__version__ = "0.1.0"


# Its first words on a CPU are about an optional kernel that nothing here needs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"alps_repro.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'alps_repro' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
