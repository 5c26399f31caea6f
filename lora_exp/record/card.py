"""The model card saved with an adapter or model; the same run writes the same card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_exp.config.door import plain
from lora_exp.files.paths import asset
from lora_exp.files.redaction import redact
from lora_exp.model.loading import CLASSES

SECTIONS = ("peft", "quant", "train", "algorithm")
HERE = "path/to/this/folder"
HEAD = re.compile(r"\A---\n.*?\n---\n\s*(# [^\n]*\n\s*)?", re.S)  # metadata and title
LOADING = re.compile(r"^To load it:\n\n```python\n.*?```\n\n", re.S | re.M)


def model_card(cfg: DictConfig, record: Mapping[str, Any]) -> str:
    """Return the card: base, data, method, numbers, and how to load it.

    It has no times, and no local paths except the base's path from the config.

    Args:
        cfg: the run's.
        record: its run.json.
    """
    head = {"library_name": "peft" if cfg.peft else "transformers", "tags": ["lora-exp"]}
    base = cfg.model.path
    if not asset(base).exists() and base.count("/") == 1:
        head["base_model"] = base
    values = redact(plain(cfg))
    if "rewards" in values["algorithm"]:
        named = values["algorithm"]["rewards"]
        values["algorithm"]["rewards"] = [_tail(r) if isinstance(r, str) else r for r in named]
    settings = OmegaConf.to_yaml({key: values[key] for key in SECTIONS} | {"seed": cfg.seed})
    sources = "\n".join(f"- `{_short(name)}`: {known}" for name, known in record["data"].items())
    # after a resume it is the mean of the steps since: only where nothing else says anything
    alone = "" if any(k.startswith("eval/") for k in record["metrics"]) else "train/loss"
    numbers = "\n".join(
        f"| {key} | {value:.4f} |"
        for key, value in sorted(record["metrics"].items())
        if key.startswith(("before/", "eval/")) or key == alone
    )
    return f"""---
{OmegaConf.to_yaml(head)}---

# {cfg.name}

Trained with lora-exp. Base: `{base}` at `{record["base"]}`.{_start(cfg)}

Data, {_counted(record)}:

{sources}

| metric | value |
|---|---|
{numbers}

To load it:

```python
{_loading(cfg)}
```

## Settings

```yaml
{settings}```
"""


def merged_card(merge: Mapping[str, Any], task_type: str, card: str) -> str:
    """Return the card of a merged model: its base and adapters, how to load it, its training.

    Args:
        merge: its merge.json.
        task_type: peft's task type, like CAUSAL_LM.
        card: the model card of its first adapter.
    """
    adapters = ", ".join(f"`{a['name']}` (sha256 {a['sha256'][:12]})" for a in merge["adapters"])
    combined = f", combined by {merge['method']} {merge['weights']}," if "method" in merge else ""
    quant = merge["quant"] or {}
    held = f" as {quant.get('quant_type', 'int8')} held it, dequantised" if quant else ""
    kind = CLASSES[task_type].__name__
    training = LOADING.sub("", HEAD.sub("", card))
    return f"""---
library_name: transformers
tags:
- lora-exp
- merged
---

# {" + ".join(a["name"] for a in merge["adapters"])}, merged

A whole model in {merge["dtype"]}: {adapters}{combined} merged with lora-exp into
`{merge["base"]["path"]}` at `{merge["base"]["revision"]}`{held}. It needs no adapter and no peft.

To load it:

```python
from transformers import {kind}

model = {kind}.from_pretrained("{HERE}", dtype="auto")
```

## What was merged

{training}"""


def _counted(record: Mapping[str, Any]) -> str:
    counts = record["counts"]
    held_out = counts.get("eval_rows", 0)
    return f"{counts['train_rows']:,} rows to train on and {held_out:,} held out"


def _start(cfg: DictConfig) -> str:
    return f" It started from the adapter `{_tail(cfg.adapter)}`." if cfg.adapter else ""


def _tail(path: str) -> str:
    """Leave out of a folder what only this machine knows; a dotted name stays."""
    return "/".join(Path(path).parts[-2:])


def _short(source: str) -> str:
    """Leave out the folders of a local file."""
    return Path(source).name if Path(source).is_absolute() else source


def _loading(cfg: DictConfig) -> str:
    kind = CLASSES[cfg.algorithm.task_type].__name__
    if cfg.peft is None:
        return (
            f"from transformers import {kind}\n\n"
            f'model = {kind}.from_pretrained("{HERE}"{_attention(cfg)})'
        )
    packaged = cfg.model.path.startswith("pkg://")
    path = f'asset("{cfg.model.path}")' if packaged else f'"{cfg.model.path}"'
    options = {"revision": cfg.model.revision, "gguf_file": cfg.model.gguf_file}
    given = "".join(f', {name}="{value}"' for name, value in options.items() if value)
    given += _attention(cfg) + (", num_labels=1" if cfg.algorithm.task_type == "SEQ_CLS" else "")
    lines = ["from peft import PeftModel", f"from transformers import {kind}", ""]
    lines[:0] = ["from lora_exp.config import asset"] if packaged else []
    return "\n".join(
        [
            *lines,
            f"base = {kind}.from_pretrained({path}{given})",
            f'model = PeftModel.from_pretrained(base, "{HERE}")',
        ]
    )


def _attention(cfg: DictConfig) -> str:
    """Return the argument for an attention that transformers would not take by itself."""
    chosen = cfg.model.attn_implementation
    return "" if chosen in (None, "sdpa") else f', attn_implementation="{chosen}"'
