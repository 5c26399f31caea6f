"""The processor, and what of it decides how products are computed."""

from __future__ import annotations

import platform
from pathlib import Path

CPU = Path("/proc/cpuinfo")
KNOWN = (
    "model name", "cpu family", "model", "stepping", "cache size", "flags", "Features", "CPU part",
    "microcode",
)  # fmt: skip
# extensions whose kernels differ, as the system and as people call them
EXTENSIONS = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_tile": "AMX",
    "amx_bf16": "AMX-BF16", "asimd": "NEON", "bf16": "BF16", "sve": "SVE", "sme": "SME",
}  # fmt: skip


def processor() -> dict[str, str]:
    """Return the processor's name and what it can do, as far as the system tells."""
    lines = CPU.read_text().splitlines() if CPU.exists() else []
    pairs = dict(line.partition(":")[::2] for line in reversed(lines))  # the first processor's
    values = {key.strip(): value.strip() for key, value in pairs.items()}
    return {key: values[key] for key in KNOWN if key in values} or {"machine": platform.machine()}


def capability() -> str:
    """Return in a line what torch computes with here."""
    import torch

    facts = processor()
    flags = f"{facts.get('flags', '')} {facts.get('Features', '')}".split()
    have = ", ".join(name for flag, name in EXTENSIONS.items() if flag in flags)
    name = facts.get("model name") or platform.machine()
    used = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{name} ({have}), torch uses {used}, {threads} thread{'s' * (threads != 1)}"
