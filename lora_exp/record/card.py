"""The model card saved with an adapter or model; equal runs write equal cards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lora_exp.config.door import plain
from lora_exp.files.paths import asset
from lora_exp.files.redaction import redact
from lora_exp.files.yaml_text import to_yaml

SECTIONS = ("peft", "quant", "train", "algorithm")
HERE = "path/to/this/folder"
HEAD = re.compile(r"\A---\n.*?\n---\n\s*(# [^\n]*\n\s*)?", re.S)  # metadata and title
LOADING = re.compile(r"^To load it:\n\n```python\n.*?```\n\n", re.S | re.M)


def model_card(cfg: DictConfig, record: Mapping[str, Any]) -> str:
    """Return the card: base, data, method, metrics, and how to load it.

    It has no times, and no local paths except the base's path from the config.

    Args:
        cfg: the run's config.
        record: its run.json.
    """
    sources = "\n".join(f"- `{_short(name)}`: {digest}" for name, digest in record["data"].items())
    return f"""---
{to_yaml(_metadata(cfg))}---

# {cfg.name}

Trained with lora-exp. Base: `{cfg.model.path}` at `{record["base"]}`.{_start(cfg)}
Fingerprint of the run: `{record["fingerprint"]}`.

Data, {_row_counts(record)}:

{sources}

| metric | value |
|---|---|
{_metric_rows(record["metrics"])}

To load it:

```python
{_loading(cfg, record.get("auto_class", "AutoModelForCausalLM"))}
```

## Settings

```yaml
{_settings(cfg)}```
"""


def _metadata(cfg: DictConfig) -> dict[str, Any]:
    """Return what the Hub reads at the head of a card."""
    metadata: dict[str, Any] = {
        "library_name": "peft" if cfg.peft else "transformers",
        "tags": ["lora-exp"],
    }
    base = cfg.model.path
    if not asset(base).exists() and base.count("/") == 1:
        metadata["base_model"] = base
    return metadata


def _settings(cfg: DictConfig) -> str:
    """Return the method's sections of the config as YAML."""
    values = redact(plain(cfg))
    if "rewards" in values["algorithm"]:
        rewards = values["algorithm"]["rewards"]
        values["algorithm"]["rewards"] = [_tail(r) if isinstance(r, str) else r for r in rewards]
    return to_yaml({key: values[key] for key in SECTIONS} | {"seed": cfg.seed})


def _metric_rows(metrics: Mapping[str, float]) -> str:
    """Return the rows of the table of metrics."""
    # after a resume, train/loss is only the mean since then: shown if there is no evaluation
    fallback = "" if any(key.startswith("eval/") for key in metrics) else "train/loss"
    return "\n".join(
        f"| {key} | {value:.4f} |"
        for key, value in sorted(metrics.items())
        if key.startswith(("before/", "eval/")) or key == fallback
    )


def merged_card(merge: Mapping[str, Any], card: str) -> str:
    """Return the card of a merged model: its base and adapters, how to load it, its training.

    Args:
        merge: its merge.json.
        card: the model card of its first adapter.
    """
    adapters = ", ".join(f"`{a['name']}` (sha256 {a['sha256'][:12]})" for a in merge["adapters"])
    combined = f", combined by {merge['method']} {merge['weights']}," if "method" in merge else ""
    quant = merge["quant"] or {}
    form = f" as {quant.get('quant_type', 'int8')} held it, dequantised" if quant else ""
    training = LOADING.sub("", HEAD.sub("", card))
    return f"""---
library_name: transformers
tags:
- lora-exp
- merged
---

# {" + ".join(a["name"] for a in merge["adapters"])}, merged

A whole model in {merge["dtype"]}: {adapters}{combined} merged with lora-exp into
`{merge["base"]["path"]}` at `{merge["base"]["revision"]}`{form}. It needs no adapter and no peft.

To load it:

```python
{_loading_whole(merge["auto_class"], ', dtype="auto"')}
```

## What was merged

{training}"""


def _row_counts(record: Mapping[str, Any]) -> str:
    counts = record["counts"]
    held_out = counts.get("eval_rows", 0)
    return f"{counts['train_rows']:,} rows to train on and {held_out:,} held out"


def _start(cfg: DictConfig) -> str:
    return f" It started from the adapter `{_tail(cfg.adapter)}`." if cfg.adapter else ""


def _tail(path: str) -> str:
    """Return the last two parts of a path; a dotted name is returned unchanged."""
    return "/".join(Path(path).parts[-2:])


def _short(source: str) -> str:
    """Return a source without the folders of a local file."""
    return Path(source).name if Path(source).is_absolute() else source


def _loading_whole(model_class: str | None, arguments: str = "") -> str:
    """Return the code that loads a folder; None: the class is ours, by our own function."""
    if model_class is None:
        return (
            "from lora_exp import load_adapter  # plain transformers has no such class\n\n"
            f'model, tokenizer = load_adapter("{HERE}")'
        )
    return (
        f"from transformers import {model_class}\n\n"
        f'model = {model_class}.from_pretrained("{HERE}"{arguments})'
    )


def _loading(cfg: DictConfig, model_class: str | None) -> str:
    if cfg.peft is None or model_class is None:
        return _loading_whole(model_class, _attention(cfg))
    embedded = cfg.model.path.startswith("pkg://")
    path = f'asset("{cfg.model.path}")' if embedded else f'"{cfg.model.path}"'
    options = {"revision": cfg.model.revision, "gguf_file": cfg.model.gguf_file}
    arguments = "".join(f', {name}="{value}"' for name, value in options.items() if value)
    arguments += _attention(cfg)
    arguments += ", num_labels=1" if cfg.algorithm.task_type == "SEQ_CLS" else ""
    lines = ["from peft import PeftModel", f"from transformers import {model_class}", ""]
    lines[:0] = ["from lora_exp.config import asset"] if embedded else []
    return "\n".join(
        [
            *lines,
            f"base = {model_class}.from_pretrained({path}{arguments})",
            f'model = PeftModel.from_pretrained(base, "{HERE}")',
        ]
    )


def _attention(cfg: DictConfig) -> str:
    """Return the argument for an attention other than the default of transformers."""
    attention = cfg.model.attn_implementation
    return "" if attention in (None, "auto", "sdpa") else f', attn_implementation="{attention}"'
