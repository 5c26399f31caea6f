"""The base model, quantised while it loads, and its tokenizer.

Knows nothing of adapters, rows or trainers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from lora_exp.config.door import build
from lora_exp.errors import ConfigError
from lora_exp.files.paths import asset
from lora_exp.model.identity import identity_of
from lora_exp.model.mixture import without_router_logits
from lora_exp.model.padding import sees_padding
from lora_exp.model.placement import check_fits, device, device_map, too_small
from lora_exp.model.precision import dtype_of, is_quantised, lacks_bfloat16, slow_products
from lora_exp.model.prequantised import (
    SavedForm,
    dequantised_copy,
    read_prequantised,
    saved_form,
)
from lora_exp.model.quantised import misread, quantised_share, skip
from lora_exp.model.scoring import MADE, scored_at_last_token
from lora_exp.model.special_tokens import ensure_pad_token
from lora_exp.model.text_part import class_of, is_multimodal, name_body, text_of
from lora_exp.model.vocabulary import add_tokens as add_to
from lora_exp.model.weights import (
    check_gguf,
    gguf_as_floats,
    random_model,
    read_complete,
    without_gguf,
)
from lora_exp.parallel.world import world

# transformers' mark of having warned that a text is longer than the base's context
LONG = "sequence-length-is-longer-than-the-specified-maximum"


@dataclass(frozen=True)
class Base:
    """Frozen weights and the tokenizer that belongs to them."""

    model: Any
    tokenizer: Any
    path: str  # `model.path` of the config
    revision: str | None  # the hub commit that was loaded, or the SHA-256 of local weights
    warnings: tuple[str, ...] = ()  # what makes the base hard to load again, or another elsewhere
    form: SavedForm | None = None  # how it was saved quantised
    text_of: str | None = None  # the multimodal class whose language model it is
    # of transformers, that reads it; None: a classifier that only `register_classifier` makes
    auto_class: str | None = "AutoModelForCausalLM"
    quantised: tuple[float, str] | None = None  # see `quantised_share`

    @property
    def saved_as(self) -> str | None:
        """How its weights were saved quantised, such as nf4 or fp8; None: they were not."""
        return self.form.method if self.form else None

    @property
    def held(self) -> str | None:
        """What its weights are, if they were saved quantised: `nf4, as saved`; None: they were not.

        Weights that load dequantised may be quantised anew: then the run's config says how.
        """
        if self.form is None or (self.form.dequantised and is_quantised(self.model)):
            return None
        return self.form.held

    @property
    def attention(self) -> str:
        """How its attention is computed, by transformers' name."""
        return str(self.model.config.get_text_config()._attn_implementation)

    @property
    def facts(self) -> dict[str, Any]:
        """How it was loaded, for the record."""
        return {
            "attention": self.attention,
            "saved_as": self.saved_as,
            "quantised_share": self.quantised and round(self.quantised[0], 4),
            "auto_class": self.auto_class,
        }

    @property
    def dtype(self) -> str:
        """The dtype of its weights, by torch's name."""
        return str(self.model.dtype).removeprefix("torch.")


def bnb_4bit(
    quant_type: Literal["nf4", "fp4"],
    double_quant: bool,
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"],
    skip_modules: Sequence[str] | None = None,
    experts: bool = False,
) -> BitsAndBytesConfig:
    """Return bitsandbytes' 4-bit settings, `quant_type` nf4 or fp4.

    BitsAndBytesConfig itself takes any argument and falls back to fp4 on a typo. Products run in
    bfloat16, or in float16 on a GPU that has no bfloat16, unless `compute_dtype` names one. The
    modules called `skip_modules` stay in floats, and so do stacks of experts without `experts`.
    """
    if compute_dtype == "auto":
        compute_dtype = "float16" if lacks_bfloat16() else "bfloat16"
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype_of(compute_dtype),
        llm_int8_skip_modules=list(skip_modules or ()) or None,
    )
    config.experts = experts  # read by `Quantizer`
    return config


def bnb_8bit(
    outlier_threshold: float, skip_modules: Sequence[str] | None = None
) -> BitsAndBytesConfig:
    """Return bitsandbytes' 8-bit settings; activations above the threshold stay in float.

    So do the modules called `skip_modules`.
    """
    return BitsAndBytesConfig(
        load_in_8bit=True,
        llm_int8_threshold=outlier_threshold,
        llm_int8_skip_modules=list(skip_modules or ()) or None,
    )


