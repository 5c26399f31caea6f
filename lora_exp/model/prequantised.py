"""Bases that were saved quantised: trained as they are, or dequantised while they load.

Knows nothing of bases that are quantised while they load: `loading` does that.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from lora_exp.config.pairs import QUANTISATIONS
from lora_exp.errors import ConfigError
from lora_exp.model.precision import lacks_bfloat16
from lora_exp.model.text_part import class_of
from lora_exp.model.weights import as_floats, read_complete


@dataclass(frozen=True)
class SavedForm:
    """How a base's weights were saved."""

    method: str  # of `QUANTISATIONS` where it is bitsandbytes', else transformers' name
    settings: Mapping[str, Any]  # `quantization_config` of its config.json

    @property
    def dequantised(self) -> bool:
        """Whether transformers dequantises such weights while it loads them."""
        config_class = AUTO_QUANTIZATION_CONFIG_MAPPING.get(self.method)
        known = inspect.signature(config_class).parameters if config_class else ()
        return "dequantize" in known

    @property
    def held(self) -> str:
        """What the loaded weights are, in words."""
        return f"{self.method}, " + ("dequantised" if self.dequantised else "as saved")

    def options(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` that dequantise the weights, where it can."""
        if not self.dequantised:
            return {}
        config_class = AUTO_QUANTIZATION_CONFIG_MAPPING[self.method]
        return {
            "quantization_config": config_class.from_dict({**self.settings, "dequantize": True})
        }


def saved_form(config: Any) -> SavedForm | None:
    """Return how a base was saved quantised; None: it is not.

    Args:
        config: the base's.
    """
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    if settings.get("load_in_4bit"):
        return SavedForm(settings.get("bnb_4bit_quant_type", "fp4"), settings)
    if settings.get("load_in_8bit"):
        return SavedForm("int8", settings)
    return SavedForm(str(settings.get("quant_method")), settings)


def _check_asked(form: SavedForm, quantization: BitsAndBytesConfig) -> None:
    """Refuse to quantise a base in another way than it was saved in.

    Raises:
        ConfigError: they differ.
    """
    asked = quantization.bnb_4bit_quant_type if quantization.load_in_4bit else "int8"
    if not form.dequantised and asked != form.method:
        text = f"{asked}, but the base was saved as {form.method}; leave quant out to take it so"
        raise ConfigError([("quant", f"{text}, or take its unquantised original")])


def read_prequantised(
    model_class: Any,
    source: str,
    form: SavedForm,
    quantization: BitsAndBytesConfig | None,
    options: dict[str, Any],
    of_whole: bool,
) -> Any:
    """Read a base that was saved quantised: as it is, or dequantised.

    Args:
        model_class: an auto class.
        source: a folder or a hub id.
        form: how it was saved.
        quantization: how the run quantises it; None: as it was saved.
        options: of `from_pretrained`.
        of_whole: whether the files also hold towers that the class leaves out.

    Raises:
        ConfigError: it is to be quantised in another way than it was saved in.
        ValueError: transformers cannot read it here.
    """
    if quantization:
        _check_asked(form, quantization)
    try:
        model = read_complete(model_class, source, options | form.options(), of_whole)
    except (ImportError, RuntimeError, NotImplementedError) as error:
        reason = str(error).strip() or type(error).__name__
        text = f"it is quantised ({form.method}), and transformers cannot read that here: {reason}"
        cure = "or take its unquantised original, with quant=nf4"
        raise ValueError(f"{text}; {cure}") from error
    if form.dequantised:
        _check_floats(model, form, options["dtype"])
        forget_quantisation(model)
    elif form.method in QUANTISATIONS:
        _settle_compute_dtype(model, quantization)
    return model


def _check_floats(model: Any, form: SavedForm, dtype: torch.dtype) -> None:
    """Give dequantised weights the dtype that was asked for: transformers' are bfloat16.

    Raises:
        ValueError: a weight was not dequantised.
    """
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise ValueError(f"it is quantised ({form.method}), and {name} stays {weight.dtype}")
        if weight.dtype == torch.bfloat16:
            weight.data = weight.data.to(dtype)


def forget_quantisation(model: Any) -> None:
    """Let a dequantised model be saved plainly: transformers would reverse how it read the weights.

    It would quantise them again, without a word of it in the config, or raise NotImplementedError.
    """
    conversions = getattr(model, "_weight_conversions", None) or []
    quantising = [c for c in conversions if _quantises(c)]
    if not quantising:
        return
    targets = [c._original_target_patterns for c in quantising]
    model._weight_conversions = [c for c in conversions if c not in quantising] + [
        plain
        for plain in get_model_conversion_mapping(model, add_legacy=False)
        if plain._original_target_patterns in targets
    ]


def _quantises(conversion: Any) -> bool:
    operations = [
        *getattr(conversion, "operations", ()),
        getattr(conversion, "quantization_operation", None),
    ]
    return any(hasattr(operation, "hf_quantizer") for operation in operations)


def _settle_compute_dtype(model: Any, quantization: BitsAndBytesConfig | None) -> None:
    """Let 4-bit layers compute as in a run that quantises them: the saved dtype is a machine's."""
    dtype = torch.float16 if lacks_bfloat16() else torch.bfloat16
    dtype = quantization.bnb_4bit_compute_dtype if quantization else dtype
    for module in model.modules():
        if hasattr(module, "compute_type_is_set"):
            module.compute_dtype, module.compute_type_is_set = dtype, True
    model.config.quantization_config.bnb_4bit_compute_dtype = dtype


def dequantised_copy(source: str, form: SavedForm, config: Any, options: dict[str, Any]) -> str:
    """Return a folder with a base's dequantised weights in bfloat16, to quantise them otherwise."""
    files = [file.stat() for file in Path(source).glob("*.safetensors")]
    sizes = f"{sum(f.st_size for f in files)}-{max((f.st_mtime_ns for f in files), default=0)}"
    commit = getattr(config, "_commit_hash", None)
    model_class = class_of(config, "CAUSAL_LM", whole=True)
    options = {"revision": options.get("revision"), "dtype": torch.bfloat16}
    return as_floats(
        str(Path(source).resolve()) if files else source,
        sizes if files else str(commit),
        lambda: read_prequantised(model_class, source, form, None, options, False),
    )
