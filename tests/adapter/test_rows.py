"""Added tokens: their rows of the embeddings are trained, saved, loaded and merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM

from lora_exp import compose, load_adapter, run
from lora_exp.after.merging import merge
from lora_exp.after.proof import prove
from lora_exp.errors import AdapterError, ConfigError, LoraExpError
from tests.test_experiment import digest, mark_killed

TOKENS = 'model.add_tokens=["<calm>","<storm>"]'


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that say the new tokens."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [("calm", "<calm><calm>"), ("storm", "<storm><calm>")] * 12
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in texts]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module", params=["tied", "untied"])
def learned(request: Any, tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    """Train the tokens on a base whose embeddings are tied, or not."""
    folder = tmp_path_factory.mktemp(request.param)
    return trained_on(base_folder(folder / "base", request.param == "tied"), rows, folder / "run")


def base_folder(folder: Path, tied: bool) -> Path:
    """Save a tiny Qwen 3 with the embedded tokenizer."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from lora_exp.files.paths import asset

    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(asset("pkg://lora_exp/assets/tiny")).save_pretrained(folder)
    return folder


def trained_on(base: Path, rows: Path, folder: Path, *overrides: str) -> Path:
    values = ["tracking=none", "model=local", f"model.path={base}", "data=jsonl", TOKENS]
    values += [f"data.path={rows}", "train.max_steps=4", "samples.rows=2", "train.save_steps=2"]
    values += ["train.save_strategy=steps", "train.learning_rate=1e-2", "samples.max_new_tokens=4"]
    return run(compose(*values, *overrides), folder).directory


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 512, 513, 9]])).logits  # type: ignore[no-any-return]


def test_new_tokens_are_trained_and_plain_peft_loads_them(learned: Path) -> None:
    ours, tokenizer = load_adapter(learned)
    assert tokenizer("<storm>")["input_ids"] == [513]
    plain = AutoPeftModelForCausalLM.from_pretrained(learned / "adapter", dtype=torch.float32)
    assert torch.equal(logits(ours), logits(plain.eval()))
    deltas = [(n, p) for n, p in ours.named_parameters() if "trainable_tokens_delta" in n]
    assert len(deltas) == (1 if ours.get_base_model().config.tie_word_embeddings else 2)
    for name, delta in deltas:
        assert not torch.equal(delta[0], delta[1]), name  # both began as the same mean
    assert sorted((learned / "adapter").glob("*.safetensors"))[0].stat().st_size < 200_000


def test_a_merged_model_has_the_new_tokens_and_stays_tied(learned: Path, tmp_path: Path) -> None:
    ours, _ = load_adapter(learned)
    tied = ours.get_base_model().config.tie_word_embeddings
    expected = logits(ours)
    folder = merge([learned], tmp_path / "merged")
    assert prove(folder, [learned]).holds
    merged, tokenizer = load_adapter(folder)
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    assert merged.config.tie_word_embeddings == tied
    assert len(tokenizer) == len(merged.get_input_embeddings().weight) == 514


def test_new_tokens_resume_bit_for_bit(learned: Path, rows: Path, tmp_path: Path) -> None:
    base = learned.parent / "base"
    cut = trained_on(base, rows, tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints" / "checkpoint-4")
    shutil.rmtree(cut / "adapter")
    mark_killed(cut)
    run(compose(f"resume={cut}"))
    assert digest(cut / "adapter") == digest(learned / "adapter")


def test_an_adapter_with_new_tokens_is_trained_further(
    learned: Path, rows: Path, tmp_path: Path
) -> None:
    base = learned.parent / "base"
    start = f"adapter={learned / 'adapter'}"
    with pytest.raises(ConfigError, match=r"adds 2 tokens to its base; give model\.add_tokens"):
        trained_on(base, rows, tmp_path / "without", start, "model.add_tokens=[]")
    others = {
        '["<storm>","<calm>"]': r"^model.add_tokens: .*\['<calm>', '<storm>'\] in their place",
        '["<calm>","<storm>","<fog>"]': r"^model.add_tokens: .* does not train them",
    }
    for tokens, fault in others.items():
        with pytest.raises(ConfigError, match=fault):
            trained_on(base, rows, tmp_path / str(len(tokens)), start, f"model.add_tokens={tokens}")
    further = trained_on(base, rows, tmp_path / "further", start)
    assert digest(further / "adapter") != digest(learned / "adapter")
    load_adapter(further)


def test_new_tokens_are_refused_beside_other_adapters(learned: Path) -> None:
    """A shared base cannot grow for one of them."""
    from lora_exp.adapter.mounting import mount_beside

    base, _ = load_adapter(learned.parent / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="needs 514 embeddings, and its base has 512"):
        mount_beside(model, str(learned / "adapter"), "second")


@pytest.mark.parametrize(
    ("indices", "fault"),
    [
        ("abc", "'abc' is no list of numbers"),
        ({"embed_tokens": [5, None]}, "is no list of numbers"),
        ([1_000_000_000], "trains token 1000000000 of 512"),
    ],
)
def test_indices_from_a_stranger_are_checked(
    learned: Path, tmp_path: Path, indices: Any, fault: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(learned / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    changed = config | {"trainable_token_indices": indices}
    (folder / "adapter_config.json").write_text(json.dumps(changed))
    with pytest.raises(AdapterError, match=fault):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["peft=ia3"], r"model\.add_tokens: ia3 cannot train the embeddings of new tokens"),
        (["peft.modules_to_save=[embed_tokens]"], r"peft\.modules_to_save: .* leave the embed"),
        (["+peft.trainable_token_indices=[5]"], r"peft\.trainable_token_indices: .* leave the"),
        (['model.add_tokens=["<a>","<a>"]'], r"model\.add_tokens: '<a>' is a token already"),
        (['model.add_tokens=["<|im_end|>"]'], r"'<\|im_end\|>' is a token already"),
    ],
)
def test_new_tokens_that_cannot_be_trained_are_refused(
    quick_run: Callable[..., Any], overrides: list[str], fault: str
) -> None:
    with pytest.raises(LoraExpError, match=fault):
        quick_run(TOKENS, *overrides)


def test_rows_of_known_tokens_are_trained_and_merged_on_tied_embeddings(
    rows: Path, tmp_path: Path
) -> None:
    base, known = base_folder(tmp_path / "base", tied=True), "+peft.trainable_token_indices=[5,6]"
    directory = trained_on(base, rows, tmp_path / "run", "model.add_tokens=[]", known)
    ours, _ = load_adapter(directory)
    deltas = {n: p for n, p in ours.named_parameters() if "trainable_tokens_delta" in n}
    (delta,) = deltas.values()
    before = ours.get_base_model().get_input_embeddings().original_module.weight[[5, 6]]
    assert not torch.equal(delta, before)
    merged = merge([directory], tmp_path / "merged")
    assert prove(merged, [directory]).holds
    assert load_adapter(merged)[0].config.tie_word_embeddings
