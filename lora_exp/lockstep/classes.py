"""The classes of a layer: numbers of rows that it computes with the same bits, measured and cached.

A product chooses its kernel, and so the order of its sums, by the number of rows, the threads, the
processor and the libraries. So nothing is assumed: the class of a number of rows is measured when
it is first needed, and cached for all runs under the same conditions.
"""

from __future__ import annotations

import hashlib
import json
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
from lora_exp.lockstep.segment import PassContext
from lora_exp.lockstep.state import ComputeState
from lora_exp.model import invariance
from lora_exp.model.processor import device_facts, kernel_settings, processor


@dataclass(frozen=True)
class LayerSignature:
    """What decides how a layer computes, except the number of rows."""

    layer: str  # its class and sizes
    shape: tuple[int, ...]  # of one row
    dtype: torch.dtype  # of the rows
    compute_state: ComputeState
    training: bool
    heads_first: bool = False  # whether rows come as [1, H, N, D]

    @classmethod
    def of(
        cls,
        layer: Any,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        context: PassContext,
        heads_first: bool = False,
    ) -> LayerSignature:
        """Return the signature of a layer for rows of a shape, in a context."""
        parts = [f"{type(layer).__module__}.{type(layer).__qualname__}"]
        quantised = getattr(getattr(layer, "weight", None), "quant_state", None)
        for holder in (layer, getattr(layer, "state", None), quantised):
            parts += _settings(holder)
        for name, p in layer.named_parameters():
            parts.append(f"{name} {tuple(p.shape)} {p.stride()} {p.dtype}")
        text = ", ".join(parts)
        return cls(text, shape, dtype, context.compute_state, context.training, heads_first)

    def __str__(self) -> str:
        """Return it as a key of the cache."""
        modes = "grad" if self.compute_state.grad else "no grad"
        modes += " training" if self.training else ""
        casts = [
            f"{device} {dtype}" for device, enabled, dtype in self.compute_state.autocast if enabled
        ]
        first = " heads first" if self.heads_first else ""
        return f"{self.layer}; {list(self.shape)} {self.dtype}{first}; {' '.join([modes, *casts])}"


def _settings(holder: Any) -> list[str]:
    """Return the plain settings of a layer, or of its quantisation state, as text."""
    values = vars(holder).items() if holder is not None else ()
    plain = (int, float, str, bool, torch.dtype)
    modes = ("training", "is_training")  # in `training`; the latter is only that of the last call
    return [f"{k} {v}" for k, v in sorted(values) if k not in modes and isinstance(v, plain)]


class RowClasses:
    """Measures and caches classes, for one device and number of threads."""

    def __init__(self, device: str) -> None:
        conditions = json.dumps(_conditions(device), indent=1)
        name = hashlib.sha256(conditions.encode()).hexdigest()[:32]
        self.conditions, self.path = conditions, cache_dir() / "classes" / f"{name}.json"
        self.classes: dict[str, dict[str, str | None]] = _read(self.path)
        self.probes: dict[LayerSignature, Probe] = {}
        self.keys: dict[LayerSignature, str] = {}
        self.unsaved = 0  # measured since the file was written
        self.distrusted = False

    def class_of(self, signature: LayerSignature, layer: Any, rows: int) -> str | None:
        """Return the class of a number of rows; see `Probe.class_of`.

        Args:
            signature: the layer's, whose modes are set now.
            layer: any layer with this signature.
            rows: of one product.
        """
        if signature not in self.keys:
            self.keys[signature] = str(signature)
        row_classes = self.classes.setdefault(self.keys[signature], {})
        key = str(rows)
        if key not in row_classes:
            if signature not in self.probes:
                self.probes[signature] = Probe(
                    layer, signature.shape, signature.dtype, signature.heads_first
                )
            row_classes[key] = self.probes[signature].class_of(rows)
            self.unsaved += 1
        return row_classes[key]

    def forget(self) -> None:
        """Delete all classes, here and in the cache, and save none from now on.

        A pass differed from the run alone, so the classes are wrong, or the machine has changed.
        """
        self.classes, self.unsaved, self.distrusted = {}, 0, True
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def save(self) -> None:
        """Add the new classes to the cache; what others have written meanwhile stays."""
        if not self.unsaved or self.distrusted:
            return
        for key, row_classes in _read(self.path).items():
            self.classes[key] = row_classes | self.classes.get(key, {})
        text = json.dumps({"conditions": json.loads(self.conditions), "classes": self.classes})
        with suppress(OSError):  # on a full disk they are measured again next time
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, text + "\n")
            self.unsaved = 0


def _read(path: Path) -> dict[str, dict[str, str | None]]:
    """Return the classes in the cache; none if the file is damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        entries = json.loads(path.read_text(encoding="utf-8"))["classes"]
        return {str(key): dict(row_classes) for key, row_classes in entries.items()}
    return {}


def _conditions(device: str) -> dict[str, Any]:
    """Return everything by which a library may choose a kernel, except the shape of the product."""
    libraries = {name: version(name) for name in ("torch", "bitsandbytes", "transformers")}
    conditions: dict[str, Any] = {
        "probe": hashlib.sha256(Path(probe.__file__).read_bytes()).hexdigest(),
        "libraries": libraries | {"build": torch.__config__.show()},
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "settings": kernel_settings(),
        "matmul": [
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.mkldnn.enabled,
        ],
    }
    if invariance.is_on():
        conditions["libraries"] |= invariance.versions()
    if device != "cpu":
        gpu = torch.cuda.get_device_properties(device)
        conditions["gpu"] = {
            **device_facts(device),
            "processors": gpu.multi_processor_count,
            "reduced precision": [
                torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
                torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
            ],
        }
    return conditions
