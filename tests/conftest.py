"""Shared by all tests: no network, a separate cache, runs of a few steps, tiny models."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "WANDB_MODE": "offline"}
# tests run two at a time; OpenMP threads that spin on too few cores cost seconds a step
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "GOMP_SPINCOUNT": "0"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from absl import logging as absl_logging

ROOT = Path(__file__).parent.parent
QUICK = ["train.max_steps=3", "samples.rows=4", "samples.max_new_tokens=8", "data.max_rows=64"]
QUICK += ["data.max_eval_rows=16", "report=null"]
QUICK += ["train.per_device_train_batch_size=4"]  # some processors compute bfloat16 slowly
FLOAT32 = "quant.compute_dtype=float32"

# absl closes its stream whenever logging is configured, but not this one; else it is pytest's own
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__


def computes_bfloat16_fast() -> bool:
    """Return whether bfloat16 does not take this processor ten times as long as float32."""
    from lora_exp.model.processor import processor

    return "avx512bw" in processor().get("flags", "").split()


def in_fast_dtype(*overrides: str) -> tuple[str, ...]:
    """Return overrides of a run whose 4-bit layers compute fast, if they do not say in what dtype.

    That is the default, bfloat16, or float32 where bfloat16 takes minutes. Tests for which it is
    essential name it.
    """
    says = any(override.startswith("quant.compute_dtype") for override in overrides)
    keeps = says or "quant=nf4" not in overrides or computes_bfloat16_fast()
    return overrides if keeps else (*overrides, FLOAT32)


SLOWEST = (  # files that take minutes
    "lockstep/test_launcher.py", "test_faults.py", "lockstep/test_processors.py",
    "lockstep/test_interrupted_sweeps.py",
    "training/test_interruption.py", "algorithm/test_algorithms.py", "after/test_merging.py",
    "test_experiment.py", "training/test_checkpoint.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slowest files, so that no process is left with one at the end."""
    order = {ROOT / "tests" / name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the processor: exact comparisons hold for its bits only."""
    from lora_exp.model.processor import capability

    terminalreporter.write_line(f"on {capability()}")


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["LORA_EXP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Spare garbage collection what earlier files imported: trainers ask for it several times."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """Silence libraries as commands do; else warnings depend on the order of the tests."""
    from lora_exp.record.progress import quiet

    quiet()


@pytest.fixture
def quick_run(tmp_path: Path) -> Callable[..., Any]:
    """Compose and run a few steps into tmp_path, without W&B unless asked for."""
    from lora_exp import compose, run

    def run_quickly(*overrides: str, name: str = "run") -> Any:
        return run(compose("tracking=none", *QUICK, *in_fast_dtype(*overrides)), tmp_path / name)

    return run_quickly


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train enough to differ from the base; equal overrides share one run."""
    from lora_exp import compose, run

    directories: dict[tuple[str, ...], Path] = {}

    def train(*overrides: str) -> Path:
        if overrides not in directories:
            own_data = any(override.startswith("data=") for override in overrides)
            quick = [key for key in QUICK if not (own_data and key.startswith("data."))]
            longer = ["train.max_steps=12", "train.learning_rate=3e-3"]
            cfg = compose("tracking=none", *quick, *longer, *in_fast_dtype(*overrides))
            directories[overrides] = run(cfg, tmp_path_factory.mktemp("trained") / "run").directory
        return directories[overrides]

    return train


def tiny(quantization: Any = None, **settings: Any) -> Any:
    """Load the embedded model with the given quantisation and settings."""
    from lora_exp.model.loading import load

    defaults = {
        "revision": None, "gguf_file": None, "dtype": "float32", "attn_implementation": "auto",
        "trust_remote_code": False, "random_weights": False, "path": "pkg://lora_exp/assets/tiny",
    }  # fmt: skip
    return load(quantization=quantization, **(defaults | settings))


@pytest.fixture(scope="session")
def base() -> Any:
    """The embedded model; tests must not change it."""
    return tiny()


@pytest.fixture
def fresh_base() -> Any:
    """The embedded model; tests may change it."""
    return tiny()


@pytest.fixture
def t5(tmp_path: Path, base: Any) -> Path:
    """A tiny encoder-decoder model of random weights, with the embedded tokenizer."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=512, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    base.tokenizer.save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


@pytest.fixture
def folder_of(tmp_path: Path, base: Any) -> Callable[[Any], Path]:
    """Save a model of a config, with random weights and the embedded tokenizer."""
    import torch

    from lora_exp.model.text_part import class_of

    def save(config: Any) -> Path:
        torch.manual_seed(0)
        folder = tmp_path / type(config).__name__
        class_of(config, "CAUSAL_LM", whole=True).from_config(config).save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run a cluster, and have all commands know it."""
    from tests.slurm import cluster, obstacle

    if why := obstacle():
        pytest.skip(why)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            with cluster(tmp_path_factory.mktemp("slurm")) as config:
                patch.setenv("SLURM_CONF", str(config))
                yield
        except RuntimeError as error:
            pytest.skip(str(error))
