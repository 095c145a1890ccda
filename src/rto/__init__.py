"""rto: dense-reward RLHF. From preference pairs to a policy trained on token rewards.

The public names, in stage order. They are imported on first use, so that ``import rto`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load_recipe": ("rto.recipe", "load"),
    "build_recipe": ("rto.recipe", "build"),
    "Config": ("rto.config", "Config"),
    "run": ("rto.pipeline", "run"),
    "sft": ("rto.pipeline", "sft"),
    "prefer": ("rto.pipeline", "prefer"),
    "reward": ("rto.pipeline", "reward"),
    "rl": ("rto.pipeline", "rl"),
    "generate": ("rto.pipeline", "generate"),
    "evaluate": ("rto.pipeline", "evaluate"),
    "report": ("rto.pipeline", "report"),
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rto' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)
