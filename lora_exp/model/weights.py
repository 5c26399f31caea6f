"""A model's weights: all read from its files, or drawn at random; incomplete files are refused.

Knows nothing of tokenizers and devices.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from lora_exp.errors import ConfigError
from lora_exp.files.lock import hold
from lora_exp.files.paths import cache_dir
from lora_exp.files.whole import whole

# what transformers logs of faults for which we have one line, and where: a table with a line for
# each weight, and the advice to open an issue where no layer was quantised
REPORTS = ("LOAD REPORT", "double check your model architecture")
REPORTING = ("transformers.modeling_utils", "transformers.integrations.bitsandbytes")
CONVERSION = "during automatic conversion of the weights"  # in the error of from_pretrained


def read_complete(
    model_class: Any, source: str, options: dict[str, Any], of_whole: bool = False
) -> Any:
    """Load a model whose files have every weight; only a classification head may be new.

    Args:
        model_class: an auto class.
        source: a folder or a hub id.
        options: of `from_pretrained`.
        of_whole: whether the files also hold towers that the class leaves out.

    Raises:
        ValueError: some are missing or of other shapes, which transformers would draw at random;
            or there is an adapter too, which it has put on the model.
    """
    loggers = [logging.get_logger(name) for name in REPORTING]
    for logger in loggers:
        logger.addFilter(_is_no_report)
    try:
        model, loading_info = model_class.from_pretrained(
            source, **options, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except RuntimeError as error:
        if CONVERSION not in str(error):
            raise
        text = "transformers cannot put its weights together: some are missing, or of other sizes"
        raise ValueError(f"{text}; fetch it again") from error
    finally:
        for logger in loggers:
            logger.removeFilter(_is_no_report)
    if getattr(model, "peft_config", None):
        raise ValueError("there is an adapter too (adapter_config.json); give a model without it")
    is_classifier = model_class is AutoModelForSequenceClassification
    heads = ("score.", "lm_head.") if is_classifier else ()
    missing = sorted(key for key in loading_info["missing_keys"] if not key.startswith(heads))
    if missing:
        fix = "fetch it again" + ("; a reward's head must be called score" if heads else "")
        raise ValueError(f"its files lack {len(missing)} weights, the first is {missing[0]}; {fix}")
    if mismatched := sorted(
        (key, list(saved), list(expected))
        for key, saved, expected in loading_info["mismatched_keys"]
    ):
        key, saved, expected = mismatched[0]
        text = f"{len(mismatched)} of its weights have other sizes than its config.json says"
        raise ValueError(f"{text}, the first is {key}: {saved}, not {expected}")
    unexpected = sorted(k for k in loading_info["unexpected_keys"] if not k.startswith(heads))
    if unexpected and not of_whole:
        text = "%d weights in %s have no place in the model, the first is %s"
        logging.get_logger("lora_exp").warning(text, len(unexpected), source, unexpected[0])
    return model


def _is_no_report(record: Any) -> bool:
    return not any(text in record.getMessage() for text in REPORTS)


def random_model(model_class: Any, source: str, options: dict[str, Any]) -> Any:
    """Return a model of random weights, on the CPU; only its config is read."""
    of_the_model = ("dtype", "attn_implementation", "device_map")
    config = AutoConfig.from_pretrained(
        source, **{key: value for key, value in options.items() if key not in of_the_model}
    )
    return model_class.from_config(
        config, dtype=options["dtype"], attn_implementation=options["attn_implementation"]
    )


def check_gguf(folder: Path, gguf_file: str) -> None:
    """Refuse to quantise a GGUF file that is not in a local folder.

    Raises:
        ConfigError: it is not.
    """
    if not (folder / gguf_file).is_file():
        text = f"{gguf_file} of a hub model cannot be quantised; download it, and name its folder"
        raise ConfigError([("model.gguf_file", text)])


def gguf_as_floats(folder: Path, gguf_file: str) -> str:
    """Return a folder with a GGUF file's weights as float32 safetensors; see `as_floats`."""
    file = (folder / gguf_file).resolve()
    options = {"gguf_file": gguf_file}
    return as_floats(
        str(file),
        f"{file.stat().st_size}-{file.stat().st_mtime_ns}",
        lambda: without_gguf(read_complete(AutoModelForCausalLM, str(folder), options)),
    )


def as_floats(source: str, version: str, read: Callable[[], Any]) -> str:
    """Return a folder with a model's weights as floats in safetensors, written once and cached.

    The cached copy of another version is deleted: copies would fill the disk.

    Args:
        source: identifies the model.
        version: of its files.
        read: returns the model.
    """
    copies = cache_dir() / "floats" / hashlib.sha256(source.encode()).hexdigest()[:32]
    copies.mkdir(parents=True, exist_ok=True)
    floats = copies / version
    lock = hold(copies / ".lock", wait=True)  # two runs may do this at once
    try:
        if not floats.is_dir():
            for stale in copies.iterdir():  # of an earlier version, or of a killed process
                if stale.is_dir():
                    shutil.rmtree(stale)
            model = read()
            with whole(floats) as staged:
                model.save_pretrained(staged)
    finally:
        lock.release()
    return str(floats)


def without_gguf(model: Any) -> Any:
    """Remove GGUF from a model's config: its weights are plain floats, and it can be saved."""
    model.hf_quantizer.remove_quantization_config(model)
    return model
