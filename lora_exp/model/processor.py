"""The processor or GPU, and the features and settings that decide how it computes products."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

CPU = Path("/proc/cpuinfo")
DRIVER = Path("/proc/driver/nvidia/version")
KNOWN = (
    "model name", "cpu family", "model", "stepping", "cache size", "flags", "Features", "CPU part",
    "microcode",
)  # fmt: skip
# instruction sets whose kernels differ: the system's name -> the usual name
EXTENSIONS = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_tile": "AMX",
    "amx_bf16": "AMX-BF16", "asimd": "NEON", "bf16": "BF16", "sve": "SVE", "sme": "SME",
}  # fmt: skip
CHOOSES_KERNELS = re.compile(
    r"avx|amx|fma|f16c|asimd|bf16|i8mm|sve|sme(?!p)"
)  # of a processor's flags
# settings by which libraries choose their kernels
PREFIXES = (
    "ONEDNN_", "DNNL_", "MKL_", "KMP_", "OMP_", "OPENBLAS_", "ATEN_", "CUBLAS", "CUDNN_",
    "NVIDIA_TF32_", "TORCH_", "PYTORCH_", "DISABLE_ADDMM_", "TRITON_INTERPRET",
    "TRITON_DEFAULT_FP_FUSION",
)  # fmt: skip


def processor() -> dict[str, str]:
    """Return the processor's name and features, as far as the system reports them."""
    return dict(_processor(CPU))


@cache
def _processor(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines() if path.exists() else []
    # reversed: of several processors the first one's values are kept
    pairs = dict(line.partition(":")[::2] for line in reversed(lines))
    values = {key.strip(): value.strip() for key, value in pairs.items()}
    return {key: values[key] for key in KNOWN if key in values} or {"machine": platform.machine()}


def _flags() -> list[str]:
    values = processor()
    return f"{values.get('flags', '')} {values.get('Features', '')}".split()


def _name() -> str:
    return processor().get("model name") or platform.machine()


def device_facts(device: str) -> dict[str, Any]:
    """Return what decides how a device computes, in a few words.

    Args:
        device: torch's name of it: `cpu`, `cuda:0`.

    Returns:
        `name`; of a processor its `flags` and the `capability` that torch uses; of a GPU its
        compute `capability`, `driver` and `cuda`.
    """
    import torch

    if device != "cpu":
        gpu = torch.cuda.get_device_properties(device)
        driver = re.search(r"\d+\.[\d.]+", DRIVER.read_text()) if DRIVER.exists() else None
        return {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "driver": driver[0] if driver else None,
            "cuda": torch.version.cuda,
        }
    return {
        "name": _name(),
        "flags": " ".join(sorted(filter(CHOOSES_KERNELS.match, set(_flags())))),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def kernel_settings() -> dict[str, str]:
    """Return the environment variables by which libraries choose their kernels."""
    return {key: value for key, value in sorted(os.environ.items()) if key.startswith(PREFIXES)}


def capability() -> str:
    """Return one line: the processor, its instruction sets, and which of them torch uses."""
    import torch

    flags = _flags()
    instruction_sets = ", ".join(name for flag, name in EXTENSIONS.items() if flag in flags)
    used = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    plural = "s" * (threads != 1)
    return f"{_name()} ({instruction_sets}), torch uses {used}, {threads} thread{plural}"
