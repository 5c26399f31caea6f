"""The classes of a layer: numbers of rows that it computes with the same bits, measured and kept.

A product chooses its kernel, and so the order of its sums, by the number of rows, the threads, the
processor and the libraries. So nothing is assumed: a number of rows is measured when it is first
met, and kept for all that computes under the same conditions.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lora_exp.files.paths import cache_dir
from lora_exp.files.whole import write_whole
from lora_exp.lockstep import probe
from lora_exp.lockstep.probe import Probe
from lora_exp.lockstep.segment import Mode
from lora_exp.lockstep.state import Precision
from lora_exp.model.processor import processor

# settings by which libraries choose their kernels
PREFIXES = (
    "ONEDNN_", "DNNL_", "MKL_", "KMP_", "OMP_", "OPENBLAS_", "ATEN_", "CUBLAS", "CUDNN_", "NVIDIA_",
    "TORCH_", "PYTORCH_", "DISABLE_ADDMM_",
)  # fmt: skip
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Kind:
    """What decides, beside the number of rows, how a layer computes."""

    layer: str  # its class and sizes
    shape: tuple[int, ...]  # of one row
    dtype: torch.dtype  # of the rows
    precision: Precision
    training: bool
    heads_first: bool = False  # whether rows come as [1, H, N, D]

    @classmethod
    def of(
        cls,
        layer: Any,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        mode: Mode,
        heads_first: bool = False,
    ) -> Kind:
        """Return the kind of a layer for rows of a shape, in a mode."""
        parts = [f"{type(layer).__module__}.{type(layer).__qualname__}"]
        quantised = getattr(getattr(layer, "weight", None), "quant_state", None)
        for holder in (layer, getattr(layer, "state", None), quantised):
            parts += _settings(holder)
        for name, p in layer.named_parameters():
            parts.append(f"{name} {tuple(p.shape)} {p.stride()} {p.dtype}")
        text = ", ".join(parts)
        return cls(text, shape, dtype, mode.precision, mode.training, heads_first)

    def __str__(self) -> str:
        """Write it as a key of the cache."""
        modes = "grad" if self.precision.grad else "no grad"
        modes += " training" if self.training else ""
        casts = [f"{device} {dtype}" for device, on, dtype in self.precision.autocast if on]
        first = " heads first" if self.heads_first else ""
        return f"{self.layer}; {list(self.shape)} {self.dtype}{first}; {' '.join([modes, *casts])}"


def _settings(holder: Any) -> list[str]:
    """Return the plain settings of a layer, or of its quantisation state, as text."""
    values = vars(holder).items() if holder is not None else ()
    plain = (int, float, str, bool, torch.dtype)
    modes = ("training", "is_training")  # a kind's own; the latter is that of the last call
    return [f"{k} {v}" for k, v in sorted(values) if k not in modes and isinstance(v, plain)]


class Classes:
    """Measures and remembers classes, for one device and number of threads."""

    def __init__(self, device: str) -> None:
        conditions = json.dumps(_conditions(device), indent=1)
        name = hashlib.sha256(conditions.encode()).hexdigest()[:32]
        self.conditions, self.path = conditions, cache_dir() / "classes" / f"{name}.json"
        self.known: dict[str, dict[str, str | None]] = _read(self.path)
        self.probes: dict[Kind, Probe] = {}
        self.keys: dict[Kind, str] = {}
        self.measured = 0  # since the file was written
        self.wrong = False

    def of(self, kind: Kind, layer: Any, rows: int) -> str | None:
        """Return the class of a number of rows; see `Probe.class_of`.

        Args:
            kind: the layer's, whose modes are set.
            layer: any of this kind.
            rows: of one product.
        """
        if kind not in self.keys:
            self.keys[kind] = str(kind)
        classes = self.known.setdefault(self.keys[kind], {})
        key = str(rows)
        if key not in classes:
            if kind not in self.probes:
                self.probes[kind] = Probe(layer, kind.shape, kind.dtype, kind.heads_first)
            classes[key] = self.probes[kind].class_of(rows)
            self.measured += 1
        return classes[key]

    def forget(self) -> None:
        """Drop what was measured, here and in the cache, and keep nothing from now on.

        A pass was not the run alone, so classes are wrong, or no longer what the machine does.
        """
        self.known, self.measured, self.wrong = {}, 0, True
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def keep(self) -> None:
        """Write what is new to the cache, beside what others have written there meanwhile."""
        if not self.measured or self.wrong:
            return
        for key, classes in _read(self.path).items():
            self.known[key] = classes | self.known.get(key, {})
        text = json.dumps({"conditions": json.loads(self.conditions), "classes": self.known})
        with suppress(OSError):  # a full disk costs the measuring, nothing else
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, text + "\n")
            self.measured = 0


def _read(path: Path) -> dict[str, dict[str, str | None]]:
    """Return what the cache holds; a damaged file holds nothing."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        kept = json.loads(path.read_text(encoding="utf-8"))["classes"]
        return {str(key): dict(classes) for key, classes in kept.items()}
    return {}


def _conditions(device: str) -> dict[str, Any]:
    """Return all that a library may choose a kernel by, but for the product's own shape."""
    libraries = {name: version(name) for name in ("torch", "bitsandbytes", "transformers")}
    found: dict[str, Any] = {
        "probe": hashlib.sha256(Path(probe.__file__).read_bytes()).hexdigest(),
        "libraries": libraries | {"build": torch.__config__.show()},
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIXES)},
        "matmul": [
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.mkldnn.enabled,
        ],
    }
    if device != "cpu":
        gpu = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": gpu.name,
            "capability": [gpu.major, gpu.minor, gpu.multi_processor_count],
            "cuda": torch.version.cuda,
            "driver": DRIVER.read_text() if DRIVER.exists() else None,
            "reduced precision": [
                torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
                torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
            ],
        }
    return found
