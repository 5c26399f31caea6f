"""Whether this machine can train, and what to do if it cannot; nothing is changed."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lora_exp.config.processes import thread_count
from lora_exp.model.processor import DRIVER
from lora_exp.record.console import size

NAME = "lora-exp"
DISK_SPACE = 5 * 2**30  # bytes; about what a run of a 7B model with its checkpoints takes
MAX_ERROR = 0.15  # of a product in 4 bits, relative; with normal weights nf4 has about 0.09


@dataclass(frozen=True)
class Finding:
    """What was checked, its state, and what to do about it."""

    state: Literal["ok", "warning", "wrong", "known"]  # known: information only
    what: str
    details: str  # and what to do; the names of these fields are those of the JSON


def diagnose() -> list[Finding]:
    """Check everything that a run needs."""
    findings: list[Finding] = []
    checks = (_python, _packages, _extras, _gpu, _bitsandbytes, _wandb, _hub, _caches, _machine)
    for check in checks:
        try:
            findings += check()
        except (ImportError, OSError) as error:  # a package is missing, or its library is broken
            text = f"cannot be checked: {_line(error)}"
            findings.append(Finding("wrong", check.__name__.removeprefix("_"), text))
    return findings


def _python() -> Iterator[Finding]:
    required, installed = SpecifierSet(metadata(NAME)["Requires-Python"]), platform.python_version()
    if required.contains(installed, prereleases=True):
        yield Finding("ok", "python", installed)
    else:
        text = f"{installed}, not {required}; make an environment with that version"
        yield Finding("wrong", "python", text)


def _packages() -> Iterator[Finding]:
    """Compare the installed packages with the versions that this release requires."""
    for package in _requirements(""):
        cure = f"pip install '{package.name}{package.specifier}'"
        installed = _version(package.name)
        if installed is None:
            yield Finding("wrong", package.name, f"is missing; {cure}")
        elif package.specifier.contains(installed, prereleases=True):
            yield Finding("ok", package.name, installed)
        else:
            yield Finding("wrong", package.name, f"{installed} is not {package.specifier}; {cure}")


def _requirements(extra: str) -> Iterator[Requirement]:
    """Yield the packages that an extra requires; with an empty extra, those always required."""
    for package in map(Requirement, requires(NAME) or ()):
        marker = package.marker
        if marker.evaluate({"extra": extra}) if marker else not extra:
            yield package


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _extras() -> Iterator[Finding]:
    for extra, use in {"eval": "ROUGE and BLEU", "serve": "lora-exp serve"}.items():
        missing = [p.name for p in _requirements(extra) if _version(p.name) is None]
        text = f"pip install '{NAME}[{extra}]' installs {', '.join(missing)}, for {use}"
        yield Finding("known", f"extra {extra}", text if missing else "installed")
    yield Finding("known", "vllm", _version("vllm") or "not installed; a faster engine for serve")


def _gpu() -> Iterator[Finding]:
    import torch

    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        emulated = not torch.cuda.is_bf16_supported(including_emulation=False)
        bfloat16 = "bfloat16 only emulated" if emulated else "bfloat16"
        yield Finding("ok", f"GPU {i}", f"{gpu.name}, {size(gpu.total_memory)}, {bfloat16}")
    if torch.cuda.is_available():
        return
    if DRIVER.exists():
        text = f"there is an NVIDIA driver, but torch {torch.__version__} finds no GPU"
        yield Finding("warning", "GPU", f"{text}; install torch's build for CUDA")
    else:
        yield Finding("known", "GPU", "none; runs train on the CPU")


def _bitsandbytes() -> Iterator[Finding]:
    """Compare a product with 4-bit weights with the same product in float32."""
    try:
        error_4bit, device = _product_in_4_bits()
    except (RuntimeError, AttributeError, ValueError) as error:
        text = f"{_line(error)}; quant=none works without bitsandbytes"
        yield Finding("wrong", "4 bits", text)
        return
    text = f"a product on {device} is {error_4bit:.3f} off"
    if error_4bit < MAX_ERROR:
        yield Finding("ok", "4 bits", f"{text}, as nf4 rounds")
    else:
        cure = "more than nf4 rounds: pip install --force-reinstall bitsandbytes"
        yield Finding("wrong", "4 bits", f"{text}, {cure}")


def _product_in_4_bits() -> tuple[float, str]:
    """Return the relative error of a product in nf4, and the device that computed it."""
    import bitsandbytes
    import torch

    from lora_exp.model.placement import device

    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(256, 256, generator=generator).to(device()) for _ in range(2))
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    product = bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)
    exact = x @ weight.t()
    return float((product - exact).norm() / exact.norm()), device()


def _wandb() -> Iterator[Finding]:
    if (mode := os.environ.get("WANDB_MODE")) in ("offline", "disabled"):
        yield Finding("ok", "W&B", f"{mode}, set by WANDB_MODE")
        return
    import wandb

    if wandb.login(prompt=False, verify=False):
        yield Finding("ok", "W&B", "a key is set; runs are uploaded")
    else:
        yield Finding("warning", "W&B", "no key: runs are logged offline; `wandb login` sets one")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding("warning", "Hub", "HF_HUB_OFFLINE is set: only what is cached can be loaded")
    if get_token() is not None:
        yield Finding("ok", "Hub token", "is set")
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
            text = f"{folder} cannot be written ({error.strerror}); set {name} to another folder"
            yield Finding("wrong", "cache", text)
        else:
            used = sum(p.stat().st_size for p in folder.rglob("*") if not p.is_symlink())
            yield Finding("ok", "cache", f"{folder}, {size(used)}")


def _write_in(folder: Path) -> None:
    """Write a temporary file in a folder, or in the parent in which it would be made."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    with tempfile.TemporaryFile(dir=existing):
        pass


def _machine() -> Iterator[Finding]:
    from lora_exp.model.processor import capability

    yield Finding("known", "processor", capability())
    free = shutil.disk_usage(Path.cwd()).free
    cure = "" if free >= DISK_SPACE else "; checkpoints may not fit: free some, or use another disk"
    yield Finding("warning" if cure else "ok", "disk", f"{size(free)} free here{cure}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("known", "machine", f"{thread_count()} CPU cores, {size(memory)} memory")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