def load(
    path: str,
    *,
    revision: str | None,
    gguf_file: str | None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"],
    attn_implementation: str,
    trust_remote_code: bool,
    random_weights: bool,
    quantization: BitsAndBytesConfig | None,
    add_tokens: Sequence[str] = (),
    task_type: str = "CAUSAL_LM",
    whole: bool = False,
) -> Base:
    """Load a base, every weight frozen, and its tokenizer.

    `task_type` is peft's: with SEQ_CLS the head returns one number. `whole`: a multimodal base is
    loaded with its towers, even where a text class reads it. The other arguments are those of
    conf/model/local.yaml; `quantization` comes from `bnb_4bit` or `bnb_8bit`.

    Raises:
        ConfigError: there is no model at the path, or it cannot be loaded in this way.
    """
    source, gguf = str(asset(path)), {"gguf_file": gguf_file} if gguf_file else {}
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    options |= {"revision": revision} if revision is not None else {}
    with _named(path, attn_implementation):
        if gguf_file and quantization:
            check_gguf(Path(source), gguf_file)
        tokenizer = AutoTokenizer.from_pretrained(source, **options, **gguf)
        tokenizer.deprecation_warnings[LONG] = True  # as if warned: long rows are cut, and counted
        config = AutoConfig.from_pretrained(source, **options, **gguf)
        form = None if gguf_file or random_weights else saved_form(config)
        attention = attention_of(attn_implementation)
        options |= {"dtype": dtype_of(dtype), "attn_implementation": attention}
        options |= device_map(anyway=bool(quantization or form))
        options |= {"num_labels": 1} if task_type == "SEQ_CLS" else {}
        model_class = class_of(config, task_type, whole)
        skip(quantization, model_class, config, trust_remote_code)
        if random_weights:
            model = random_model(model_class, source, options).to(device())
        else:
            model = _read(model_class, source, config, gguf_file, quantization, options)
        check_fits(model)
        share = quantised_share(model)
    _prepare(model, tokenizer, task_type, add_tokens)
    sha256, *warnings = identity_of(config, path, revision, gguf_file)
    warnings += [misread(model), slow_products(model)]
    is_made = task_type == "SEQ_CLS" and type(config) in MADE
    kind = text_of(model, config), None if is_made else model_class.__name__
    return Base(model, tokenizer, path, sha256, tuple(filter(None, warnings)), form, *kind, share)


def _prepare(model: Any, tokenizer: Any, task_type: str, add_tokens: Sequence[str]) -> None:
    """Freeze a model that was just read, after what changes its classes and embeddings.

    `model.sees_padding` then says whether prompts of several lengths can share a batch.
    """
    if task_type == "SEQ_CLS":
        loaded_class: Any = type(model)
        model.__class__ = scored_at_last_token(loaded_class)
    add_to(model, tokenizer, add_tokens)
    name_body(model)
    freeze(model, tokenizer)
    # a base whose layers are shared out computes only when they are: `preparation` measures it
    model.sees_padding = not world.in_step and sees_padding(model)


@contextmanager
def _named(path: str, attn_implementation: str) -> Iterator[None]:
    """Name the base in the error if it cannot be loaded."""
    try:
        yield
    except ConfigError:  # also a ValueError, and names its key already
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise unloadable(path, error, attn_implementation) from error


def _read(
    model_class: Any,
    source: str,
    config: Any,
    gguf_file: str | None,
    quantization: BitsAndBytesConfig | None,
    options: dict[str, Any],
) -> Any:
    """Read a model's weights, quantised while they are read, or as they were saved."""
    quantized = {"quantization_config": quantization} if quantization else {}
    if gguf_file and not quantization:
        return without_gguf(read_complete(model_class, source, options | {"gguf_file": gguf_file}))
    form, of_whole = saved_form(config), is_multimodal(config)
    # transformers cannot quantise such weights while it reads them: they become floats first, once
    if gguf_file:
        return read_complete(
            model_class, gguf_as_floats(Path(source), gguf_file), options | quantized
        )
    if form and form.dequantised and quantization:
        floats = dequantised_copy(source, form, config, options)
        options = {key: value for key, value in options.items() if key != "revision"}
        return read_complete(model_class, floats, options | quantized, of_whole)
    if form:
        return read_prequantised(model_class, source, form, quantization, options, of_whole)
    return read_complete(model_class, source, options | quantized, of_whole)


def base_of(cfg: DictConfig, whole: bool = False) -> Base:
    """Load the base that a config names, with the head that its algorithm trains; see `load`."""
    quantization = build(cfg, "quant")
    options = {"task_type": cfg.algorithm.task_type, "whole": whole}
    base: Base = build(cfg, "model", quantization=quantization, **options)
    return base


def unloadable(path: str, error: Exception, attn_implementation: str = "auto") -> ConfigError:
    """Return an error with one line of what transformers reports, which may be a page."""
    if "offload_folder" in str(error) or "are dispatched on the CPU" in str(error):
        return ConfigError([("device_map", too_small("parts"))])
    if "attn_implementation" in str(error) and attention_of(attn_implementation):
        text = f"{path} cannot be computed with {attn_implementation}; auto takes what it has"
        return ConfigError([("model.attn_implementation", text)])
    reason = " ".join(str(error).split()).partition(" Model type should be one of")[0]
    place = "" if asset(path).exists() else "no such folder here; from the Hub: "
    return ConfigError([("model.path", f"{path} cannot be loaded: {place}{reason}")])


def attention_of(attn_implementation: str | None) -> str | None:
    """Return transformers' name of an attention; None: its choice, sdpa where a class has it."""
    return None if attn_implementation == "auto" else attn_implementation


def freeze(model: Any, tokenizer: Any) -> None:
    """Freeze a model, set its pad token, and keep its weights and its outputs as they are."""
    without_router_logits(model)
    if hasattr(model.config, "rescale_every"):
        # RWKV halves weights in evaluation, against overflows of float16, but no adapter's; the
        # norm at its end makes that no difference
        model.config.rescale_every = 0
    ensure_pad_token(tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    for module in model.modules():
        # CPUs with AVX512-BF16 repack 4-bit weights in place at the first evaluation; training then
        # gets wrong gradients, without an error
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
