"""ALPS (arXiv 2505.18799), reproduced: find the attention heads that carry a task, fine-tune only those, evaluate.

Importing this package is cheap: torch, transformers, peft and lm-eval are imported when they are used.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alps_repro.checkpoints import load_model
    from alps_repro.errors import UserError
    from alps_repro.evaluation import Evaluation, evaluate
    from alps_repro.heads import HeadLayout, HeadSelection
    from alps_repro.recipe import Profile, Recipe, check_parameters
    from alps_repro.runs import embed_run, evaluate_run, finetune_run, importance_run, localize_run, recall_run
    from alps_repro.scores import HeadScores, localize
    from alps_repro.training import Finetuned, finetune
    from alps_repro.tuner import AlpsConfig, JolaConfig, LofitConfig

_WHERE = {
    "AlpsConfig": "tuner",
    "Evaluation": "evaluation",
    "Finetuned": "training",
    "HeadLayout": "heads",
    "HeadScores": "scores",
    "HeadSelection": "heads",
    "JolaConfig": "tuner",
    "LofitConfig": "tuner",
    "Profile": "recipe",
    "Recipe": "recipe",
    "UserError": "errors",
    "check_parameters": "recipe",
    "evaluate": "evaluation",
    "embed_run": "runs",
    "evaluate_run": "runs",
    "finetune": "training",
    "finetune_run": "runs",
    "importance_run": "runs",
    "load_model": "checkpoints",
    "localize": "scores",
    "localize_run": "runs",
    "recall_run": "runs",
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
