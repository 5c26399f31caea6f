"""A saved adapter fits its base in every weight, or is refused with the weight's name."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_exp import compose, load_adapter, run
from lora_exp.adapter.mounting import fitting, mount, mount_beside, read_config
from lora_exp.after.loading import load_base, side_by_side
from lora_exp.after.merging import merge
from lora_exp.after.proof import prove
from lora_exp.after.saved import find
from lora_exp.errors import AdapterError, ConfigError
from lora_exp.model.loading import base_of, bnb_4bit
from tests.adapter.test_rows import base_folder
from tests.adapter.test_targets import LAGUNA
from tests.conftest import tiny
from tests.model.test_mixture import GRANITE

Trained = Callable[..., Path]
TINY = "lora_exp/assets/tiny"
IDS = torch.tensor([[5, 9, 101, 7, 300, 12]])


@pytest.fixture
def folder(trained: Trained, tmp_path: Path) -> Path:
    shutil.copytree(trained("peft=lora") / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORRA"}, "LORRA"),
        ({"r": 0}, "does not fit this base"),
        ({"target_modules": ["c_attn"]}, "does not fit this base: Target modules"),
    ],
)
def test_a_config_that_peft_cannot_use_is_an_error(
    folder: Path, fresh_base: Any, changes: dict[str, Any], message: str
) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(AdapterError, match=message):
        mount(fresh_base.model, read_config(str(folder), fresh_base.model), str(folder), False)


def test_a_second_adapter_is_loaded_completely(
    folder: Path, trained: Trained, fresh_base: Any
) -> None:
    path = str(trained("peft=lora", "seed=7") / "adapter")
    model = mount(fresh_base.model, read_config(path, fresh_base.model), path, False)
    mount_beside(model, str(folder), "second")
    loaded = peft.get_peft_model_state_dict(
        model, adapter_name="second", save_embedding_layers=False
    )
    expected = load_file(folder / "adapter_model.safetensors")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_an_error_without_a_message_is_reported_by_its_class() -> None:
    with (
        pytest.raises(AdapterError, match="mine does not fit this base: ValueError"),
        fitting("mine"),
    ):
        raise ValueError


def save_with_embeddings(folder: Path, rows: int | None = None, **options: Any) -> Any:
    """Save an adapter with embeddings, as peft does when tokens were added; return the model."""
    torch.manual_seed(3)
    model = tiny().model
    if rows:
        model.resize_token_embeddings(rows)
    settings = {"target_modules": ["v_proj"], "init_lora_weights": False, "r": 4} | options
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        adapted.get_base_model().get_input_embeddings().weight.add_(0.1)
    adapted.save_pretrained(folder, save_embedding_layers=True)
    return adapted.eval()


def same_logits(model: Any, expected: Any) -> bool:
    with torch.no_grad():
        return torch.allclose(model(IDS).logits, expected(IDS).logits, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["lm_head", "v_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head", "o_proj"], "use_rslora": True},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
    ],
)
@pytest.mark.parametrize("added", [0, 5])
def test_embeddings_saved_with_an_adapter_are_loaded_with_it(
    tmp_path: Path, options: dict[str, Any], added: int
) -> None:
    rows = len(tiny().model.get_input_embeddings().weight) + added
    adapted = save_with_embeddings(tmp_path / "one", rows, **options)
    base, path = tiny().model, str(tmp_path / "one")
    model = mount(base, read_config(path, base), path, False)
    assert same_logits(model.eval(), adapted)
    assert base.config.vocab_size == rows
    loaded, _ = load_adapter(merge([path], tmp_path / "merged", base=TINY))
    assert same_logits(loaded, adapted)


def test_embeddings_that_change_a_shared_base_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "one")
    save_with_embeddings(tmp_path / "one")
    base = tiny().model
    before = base.get_input_embeddings().weight.clone()
    for attempt in (
        lambda: mount(base, read_config(path, base), path, False, apart=True),
        lambda: side_by_side([find(path)], load_base(find(path), TINY)),
        lambda: merge([path, path], tmp_path / "out", base=TINY),
        lambda: run(compose("tracking=none", f"adapter={path}"), tmp_path / "run"),
    ):
        with pytest.raises((AdapterError, ConfigError), match="changes the base itself: it holds"):
            attempt()
    assert torch.equal(base.get_input_embeddings().weight, before)


def test_embeddings_equal_to_the_bases_are_accepted(trained: Trained, tmp_path: Path) -> None:
    saved = [
        find(trained("peft=lora", "peft.target_modules=[embed_tokens,q_proj]", f"seed={seed}"))
        for seed in (1, 2)
    ]
    assert len(side_by_side(saved, load_base(saved[0]))) == 2
    paths = [adapter.folder for adapter in saved]
    assert prove(merge(paths, tmp_path / "out"), paths, max_new_tokens=4).holds


def test_a_starting_adapter_that_does_not_fit_the_classifier_is_refused(
    trained: Trained, tmp_path: Path
) -> None:
    adapter = shutil.copytree(trained("peft=lora") / "adapter", tmp_path / "start")
    reward = ["tracking=none", "algorithm=reward", "data=demo_pairs", f"adapter={adapter}"]
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    removed = next(iter(weights))
    save_file({key: value for key, value in weights.items() if key != removed}, file)
    with pytest.raises(AdapterError, match=f"does not fit this base: 1 .* the first is {removed}"):
        run(compose(*reward), tmp_path / "lost")
    added = {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(16, 192)}
    save_file(weights | added, file)
    with pytest.raises(AdapterError, match=r"does not fit this base: 1 .*layers\.9\.mlp"):
        run(compose(*reward), tmp_path / "more")
    save_file(weights | {removed: weights[removed][:, 1:].contiguous()}, file)
    with pytest.raises(AdapterError, match="does not fit this base: size mismatch"):
        run(compose(*reward), tmp_path / "size")


def test_an_adapter_of_which_peft_loads_only_a_part_is_refused(tmp_path: Path) -> None:
    """peft takes the names of Laguna's shared experts for those of its published files."""
    base = AutoModelForCausalLM.from_config(LAGUNA)
    config = peft.LoraConfig(target_modules=["shared_experts.up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_config(LAGUNA)
    with pytest.raises(AdapterError, match=r"peft does not load .*shared_experts\.up_proj\.lora_A"):
        mount(again, read_config(str(tmp_path), again), str(tmp_path), trainable=False)


def test_an_adapter_of_experts_is_refused_where_they_are_in_4_bits(
    folder_of: Callable[[Any], Path], tmp_path: Path
) -> None:
    place = ["model=local", f"model.path={folder_of(GRANITE)}", "quant=nf4"]
    model = base_of(compose(*place, "quant.experts=false")).model
    config = peft.LoraConfig(target_parameters=["experts.down_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    path = str(tmp_path / "adapter")
    config = read_config(path, model)
    for mounting in (
        lambda model: mount(model, config, path, trainable=False),
        lambda model: mount_beside(
            peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])), path, "second"
        ),
    ):
        with pytest.raises(AdapterError, match=r"adapts experts, and peft needs .*down_proj in fl"):
            mounting(base_of(compose(*place)).model)


def test_modules_that_were_trained_whole_are_refused_on_quantised_ones(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(**options, modules_to_save=["layers.1.mlp"])
    path = str(tmp_path / "adapter")
    peft.get_peft_model(tiny(None).model, config).save_pretrained(path)
    for mounting in (
        lambda model: mount(model, read_config(path, model), path, trainable=False),
        lambda model: mount_beside(
            peft.get_peft_model(model, peft.LoraConfig(**options)), path, "second"
        ),
    ):
        with pytest.raises(AdapterError, match=r"holds model\.layers\.1\.mlp as .*--quant none"):
            mounting(tiny(bnb_4bit("nf4", True, "float32")).model)


@pytest.mark.parametrize(("tied", "tying"), [(True, True), (True, False), (False, False)])
def test_adapters_of_embedding_and_output_layer_compute_as_in_peft(
    tmp_path: Path, tied: bool, tying: bool
) -> None:
    """As another tool saves them, which adapts both layers of a base as one, or apart."""
    folder = base_folder(tmp_path / "base", tied)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "embed_tokens", "lm_head"], init_lora_weights=False,
        task_type="CAUSAL_LM", ensure_weight_tying=tying,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(base, config).save_pretrained(str(tmp_path / "adapter"))
        plain = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        ours, _ = load_adapter(tmp_path / "adapter", base=str(folder))
        assert torch.equal(ours(input_ids=ids).logits, expected)
        merged, _ = load_adapter(tmp_path / "adapter", base=str(folder), merge=True)
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-4)
