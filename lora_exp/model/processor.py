"""The processor, and the features that decide how it computes products."""

from __future__ import annotations

import platform
from pathlib import Path

CPU = Path("/proc/cpuinfo")
KNOWN = (
    "model name", "cpu family", "model", "stepping", "cache size", "flags", "Features", "CPU part",
    "microcode",
)  # fmt: skip
# instruction sets whose kernels differ: the system's name -> the usual name
EXTENSIONS = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_tile": "AMX",
    "amx_bf16": "AMX-BF16", "asimd": "NEON", "bf16": "BF16", "sve": "SVE", "sme": "SME",
}  # fmt: skip


def processor() -> dict[str, str]:
    """Return the processor's name and features, as far as the system reports them."""
    lines = CPU.read_text().splitlines() if CPU.exists() else []
    # reversed: of several processors the first one's values are kept
    pairs = dict(line.partition(":")[::2] for line in reversed(lines))
    values = {key.strip(): value.strip() for key, value in pairs.items()}
    return {key: values[key] for key in KNOWN if key in values} or {"machine": platform.machine()}


def capability() -> str:
    """Return one line: the processor, its instruction sets, and which of them torch uses."""
    import torch

    values = processor()
    flags = f"{values.get('flags', '')} {values.get('Features', '')}".split()
    instruction_sets = ", ".join(name for flag, name in EXTENSIONS.items() if flag in flags)
    name = values.get("model name") or platform.machine()
    used = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{name} ({instruction_sets}), torch uses {used}, {threads} thread{'s' * (threads != 1)}"
