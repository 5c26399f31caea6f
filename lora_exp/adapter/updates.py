"""How much a saved adapter changes each module: the norm of its update."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_exp.adapter.stacks import by_pattern, factors_of_experts, parameters_of
from lora_exp.adapter.untrusted import read_weights
from lora_exp.errors import AdapterError

PART = re.compile(r"\.(lora_[A-Za-z_]+|ia3_l|hada_\w+|lokr_\w+|oft_\w+|vera_\w+|weight|bias)\b.*$")


def norms(folder: Path) -> dict[str, float | None]:
    """Return the norm of each module's update of a saved adapter; None: it is not finite.

    Raises:
        AdapterError: as `modules`.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    entries = modules(read_weights(str(folder), finite=False), config, str(folder))
    return {entry["name"]: entry["norm"] for entry in entries}


def modules(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], path: str = ""
) -> list[dict[str, Any]]:
    """Return each adapted module's name and the norm of its update; for LoRA also rank and alpha.

    Of stacked experts, the norm is that of the expert with the largest update, and `mean_norm` the
    mean of all; `r` is the rank of each.

    Args:
        weights: as saved, by name.
        config: of the adapter.
        path: the adapter's folder, for errors.

    Raises:
        AdapterError: a name pattern takes too long to match, or a module's A and B do not fit.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        full_name = key.removeprefix("base_model.model.")
        name = PART.sub("", full_name)
        groups.setdefault(name, {})[full_name.removeprefix(f"{name}.")] = value.double()
    first = {name: _part("A", parts) for name, parts in groups.items()}
    heights = {name: len(matrix) for name, matrix in first.items() if matrix is not None}
    parameters = parameters_of(heights, config, path) if config.get("target_parameters") else {}
    names = {name: parameters.get(name, (name, 1)) for name in groups}
    whole = [name for name, _ in names.values()]
    alphas = by_pattern(config, "alpha_pattern", "lora_alpha", whole, path)
    entries = []
    for in_file, parts in sorted(groups.items(), key=lambda item: _natural(names[item[0]][0])):
        name, experts = names[in_file]
        try:
            update = _update(parts, float(alphas[name] or 0), config, experts)
        except (RuntimeError, IndexError) as error:
            shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in parts.items())
            raise AdapterError(f"{path}: weights of {in_file} do not fit: {shapes}") from error
        entries.append({"name": name.removesuffix(".weight")} | update)
    return entries


def _part(letter: str, parts: Mapping[str, Tensor]) -> Tensor | None:
    """Return a LoRA's matrix A or B, of a layer or an embedding; a bias of B is no part of it."""
    pattern = re.compile(rf"lora_(embedding_)?{letter}(?!.*bias$)")
    return next((v for key, v in parts.items() if pattern.match(key)), None)


def _update(
    parts: dict[str, Tensor], alpha: float, config: Mapping[str, Any], experts: int
) -> dict[str, Any]:
    """Return the norm of a module's update, None if it is not finite, with rank and alpha."""
    first, second = _part("A", parts), _part("B", parts)
    if first is None or second is None:
        norm = math.sqrt(sum(_square(key, value) for key, value in parts.items()))
        return {"norm": norm if math.isfinite(norm) else None}
    rank = initial_rank = len(first) // experts
    if "lora_E" in parts:  # AdaLoRA scales by its initial rank
        first, initial_rank = first * parts["lora_E"], int(config["init_r"])
    divisor = math.sqrt(initial_rank) if config.get("use_rslora") else initial_rank
    scaling = alpha / divisor if initial_rank else 0.0
    stack = factors_of_experts(first, second, experts) if experts > 1 else [(first, second)]
    norms = [scaling * _norm_of_product(second, first) for first, second in stack]
    finite = all(map(math.isfinite, norms))
    settings = {"r": rank, "lora_alpha": alpha, "norm": max(norms) if finite else None}
    if experts > 1:
        mean = sum(norms) / experts if finite else None
        settings |= {"experts": experts, "mean_norm": mean}
    return settings


def _square(key: str, value: Tensor) -> float:
    """Return a tensor's squared norm; of IA3, which multiplies, that of its difference to 1."""
    return float((value - 1 if key.startswith("ia3_l") else value).square().sum())


def _norm_of_product(second_OR: Tensor, first_RI: Tensor) -> float:
    """Return the Frobenius norm of B A without computing B A: tr((B'B)(AA')), [R, R] each."""
    second, first = second_OR.flatten(1), first_RI.flatten(1)
    return float(((second.T @ second) * (first @ first.T)).sum().clamp(min=0).sqrt())


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
