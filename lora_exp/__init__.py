"""lora-exp: compose, train and compare fine-tuning runs.

from lora_exp import compare, compose, load_adapter, run
result = run(compose("peft.r=8", "quant=nf4"))
model, tokenizer = load_adapter(result.saved)
rows = compare("multirun/2026-11-22", against=result.directory).rows()
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from lora_exp import libraries

if TYPE_CHECKING:
    from lora_exp.after.loading import load_adapter
    from lora_exp.comparison.value import compare
    from lora_exp.config.composition import compose
    from lora_exp.experiment import run

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # trl would ping for every trainer
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # and forked tokenizers warn
# it misses an optional kernel, aloud, and warns of a cast at every int8 product
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__all__ = ["compare", "compose", "load_adapter", "run"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what is asked for, and with it what it needs: torch, for `run` and `load_adapter`."""
    if name == "compose":
        from lora_exp.config.composition import compose

        return compose
    if name == "compare":
        from lora_exp.comparison.value import compare

        return compare
    if name == "run":
        libraries.load()
        from lora_exp.experiment import run

        return run
    if name == "load_adapter":
        libraries.load(training=False)
        from lora_exp.after.loading import load_adapter

        return load_adapter
    raise AttributeError(f"module 'lora_exp' has no attribute {name!r}")
