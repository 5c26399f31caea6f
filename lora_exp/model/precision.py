"""The dtypes in which a base is stored, held and computed."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from lora_exp.files.paths import asset
from lora_exp.model.mixture import expert_count
from lora_exp.model.placement import device
from lora_exp.model.processor import processor

STORED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors' names


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of a name; `auto` is bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        return torch.bfloat16 if has_bfloat16() else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def stored_dtype(model: Any) -> str | None:
    """Return the dtype of a base's stored weights; None: unknown.

    Args:
        model: a config's `model` section.
    """
    if model.gguf_file or model.random_weights:
        return None
    folder = asset(model.path)
    try:
        for file in sorted(folder.glob("*.safetensors"))[:1]:
            with safe_open(str(file), "pt") as tensors:
                dtypes = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
            return next((name for stored, name in STORED.items() if stored in dtypes), None)
        config = AutoConfig.from_pretrained(str(folder), revision=model.revision)
    except (OSError, ValueError, SafetensorError):
        return None  # the error comes when it is loaded
    name = str(config.dtype).removeprefix("torch.")
    return name if name in STORED.values() else None


def has_bfloat16() -> bool:
    """Return whether there is a GPU with native bfloat16: older ones emulate it, slowly."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def lacks_bfloat16() -> bool:
    """Return whether there is a GPU that would have to emulate bfloat16."""
    return torch.cuda.is_available() and not has_bfloat16()


def is_quantised(model: Any) -> bool:
    """Return whether a model's weights are bitsandbytes' integers."""
    return getattr(model, "quantization_method", None) is not None


def autocast_dtype(model: Any, trains_whole: bool = False) -> torch.dtype | None:
    """Return the 16-bit dtype that products on a base are computed in.

    A quantised base computes in bfloat16, or in float16 where its config or the GPU requires it,
    or as it is where a 4-bit config says float32; bfloat16 weights in bfloat16; float32 weights as
    they are, unless all of them train on a GPU that has bfloat16.

    Args:
        model: the base, with or without adapters.
        trains_whole: whether all its weights train.

    Returns:
        The dtype for autocast; None: products are computed in the dtype of the weights.
    """
    if is_quantised(model):
        quantization = model.config.quantization_config
        configured = getattr(quantization, "bnb_4bit_compute_dtype", None)
        if configured == torch.float32 and getattr(quantization, "load_in_4bit", False):
            return None
        half = configured == torch.float16 or lacks_bfloat16()
        return torch.float16 if half else torch.bfloat16
    if model.dtype == torch.bfloat16 or (trains_whole and has_bfloat16()):
        return torch.bfloat16
    return None


def slow_products(model: Any) -> str | None:
    """Return a warning if the processor has no instructions for a base's products in bfloat16.

    torch then computes them term by term: a run of the embedded model in 4 bits took 6 times as
    long as in float32.
    """
    flags = processor().get("flags", "").split()
    if autocast_dtype(model) != torch.bfloat16 or device() != "cpu":
        return None
    if "avx2" not in flags or "avx512bw" in flags:
        return None
    if not is_quantised(model):
        key, cure = "model", "model.dtype=float32"
    elif getattr(model.config.quantization_config, "load_in_4bit", False):
        key, cure = "quant", "quant.compute_dtype=float32"
    else:
        key, cure = "quant", "quant=none"
    text = "this processor has no AVX-512, and computes in bfloat16 many times slower than in"
    return f"{key}: {text} float32; {cure}"


def autocast(model: Any) -> torch.autocast:
    """Return a context in which a base computes as in the runs that train an adapter on it."""
    dtype = autocast_dtype(model)
    return torch.autocast(model.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


@torch.no_grad()
def computes_in_float64(model: Any) -> bool:
    """Return whether a model with float32 weights can compute in float64.

    Quantised layers cannot, and some classes round to float32 on the way (Inkling 2).
    """
    if is_quantised(model):
        return False
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    try:
        computing_in(torch.float64, model)(input_ids=ids, use_cache=False, **decoder)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    finally:
        model.to(torch.float32)
    return True


def computing_in(dtype: torch.dtype, model: Any) -> Any:
    """Convert a model's weights to a dtype; in float64, which torch does not group, experts too.

    Args:
        dtype: of the weights.
        model: the base, with or without adapters.
    """
    if dtype == torch.float64 and expert_count(model.config) is not None:
        model.set_experts_implementation("eager")
    return model.to(dtype)
