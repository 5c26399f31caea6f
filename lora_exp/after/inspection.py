"""Description of a saved adapter, model, run or sweep, read from its files without the base."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_exp.adapter.untrusted import read_weights
from lora_exp.adapter.updates import modules
from lora_exp.after.saved import MERGE_RECORD, Saved, find, jobs, read_json
from lora_exp.errors import SavedError
from lora_exp.files.paths import asset
from lora_exp.record.standing import status_text
from lora_exp.record.sweep import best_job, read_rows

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
