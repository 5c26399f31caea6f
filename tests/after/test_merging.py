"""Merging and its proof: the merged model answers as the adapter on its base."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from lora_exp import compose
from lora_exp.adapter.attach import attach
from lora_exp.after.loading import load_adapter
from lora_exp.after.merging import merge
from lora_exp.after.proof import prove
from lora_exp.after.saved import find
from lora_exp.after.soundness import check_model
from lora_exp.errors import AdapterError, ConfigError, SavedError
from lora_exp.model.loading import bnb_4bit
from tests.after.copies import copy_run, copy_with_weights
from tests.after.test_saved import ADALORA
from tests.conftest import computes_bfloat16_fast, tiny
from tests.model.test_prequantised import saved
from tests.model.test_text_part import llava, mllama

Trained = Callable[..., Path]
TOWER = "vision"
METHODS = ["lora", "dora", "rslora", "pissa", "olora", "ia3", "vera", "oft", "ln_tuning", "adalora"]


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_model_equals_the_adapter_on_its_base_for_every_method(
    trained: Trained, tmp_path: Path, method: str
) -> None:
    run = trained(f"peft={method}", *(ADALORA if method == "adalora" else ()))
    merged = merge([run], tmp_path / "merged")
    proof = prove(merged, [run])
    assert proof.max_difference < 1e-4
    assert proof.top1_agreement == 1
    assert proof.same_text == 1
    assert proof.holds
    assert not any(check_model(merged).values())


@pytest.mark.parametrize(
    ("method", "quant", "overrides"),
    [
        ("lora", "nf4", ()),
        (
            "lora",
            "nf4",
            ("quant.double_quant=false", "model.dtype=bfloat16", "quant.compute_dtype=auto"),
        ),
        ("dora", "nf4", ()),
        ("ia3", "nf4", ()),
        ("lora", "int8", ()),
        ("ia3", "int8", ()),
    ],
)
def test_merging_into_the_dequantised_base_equals_the_adapter_on_the_quantised_base(
    trained: Trained, tmp_path: Path, method: str, quant: str, overrides: tuple[str, ...]
) -> None:
    run = trained(f"peft={method}", f"quant={quant}", *overrides)
    merged = merge([run], tmp_path / "merged", into="dequantised")
    assert prove(merged, [run]).max_difference < 1e-3
    original = merge([run], tmp_path / "original", dtype="float32")
    assert prove(original, [run]).max_difference < 1e-4  # on the unquantised base
    assert not prove(original, [run], quant=quant).holds  # the quantised base has other weights


@pytest.mark.parametrize(
    "config", [llava(), mllama(cross_attention_layers=[])], ids=lambda config: config.model_type
)
def test_a_merge_keeps_the_towers_and_the_processor_of_a_multimodal_base(
    config: Any, folder_of: Callable[[Any], Path], quick_run: Callable[..., Any], tmp_path: Path
) -> None:
    base = folder_of(config)
    (base / "preprocessor_config.json").write_text('{"size": 28}')
    options = ["model=local", f"model.path={base}", "rate.model=30"]
    with pytest.raises(ConfigError, match="longer than the model's context of 256 tokens"):
        quick_run(*options, "algorithm.args.max_length=300", name="too_long")
    run = quick_run(*options, "algorithm.args.max_length=128").directory
    assert not [key for key in load_file(run / "adapter/adapter_model.safetensors") if TOWER in key]
    merged = merge([run], tmp_path / "merged")
    architecture = json.loads((base / "config.json").read_text())["architectures"]
    assert json.loads((merged / "config.json").read_text())["architectures"] == architecture
    assert (merged / "preprocessor_config.json").read_text() == '{"size": 28}'
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    assert before.keys() == after.keys()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed
    assert not [key for key in changed if TOWER in key or "projector" in key]
    assert prove(merged, [run]).holds
    auto_class = json.loads((run / "run.json").read_text())["auto_class"]
    assert f"{auto_class}.from_pretrained" in (run / "adapter/README.md").read_text()
    plain = PeftModel.from_pretrained(
        getattr(transformers, auto_class).from_pretrained(base), run / "adapter"
    )
    ids = torch.tensor([[1, 40, 90, 7]])
    assert torch.equal(plain(input_ids=ids).logits, load_adapter(run)[0](input_ids=ids).logits)


@pytest.fixture
def on_saved_nf4(
    tmp_path: Path, quick_run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> Path:
    """A run on a base that was saved in 4 bits."""
    computed = "auto" if computes_bfloat16_fast() else "float32"
    base = saved(tmp_path / "tiny-4bit", bnb_4bit("nf4", True, computed))
    overrides = ["model=local", f"model.path={base}", "train.learning_rate=3e-3"]
    directory: Path = quick_run(*overrides).directory
    assert "nf4, as saved" in capsys.readouterr().out
    return directory


def test_an_adapter_of_a_saved_quantised_base_is_merged_into_its_dequantised_weights(
    on_saved_nf4: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = on_saved_nf4
    assert json.loads((run / "run.json").read_text())["saved_as"] == "nf4"
    merged = merge([run], tmp_path / "merged", into="dequantised")
    assert prove(merged, [run]).max_difference < 1e-3
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert "merged into its dequantised weights" not in caplog.text
    same = merge([run], tmp_path / "same")
    assert "--base tiny-4bit=ORIGINAL merges into the original" in caplog.text
    assert json.loads((same / "merge.json").read_text())["into"] == "dequantised"


def test_an_adapter_of_a_saved_quantised_base_is_merged_into_the_original_by_name(
    on_saved_nf4: Path, tmp_path: Path
) -> None:
    run, original = on_saved_nf4, "lora_exp/assets/tiny"
    with pytest.raises(AdapterError, match=r"tiny-4bit, not on lora_exp/assets/tiny; .*--base"):
        merge([run], tmp_path / "refused", base=original)
    merged = merge([run], tmp_path / "merged", base=f"tiny-4bit={original}", dtype="float32")
    assert prove(merged, [run]).max_difference < 1e-4  # the record names the original
    model, _ = load_adapter(run, base=f"tiny-4bit={original}")
    assert model.get_base_model().quantization_method == "bitsandbytes"  # as in its run
    go_on = [f"adapter={run}/adapter", "quant=nf4", "train.max_steps=1", "samples.rows=0"]
    with pytest.raises(ConfigError, match=r"^adapter: .* give adapter_base=tiny-4bit$"):
        compose(*go_on)
    cfg = compose("tracking=none", *go_on, "adapter_base=tiny-4bit")
    assert attach(tiny(bnb_4bit("nf4", True, "auto")), cfg, tmp_path).trainable


def test_an_adapted_embedding_does_not_change_the_tied_head(
    trained: Trained, tmp_path: Path
) -> None:
    run = trained("peft=lora", "peft.target_modules=[embed_tokens,q_proj]")
    assert prove(merge([run], tmp_path / "merged"), [run]).holds
    trained_embedding = trained("peft=lora", "targets=qv", "+peft.modules_to_save=[embed_tokens]")
    assert prove(merge([trained_embedding], tmp_path / "whole"), [trained_embedding]).holds


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_proof_fails_for_the_base_alone_even_if_the_adapter_changes_little(
    trained: Trained, tmp_path: Path, dtype: str
) -> None:
    model, tokenizer = load_adapter("lora_exp/assets/tiny")
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    run = trained("peft=lora", "train.learning_rate=1e-4", "train.max_steps=4")
    assert not prove(tmp_path / "bare", [run]).holds


def test_a_merged_reward_model_gives_the_scores_of_its_adapter(
    trained: Trained, tmp_path: Path
) -> None:
    run = trained("algorithm=reward", "data=demo_pairs", "samples.rows=0")
    proof = prove(merge([run], tmp_path / "merged"), [run])
    assert proof.holds
    assert proof.effect > 0


def test_a_merged_model_inside_its_run_is_not_quantised_again(
    trained: Trained, tmp_path: Path
) -> None:
    run = copy_run(trained("peft=lora", "quant=nf4"), tmp_path / "run")
    merged = merge([run], run / "merged", into="dequantised")
    assert find(merged).run is None
    assert prove(merged, [run]).holds
    assert not any(check_model(merged).values())


def test_a_second_adapter_is_checked_as_the_first(trained: Trained, tmp_path: Path) -> None:
    run = trained("peft=lora")
    second = copy_run(trained("peft=lora", "seed=7"), tmp_path / "second")
    file = second / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file(dict(list(weights.items())[2:]), file)
    with pytest.raises(AdapterError, match="does not fit this base"):
        merge([run, second], tmp_path / "merged")
    config = second / "adapter" / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"rank_pattern": {r"([\w.]+)+!": 4}}))
    started = time.perf_counter()
    with pytest.raises(AdapterError):
        merge([run, second], tmp_path / "merged")
    assert time.perf_counter() - started < 30
    other = copy_run(trained("peft=lora"), tmp_path / "other")
    config = other / "adapter" / "adapter_config.json"
    values = json.loads(config.read_text()) | {"base_model_name_or_path": "meta/another"}
    config.write_text(json.dumps(values))
    for name in ("run.json", "config.yaml"):
        (other / name).unlink()
    with pytest.raises(AdapterError, match="were trained on different bases"):
        merge([run, other / "adapter"], tmp_path / "merged")


def test_the_proof_fails_for_another_adapter(trained: Trained, tmp_path: Path) -> None:
    merged = merge([trained("peft=lora")], tmp_path / "merged")
    proof = prove(merged, [trained("peft=rslora")])
    assert not proof.holds
    assert proof.kl > 0.01


def test_a_merge_in_bfloat16_and_shards_is_proven(trained: Trained, tmp_path: Path) -> None:
    run = trained("peft=lora")
    merged = merge([run], tmp_path / "merged", dtype="bfloat16", max_shard_size="1MB")
    shards = sorted(merged.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert {value.dtype for shard in shards for value in load_file(shard).values()} == {
        torch.bfloat16
    }
    proof = prove(merged, [run])
    assert proof.dtype == "bfloat16"
    assert proof.holds
    assert not prove(merged, [trained("peft=rslora")]).holds


def test_what_cannot_be_merged_is_an_error_and_leaves_no_files(
    trained: Trained, tmp_path: Path
) -> None:
    run, out = trained("peft=lora"), tmp_path / "merged"
    with pytest.raises(AdapterError, match="PROMPT_TUNING cannot be merged"):
        merge([trained("peft=prompt_tuning")], out)
    with pytest.raises(AdapterError, match="none of linear"):
        merge([run, run], out, method="average")
    with pytest.raises(AdapterError, match="3 weights for 2 adapters"):
        merge([run, run], out, weights=[1, 2, 3])
    with pytest.raises(AdapterError, match="not trained on a quantised base"):
        merge([run], out, into="dequantised")
    with pytest.raises(AdapterError, match="linear cannot combine these"):
        merge([run, trained("peft=lora", "seed=7", "peft.r=4")], out, method="linear")
    for method, reason in (("dora", "use_dora"), ("ia3", "IA3"), ("adalora", "ADALORA")):
        overrides = ADALORA if method == "adalora" else ()
        with pytest.raises(AdapterError, match=f"only plain LoRAs are combined, this has {reason}"):
            merge([run, trained(f"peft={method}", *overrides)], out)
    for weights in ([0, 0], [1, float("nan")]):
        with pytest.raises(AdapterError, match="give finite numbers, not all of them 0"):
            merge([run, run], out, weights=weights)
    for density in (0.0, 1.5):
        with pytest.raises(AdapterError, match="is no share; give a number above 0"):
            merge([run, run], out, method="ties", density=density)
    with pytest.raises(SavedError, match="--max-shard-size 5G: give a size"):
        merge([run], out, max_shard_size="5G")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_never_merged(trained: Trained, tmp_path: Path) -> None:
    run, file, weights = copy_with_weights(trained("peft=lora"), tmp_path / "run")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(AdapterError, match="1 weights are not finite, the first is base_model"):
        merge([run], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_weights_that_leave_the_range_of_float16_are_never_saved(
    trained: Trained, tmp_path: Path
) -> None:
    run, file, weights = copy_with_weights(trained("peft=lora", "quant=nf4"), tmp_path / "run")
    save_file({name: w + 1e5 * ("lora_B" in name) for name, w in weights.items()}, file)
    with pytest.raises(AdapterError, match=r"not finite .*; give --dtype float32"):
        merge([run], tmp_path / "merged", into="dequantised", dtype="float16")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_base_is_refused(trained: Trained, tmp_path: Path) -> None:
    run = copy_run(trained("peft=lora"), tmp_path / "run")
    record = json.loads((run / "run.json").read_text()) | {"base": f"sha256:{'0' * 64}"}
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(AdapterError, match="trained on a base of other weights"):
        merge([run], tmp_path / "merged")


@pytest.mark.parametrize(("into", "quant"), [("original", "none"), ("dequantised", "nf4")])
def test_merged_weights_keep_the_dtype_that_the_base_is_stored_in(
    trained: Trained, tmp_path: Path, into: Any, quant: str
) -> None:
    base = tiny(dtype="bfloat16")
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    run = trained("model=local", f"model.path={tmp_path / 'base'}", f"quant={quant}")
    merged = merge([run], tmp_path / "merged", into=into)
    dtypes = {value.dtype for value in load_file(merged / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}
    assert prove(merged, [run], max_new_tokens=4).holds
    in_float32 = merge([run], tmp_path / "other", into=into, dtype="float32")
    assert {v.dtype for v in load_file(in_float32 / "model.safetensors").values()} == {
        torch.float32
    }


def test_a_merged_model_has_the_end_tokens_of_its_training(
    trained: Trained, tmp_path: Path
) -> None:
    base = tiny()
    end = base.tokenizer.convert_tokens_to_ids("<|im_end|>")
    base.model.generation_config.eos_token_id = base.model.config.eos_token_id = 0
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.eos_token = "<|endoftext|>"
    base.tokenizer.save_pretrained(tmp_path / "base")
    run = trained("model=local", f"model.path={tmp_path / 'base'}")
    merged = merge([run], tmp_path / "merged")
    assert GenerationConfig.from_pretrained(merged).eos_token_id == [0, end]


@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
def test_trained_biases_are_merged_only_into_layers_with_a_bias(tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny().tokenizer.save_pretrained(tmp_path / "base")
    for targets, fits in ((["q_proj", "v_proj"], True), (["q_proj", "o_proj"], False)):
        lora = LoraConfig(
            r=2, target_modules=targets, lora_bias=True, init_lora_weights=False,
            task_type="CAUSAL_LM",
        )  # fmt: skip
        adapter, out = tmp_path / f"adapter-{fits}", tmp_path / f"out-{fits}"
        model = get_peft_model(Qwen2ForCausalLM.from_pretrained(tmp_path / "base"), lora)
        model.save_pretrained(adapter)
        if fits:
            assert prove(merge([adapter], out), [adapter], max_new_tokens=4).holds
            continue
        with pytest.raises(AdapterError, match=r"a bias for .*o_proj, which has none in this base"):
            merge([adapter], out)


def test_an_output_is_replaced_only_with_force(trained: Trained, tmp_path: Path) -> None:
    run, out = trained("peft=lora"), tmp_path / "merged"
    merge([run], out)
    before = (out / "model.safetensors").stat().st_ino
    with pytest.raises(SavedError, match="exists; --force replaces it"):
        merge([run], out)
    merge([run], out, force=True)
    assert (out / "model.safetensors").stat().st_ino != before
    with pytest.raises(SavedError, match="is also the input"):
        merge([run / "adapter"], run / "adapter", force=True)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    with pytest.raises(SavedError, match="does not hold only a model"):
        merge([run], precious, force=True)
    with pytest.raises(
        SavedError, match=r"thesis\.tex is no folder"
    ):  # before the base is looked up
        merge([run], precious / "thesis.tex" / "out", base=str(tmp_path / "nowhere"))
    assert (precious / "thesis.tex").read_text() == "years"


def test_a_damaged_model_is_an_error(trained: Trained, tmp_path: Path) -> None:
    merged = merge([trained("peft=lora")], tmp_path / "merged")
    file = merged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"merged cannot be loaded: .*incomplete metadata"):
        check_model(merged)


def test_a_model_that_does_not_stop_at_its_end_token_fails_the_check(
    trained: Trained, tmp_path: Path
) -> None:
    merged = merge([trained("peft=lora")], tmp_path / "merged")
    config = json.loads((merged / "generation_config.json").read_text())
    (merged / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    failures = check_model(merged)
    assert "continues after" in str(failures.pop("ends at EOS"))
    assert not any(failures.values())


def test_a_model_with_missing_embeddings_or_nan_weights_fails_the_check(
    trained: Trained, tmp_path: Path
) -> None:
    merged = merge([trained("peft=lora")], tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    rows = load_file(merged / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    more = rows - len(tokenizer) + 1
    tokenizer.add_tokens([f"<more{i}>" for i in range(more)])
    tokenizer.save_pretrained(merged)
    assert check_model(merged) == {
        "weights are finite": None,
        "tokenizer fits the embeddings": (
            f"the tokenizer has tokens without an embedding ('<more{more - 1}>'): 1 beyond {rows}"
        ),
        "generates": None,
        "ends at EOS": None,
    }
    weights = load_file(merged / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    failure = check_model(merged)["weights are finite"]
    assert failure == "1 are not, the first is model.norm.weight"


def test_the_proof_refuses_a_model_of_another_vocabulary(trained: Trained, tmp_path: Path) -> None:
    model, tokenizer = load_adapter("lora_exp/assets/tiny")
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 8)
    model.save_pretrained(tmp_path / "wider")
    tokenizer.save_pretrained(tmp_path / "wider")
    with pytest.raises(AdapterError, match=rf"is another one: it has {rows + 8} .* base {rows}"):
        prove(tmp_path / "wider", [trained("peft=lora")])
