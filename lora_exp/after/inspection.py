"""Description of a saved adapter, model, run or sweep, read from its files without the base."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_exp.adapter.untrusted import read_weights
from lora_exp.after.saved import MERGE_RECORD, Saved, find, jobs, read_json
from lora_exp.after.stacks import by_pattern, factors_of_experts, parameters_of
from lora_exp.errors import AdapterError, SavedError
from lora_exp.files.paths import asset
from lora_exp.record.standing import status_text
from lora_exp.record.sweep import best_job, read_rows

PART = re.compile(r"\.(lora_[A-Za-z_]+|ia3_l|hada_\w+|lokr_\w+|oft_\w+|vera_\w+|weight|bias)\b.*$")
SETTINGS = ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "num_virtual_tokens")


def inspect(path: str | Path) -> dict[str, Any]:
    """Describe what lies at a path.

    Returns:
        `kind` (adapter, model or sweep) and its properties, fit for JSON. An adapter's
        `modules` have their `norm`: of a LoRA the Frobenius norm of the update, scaling * B A; of
        other methods that of the saved tensors.

    Raises:
        SavedError: nothing of this kind is there, or it is damaged.
        AdapterError: the weights are not numbers.
    """
    folder = asset(str(path))
    if jobs(folder) and not (folder / "run.json").is_file():
        winner = best_job(folder)
        return {
            "kind": "sweep",
            "path": str(folder),
            "best": winner and str(winner),
            "jobs": [_job(folder / row["job"]) for row in read_rows(folder)],
        }
    saved = find(folder)
    return {
        "path": str(saved.folder),
        **(_adapter(saved) if saved.adapter is not None else _model(saved)),
        "run": _run(saved),
        "files": _files(saved.folder),
    }


def _adapter(saved: Saved) -> dict[str, Any]:
    assert saved.adapter is not None
    weights = read_weights(str(saved.folder), finite=False)
    config = saved.adapter
    targets = config.get("target_modules")
    if isinstance(targets, list):
        targets = sorted([*targets, *(config.get("target_parameters") or ())])
    return {
        "kind": "adapter",
        "method": str(config["peft_type"]),
        "task_type": saved.task_type,
        "settings": {key: config[key] for key in SETTINGS if config.get(key) is not None},
        "targets": targets,
        "modules_to_save": config.get("modules_to_save"),
        "base": saved.base,
        "base_revision": saved.record.get("base") or config.get("revision"),
        "parameters": sum(value.numel() for value in weights.values()),
        "bytes": sum(value.numel() * value.element_size() for value in weights.values()),
        "dtypes": sorted({str(value.dtype).removeprefix("torch.") for value in weights.values()}),
        "finite": all(bool(value.isfinite().all()) for value in weights.values()),
        "modules": modules(weights, config, str(saved.folder)),
    }


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
        except RuntimeError as error:
            shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in parts.items())
            raise AdapterError(f"{path}: weights of {in_file} do not fit: {shapes}") from error
        entries.append({"name": name.removesuffix(".weight")} | update)
    return entries


def _part(letter: str, parts: Mapping[str, Tensor]) -> Tensor | None:
    """Return a LoRA's matrix A or B, of a layer or an embedding."""
    matches = (v for key, v in parts.items() if re.match(rf"lora_(embedding_)?{letter}", key))
    return next(matches, None)


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


def _model(saved: Saved) -> dict[str, Any]:
    config = read_json(saved.folder / "config.json")
    parameters, dtypes, total_bytes = 0, set(), 0
    for file in sorted(saved.folder.glob("*.safetensors")):
        total_bytes += file.stat().st_size
        try:
            with safe_open(str(file), "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (a file, not a dict)
                    tensor = tensors.get_slice(key)
                    parameters += math.prod(tensor.get_shape())
                    dtypes.add(tensor.get_dtype())
        except (SafetensorError, OSError) as error:
            raise SavedError(f"{file} is damaged: {error}") from error
    merge = saved.folder / MERGE_RECORD
    return {
        "kind": "model",
        "architecture": (config.get("architectures") or ["?"])[0],
        "layers": config.get("num_hidden_layers"),
        "hidden_size": config.get("hidden_size"),
        "vocabulary": config.get("vocab_size"),
        "parameters": parameters,
        "bytes": total_bytes,
        "dtypes": sorted(dtypes),
        "merged_from": read_json(merge) if merge.is_file() else None,
    }


def _run(saved: Saved) -> dict[str, Any] | None:
    """Return the parts of the run's record that describe how the weights were trained."""
    if saved.run is None:
        return None
    keys = ("name", "status", "choices", "objective", "metrics", "counts", "data", "versions")
    recorded = {k: saved.record[k] for k in keys if k in saved.record}
    return {"path": str(saved.run)} | recorded | {"standing": status_text(saved.run)}


def _files(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}


def _job(run: Path) -> dict[str, Any]:
    record = read_json(run / "run.json")
    recorded = {key: record.get(key) for key in ("name", "status", "objective", "error")}
    value = record.get("metrics", {}).get(recorded["objective"])
    return {"path": str(run), **recorded, "value": value}
