"""The base model, quantised while it loads, and its tokenizer.

Knows nothing of adapters, rows or trainers.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils import logging

from lora_exp.config.door import build
from lora_exp.errors import ConfigError
from lora_exp.files.lock import hold
from lora_exp.files.paths import asset, cache_dir
from lora_exp.files.whole import whole
from lora_exp.model.identity import identity_of
from lora_exp.model.precision import dtype_of, lacks_bfloat16
from lora_exp.model.scoring import scored_at_last_token
from lora_exp.model.special_tokens import ensure_pad_token

CLASSES: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
}


@dataclass(frozen=True)
class Base:
    """Frozen weights and the tokenizer that belongs to them."""

    model: Any
    tokenizer: Any
    path: str  # as the config names it
    revision: str | None  # the hub commit that was loaded, or the SHA-256 of local weights
    warning: str | None  # what makes the base hard to load again


def bnb_4bit(
    quant_type: Literal["nf4", "fp4"],
    double_quant: bool,
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"],
) -> BitsAndBytesConfig:
    """Return bitsandbytes' 4-bit settings, `quant_type` nf4 or fp4.

    BitsAndBytesConfig itself takes any argument and falls back to fp4 on a typo. Products run in
    bfloat16, or in float16 on a GPU that has no bfloat16, unless `compute_dtype` says otherwise.
    """
    if compute_dtype == "auto":
        compute_dtype = "float16" if lacks_bfloat16() else "bfloat16"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype_of(compute_dtype),
    )


def bnb_8bit(outlier_threshold: float) -> BitsAndBytesConfig:
    """Return bitsandbytes' 8-bit settings; activations above the threshold stay in float."""
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=outlier_threshold)


def load(
    path: str,
    *,
    revision: str | None,
    gguf_file: str | None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"],
    attn_implementation: str | None,
    trust_remote_code: bool,
    random_weights: bool,
    quantization: BitsAndBytesConfig | None,
    task_type: str = "CAUSAL_LM",
) -> Base:
    """Load a base and its tokenizer; every weight frozen unless it is trained whole later.

    `task_type` is peft's name of what it is for: with SEQ_CLS the head gives one number. The others
    are those of conf/model/local.yaml, and `quantization` from `bnb_4bit` or `bnb_8bit`.

    Raises:
        ConfigError: the path holds no model, or not one that can be loaded this way.
    """
    source = str(asset(path))
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    common = {key: value for key, value in common.items() if value is not None}
    gguf = {"gguf_file": gguf_file} if gguf_file else {}
    kind = CLASSES[task_type]
    options = {
        **common,
        **({"num_labels": 1} if task_type == "SEQ_CLS" else {}),
        "dtype": dtype_of(dtype),
        "attn_implementation": attn_implementation,
        **({"device_map": {"": device()}} if torch.cuda.is_available() or quantization else {}),
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **common, **gguf)
        if not gguf_file:
            _check_unquantised(AutoConfig.from_pretrained(source, **common))
        if random_weights:
            model = _untrained(kind, source, options)
        elif gguf_file and quantization:
            # transformers cannot quantise while it reads GGUF: go through float weights, once
            floats = _dequantised(Path(source), gguf_file)
            model = _whole(kind, floats, options | {"quantization_config": quantization})
        else:
            quantized = {"quantization_config": quantization} if quantization else {}
            model = _whole(kind, source, options | gguf | quantized)
            model = _floats(model) if gguf_file else model
    except ConfigError:  # also a ValueError, and says its key already
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise unloadable(path, error) from error
    if task_type == "SEQ_CLS":
        plain: Any = type(model)
        model.__class__ = scored_at_last_token(plain)
    settle(model, tokenizer)
    found, warning = identity_of(model, path, revision, gguf_file)
    return Base(model, tokenizer, path, found, warning)


def base_of(cfg: DictConfig) -> Base:
    """Load the base that a config names, for what its algorithm trains it to do."""
    quantization = build(cfg, "quant")
    task_type = cfg.algorithm.task_type
    base: Base = build(cfg, "model", quantization=quantization, task_type=task_type)
    return base


def unloadable(path: str, error: Exception) -> ConfigError:
    """Return in a line what transformers tells, sometimes on a page, of a model it cannot load."""
    told = " ".join(str(error).split())
    place = "" if asset(path).exists() else "no such folder here; from the Hub: "
    return ConfigError([("model.path", f"{path} cannot be loaded: {place}{told}")])


