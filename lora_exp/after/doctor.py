"""Whether this machine can train, and what to do where it cannot; nothing is changed."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lora_exp.record.console import size

NAME = "lora-exp"
ROOM = 5 * 2**30  # bytes; a run of a 7B model with its checkpoints takes about that
DRIVER = Path("/proc/driver/nvidia/version")
LOST = 0.15  # of a product in 4 bits, relative; nf4 rounds normal weights by about 0.09


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it stands, and what to do about it."""

    state: Literal["ok", "warning", "wrong", "known"]  # known: neither good nor bad
    what: str
    told: str


def examine() -> list[Finding]:
    """Look at everything that a run stands on."""
    found: list[Finding] = []
    for look in (_python, _packages, _extras, _gpu, _bitsandbytes, _wandb, _hub, _caches, _machine):
        try:
            found += look()
        except (ImportError, OSError) as error:  # a package is not there, or its library broken
            told = f"cannot be looked at: {_line(error)}"
            found.append(Finding("wrong", look.__name__.removeprefix("_"), told))
    return found


def _python() -> Iterator[Finding]:
    wanted, here = SpecifierSet(metadata(NAME)["Requires-Python"]), platform.python_version()
    if wanted.contains(here, prereleases=True):
        yield Finding("ok", "python", here)
    else:
        yield Finding("wrong", "python", f"{here}, not {wanted}; make an environment with it")


def _packages() -> Iterator[Finding]:
    """Hold the installed packages against the versions that this release takes."""
    for needed in _required(""):
        cure = f"pip install '{needed.name}{needed.specifier}'"
        here = _version(needed.name)
        if here is None:
            yield Finding("wrong", needed.name, f"is missing; {cure}")
        elif needed.specifier.contains(here, prereleases=True):
            yield Finding("ok", needed.name, here)
        else:
            yield Finding("wrong", needed.name, f"{here} is not {needed.specifier}; {cure}")


def _required(extra: str) -> Iterator[Requirement]:
    """Yield what this package says it needs for an extra; the empty one: always."""
    for needed in map(Requirement, requires(NAME) or ()):
        marker = needed.marker
        if marker.evaluate({"extra": extra}) if marker else not extra:
            yield needed


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _extras() -> Iterator[Finding]:
    for extra, use in {"eval": "ROUGE and BLEU", "serve": "lora-exp serve"}.items():
        lost = [needed.name for needed in _required(extra) if _version(needed.name) is None]
        told = f"pip install '{NAME}[{extra}]' brings {', '.join(lost)}, for {use}"
        yield Finding("known", f"extra {extra}", told if lost else "installed")
    yield Finding("known", "vllm", _version("vllm") or "not installed; a faster engine for serve")


def _gpu() -> Iterator[Finding]:
    import torch

    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        emulated = not torch.cuda.is_bf16_supported(including_emulation=False)
        kind = "no bfloat16 of its own" if emulated else "bfloat16"
        yield Finding("ok", f"GPU {i}", f"{found.name}, {size(found.total_memory)}, {kind}")
    if torch.cuda.is_available():
        return
    if DRIVER.exists():
        text = f"there is an NVIDIA driver, but torch {torch.__version__} does not see a GPU"
        yield Finding("warning", "GPU", f"{text}; install torch's build for CUDA")
    else:
        yield Finding("known", "GPU", "none; runs train on the CPU")


def _bitsandbytes() -> Iterator[Finding]:
    """Multiply by weights in 4 bits and compare with the product in floats."""
    try:
        lost, device = _product_in_4_bits()
    except (RuntimeError, AttributeError, ValueError) as error:
        told = f"{_line(error)}; quant=none works without bitsandbytes"
        yield Finding("wrong", "4 bits", told)
        return
    told = f"a product on {device} is {lost:.3f} off"
    if lost < LOST:
        yield Finding("ok", "4 bits", f"{told}, as nf4 rounds")
    else:
        cure = "more than nf4 rounds: pip install --force-reinstall bitsandbytes"
        yield Finding("wrong", "4 bits", f"{told}, {cure}")


def _product_in_4_bits() -> tuple[float, str]:
    """Return how far a product in nf4 is off, relative, and where it was made."""
    import bitsandbytes
    import torch

    from lora_exp.model.loading import device

    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(256, 256, generator=generator).to(device()) for _ in range(2))
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    product = bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)
    exact = x @ weight.t()
    return float((product - exact).norm() / exact.norm()), device()


def _wandb() -> Iterator[Finding]:
    if (mode := os.environ.get("WANDB_MODE")) in ("offline", "disabled"):
        yield Finding("ok", "W&B", f"{mode}, as WANDB_MODE says")
        return
    import wandb

    if wandb.login(prompt=False, verify=False):
        yield Finding("ok", "W&B", "a key is here; runs are sent")
    else:
        yield Finding("warning", "W&B", "no key: runs are kept offline; `wandb login` changes that")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding("warning", "Hub", "HF_HUB_OFFLINE is set: only what is cached can be loaded")
    if get_token() is not None:
        yield Finding("ok", "Hub token", "is here")
    else:
        text = "none: gated models and `lora-exp push` need one; `hf auth login`"
        yield Finding("warning", "Hub token", text)


def _caches() -> Iterator[Finding]:
    from huggingface_hub import constants

    from lora_exp.files.paths import cache_dir

    folders = {"LORA_EXP_CACHE": cache_dir(), "HF_HUB_CACHE": Path(constants.HF_HUB_CACHE)}
    for name, folder in folders.items():
        try:
            _write_in(folder)
        except OSError as error:
            text = f"{folder} cannot be written ({error.strerror}); {name}=<folder> names another"
            yield Finding("wrong", "cache", text)
        else:
            held = sum(p.stat().st_size for p in folder.rglob("*") if not p.is_symlink())
            yield Finding("ok", "cache", f"{folder}, {size(held)}")


def _write_in(folder: Path) -> None:
    """Write where a folder is, or would be made, and leave nothing."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    with tempfile.TemporaryFile(dir=there):
        pass


def _machine() -> Iterator[Finding]:
    from lora_exp.model.processor import capability

    yield Finding("known", "processor", capability())
    free = shutil.disk_usage(Path.cwd()).free
    cure = "" if free >= ROOM else "; checkpoints may not fit: make room, or work elsewhere"
    yield Finding("warning" if cure else "ok", "disk", f"{size(free)} free here{cure}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("known", "machine", f"{_cores()} CPU cores, {size(memory)} memory")


def _cores() -> Any:
    """Return how many this process may use, where the system tells."""
    counted = getattr(os, "sched_getaffinity", None)
    return len(counted(0)) if counted else os.cpu_count()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