def device() -> str:
    """Return the one device that a run uses."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def _check_unquantised(config: Any) -> None:
    """Refuse a base that was saved quantised: it cannot be held otherwise, nor merged into.

    Raises:
        ValueError: it was.
    """
    saved = getattr(config, "quantization_config", None)
    if saved is not None:
        method = saved.get("quant_method") if isinstance(saved, dict) else saved.quant_method
        raise ValueError(f"it is quantised ({method}); name what it was made from, with quant=nf4")


def _whole(kind: Any, source: str, options: dict[str, Any]) -> Any:
    """Load a model of which every weight is there; only a classification head may be new.

    Raises:
        ValueError: some are not; transformers would draw them anew, and go on.
    """
    reports = logging.get_logger("transformers.modeling_utils")
    reports.addFilter(_no_report)  # a table of what is told here in a line
    try:
        model, found = kind.from_pretrained(
            source, **options, output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        reports.removeFilter(_no_report)
    heads = ("score.", "lm_head.") if kind is AutoModelForSequenceClassification else ()
    lost = sorted(key for key in found["missing_keys"] if not key.startswith(heads))
    if lost:
        cure = "fetch it again" + ("; a reward's head must be called score" if heads else "")
        raise ValueError(f"its files lack {len(lost)} weights, the first is {lost[0]}; {cure}")
    if other := sorted(
        (key, list(saved), list(own)) for key, saved, own in found["mismatched_keys"]
    ):
        key, saved, own = other[0]
        text = f"{len(other)} of its weights have other sizes than its config.json says"
        raise ValueError(f"{text}, the first is {key}: {saved}, not {own}")
    if rest := sorted(key for key in found["unexpected_keys"] if not key.startswith(heads)):
        told = "%d weights in %s have no place in the model, the first is %s"
        logging.get_logger("lora_exp").warning(told, len(rest), source, rest[0])
    return model


def _no_report(said: Any) -> bool:
    return "LOAD REPORT" not in said.getMessage()


def _untrained(kind: Any, source: str, options: dict[str, Any]) -> Any:
    built = ("dtype", "attn_implementation", "device_map")
    config = AutoConfig.from_pretrained(
        source, **{key: value for key, value in options.items() if key not in built}
    )
    model = kind.from_config(
        config, dtype=options["dtype"], attn_implementation=options["attn_implementation"]
    )
    return model.to(device())


def new_head(model: Any) -> None:
    """Give a classification model a head of its own, drawn now: a shared base may carry another's.

    In float32 on every base, as what is trained whole is.
    """
    width = model.config.get_text_config().hidden_size
    head = nn.Linear(width, model.config.num_labels, bias=False, device=model.device)
    nn.init.normal_(head.weight, std=model.config.get_text_config().initializer_range)
    model.score = head


def sharing_copy(model: Any) -> Any:
    """Copy the tree of modules, not the tensors: weights and quantisation states are the originals.

    8-bit layers move their weights' scales at their first use: here it is done before the copy.
    """
    kept: list[Any] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if hasattr(module, "init_8bit_state") and module.weight.CB is not None:
            module.init_8bit_state()
        state = getattr(module, "state", None)
        kept += [t for t in vars(state).values() if isinstance(t, torch.Tensor)] if state else []
        weight = getattr(module, "weight", None)
        states = (getattr(owner, "quant_state", None) for owner in (module, weight))
        kept += [state for state in states if state is not None]
    return copy.deepcopy(model, {id(x): x for x in kept})


def dequantise(model: Any, dtype: torch.dtype) -> Any:
    """Turn a quantised model's layers into plain ones that hold the floats they stand for."""
    exact_products(model, dtype)
    speaks = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of the very dtype that it was asked for
    try:
        model = model.dequantize(dtype=dtype).to(dtype)
    finally:
        logging.set_verbosity(speaks)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False  # peft asks before it merges
    return model.requires_grad_(False)


def exact_products(model: Any, dtype: torch.dtype) -> None:
    """Have 4-bit layers turn their weights into floats of this dtype, and multiply in it."""
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.dtype = dtype
            module.compute_dtype, module.compute_type_is_set = dtype, True


def _dequantised(folder: Path, gguf_file: str) -> str:
    """Return a folder with a GGUF file's weights as float32 safetensors, made once and kept.

    The copy of the file as it was before goes: copies would fill the cache.
    """
    if not (folder / gguf_file).is_file():
        text = f"{gguf_file} of a hub model cannot be quantised; download it, and name its folder"
        raise ConfigError([("model.gguf_file", text)])
    file = (folder / gguf_file).resolve()
    kept = cache_dir() / "gguf" / hashlib.sha256(str(file).encode()).hexdigest()[:32]
    kept.mkdir(parents=True, exist_ok=True)
    floats = kept / f"{file.stat().st_size}-{file.stat().st_mtime_ns}"
    lock = hold(kept / ".lock", wait=True)  # two runs may do this at once
    try:
        if not floats.is_dir():
            for stale in kept.iterdir():  # of the file as it was, or of a process that was killed
                if stale.is_dir():
                    shutil.rmtree(stale)
            model = _floats(_whole(AutoModelForCausalLM, str(folder), {"gguf_file": gguf_file}))
            with whole(floats) as made:
                model.save_pretrained(made)
    finally:
        lock.release()
    return str(floats)


def _floats(model: Any) -> Any:
    """Forget that the weights came from GGUF: they are plain floats now, and can be saved."""
    model.hf_quantizer.remove_quantization_config(model)
    return model


def settle(model: Any, tokenizer: Any) -> None:
    """Freeze a model, give it a padding token, and keep its 4-bit weights as they are."""
    ensure_pad_token(tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    for module in model.modules():
        # CPUs with AVX512-BF16 repack 4-bit weights in place at the first evaluation, and training
        # then gets wrong gradients without a word
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
