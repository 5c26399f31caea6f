"""Routing replay: decisions between nearly equal scores are recorded, and taken again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from lora_exp.after.merging import merge
from lora_exp.after.proof import prove
from lora_exp.after.routing import Routing
from lora_exp.errors import AdapterError

SCORES = torch.tensor([[0.5, 0.4, 0.1, 0.0], [0.2, 0.1, 0.9, 0.3]])
OTHERS = torch.tensor([[0.5, 0.0, 0.1, 0.4], [0.2, 0.1, 0.9, 0.3]])  # one token's second choice


def chosen_by(choose: Callable[[Tensor], Any], scores: Tensor, first: Tensor) -> tuple[Any, Any]:
    """Return what is chosen of scores after the choices of other scores, and their routing."""
    with Routing() as recorded:
        choose(first)
    with Routing(recorded.decisions) as routing:
        return choose(scores), routing


@pytest.mark.parametrize("dim", [-1, 1])
def test_experts_are_those_of_the_other_model_and_scores_ones_own(dim: int) -> None:
    (values, indices), routing = chosen_by(lambda s: s.topk(2, dim=dim), OTHERS, SCORES)
    assert indices.tolist() == [[0, 1], [2, 3]]
    assert values.tolist() == OTHERS.gather(1, indices).tolist()
    assert (routing.same, routing.chosen) == (3, 4)  # order does not count


def test_choices_along_another_dimension() -> None:
    (values, indices), routing = chosen_by(lambda s: s.T.topk(2, 0), OTHERS, SCORES)
    assert indices.T.tolist() == [[0, 1], [2, 3]]
    assert values.T.tolist() == OTHERS.gather(1, indices.T).tolist()
    assert (routing.same, routing.chosen) == (3, 4)


@pytest.mark.parametrize("keepdim", [False, True])
def test_the_largest_alone(keepdim: bool) -> None:
    first, second = torch.tensor([[1.0, 0.9]]), torch.tensor([[1.0, 1.1]])
    (values, indices), routing = chosen_by(lambda s: s.max(1, keepdim), second, first)
    assert values.flatten().tolist() == [1.0]
    assert indices.shape == ((1, 1) if keepdim else (1,))
    assert (routing.same, routing.chosen) == (0, 1)
    index, _ = chosen_by(lambda s: s.argmax(-1), second, first)
    assert index.tolist() == [0]


def test_comparisons_with_a_threshold_are_replayed_and_those_of_integers_left_alone() -> None:
    (floats, integers), routing = chosen_by(
        lambda s: (s > 0.15, torch.arange(4) < 2), OTHERS, SCORES
    )
    assert floats.tolist() == (SCORES > 0.15).tolist()
    assert integers.tolist() == [True, True, False, False]
    assert routing.chosen == 0


def test_choices_of_all_there_is_and_among_masked_ones_do_not_count() -> None:
    """As an indexer of sparse attention makes them, which would hide a wrong router."""
    _, routing = chosen_by(lambda s: (s.topk(4), s.topk(2)), OTHERS, SCORES)
    assert (routing.same, routing.chosen) == (3, 4)
    masked = torch.tensor([[0.5, -torch.inf, -torch.inf, -torch.inf]])
    _, routing = chosen_by(lambda s: s.topk(3), masked, masked)
    assert (routing.same, routing.chosen) == (1, 1)


def test_what_a_model_writes_into_its_choice_is_not_recorded() -> None:
    (indices, mask), _ = chosen_by(
        lambda s: (s.topk(2).indices.add_(4), (s > 0.15).logical_not_()), SCORES, SCORES
    )
    assert indices.tolist() == [[4, 5], [6, 7]]
    assert mask.tolist() == (SCORES <= 0.15).tolist()


@pytest.mark.parametrize(
    "other",
    [
        lambda s: s[:1].topk(2), lambda s: s > 0, lambda _: None,
        lambda s: (s.topk(2), s.topk(3)),
    ],
)  # fmt: skip
def test_a_model_that_decides_otherwise_on_its_way_is_another_one(other: Any) -> None:
    with Routing() as recorded:
        other(SCORES)
        SCORES.topk(2)
        SCORES.topk(2)
    with pytest.raises(AdapterError, match="it decides otherwise on the way to its logits"):
        chosen_again(recorded)


def chosen_again(recorded: Routing) -> None:
    with Routing(recorded.decisions):
        SCORES.topk(2)
        SCORES.topk(3)
        SCORES.topk(2)


@pytest.fixture
def mixture(tmp_path: Path, base: Any) -> Path:
    """A base in bfloat16 whose experts differ so much that another one is seen in the logits."""
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=4, num_experts_per_tok=2, initializer_range=0.12, norm_topk_prob=True,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter_on(mixture: Path, folder: Path, scale: float) -> Path:
    """Save an adapter with random weights."""
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj", "o_proj"])
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(mixture)
    get_peft_model(model, config).save_pretrained(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    scaled = {k: scale * value if "lora_B" in k else value for k, value in weights.items()}
    save_file(scaled, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"prompt": f"red {n} green blue"} for n in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "prompts.jsonl"


def test_a_mixture_merged_in_bfloat16_is_proven_and_a_wrong_merge_of_it_is_not(
    mixture: Path, prompts: Path, tmp_path: Path
) -> None:
    adapter = adapter_on(mixture, tmp_path / "adapter", 1.0)
    merged = merge([adapter], tmp_path / "merged")
    proof = prove(merged, [adapter], prompts=prompts)
    assert proof.dtype == "bfloat16"
    assert proof.same_experts is not None
    assert 0.97 < proof.same_experts < 1  # so some would have gone to other experts
    assert proof.rounding == 0  # not needed
    assert proof.holds
    assert not prove(merged, [adapter_on(mixture, tmp_path / "half", 0.5)], prompts=prompts).holds


def test_the_base_alone_is_no_merge_of_a_weak_adapter(
    mixture: Path, prompts: Path, tmp_path: Path
) -> None:
    """The few tokens that it sends to other experts are not taken for its effect."""
    weak = adapter_on(mixture, tmp_path / "weak", 0.003)
    proof = prove(mixture, [weak], prompts=prompts)
    assert proof.effect == pytest.approx(proof.max_difference, rel=0.5)
    assert not proof.holds


def test_another_router_is_found_by_its_choices(
    mixture: Path, prompts: Path, tmp_path: Path
) -> None:
    adapter = adapter_on(mixture, tmp_path / "adapter", 1.0)
    merged = merge([adapter], tmp_path / "merged")
    weights = load_file(merged / "model.safetensors")
    routers = {k: v[[1, 2, 3, 0]] for k, v in weights.items() if k.endswith("mlp.gate.weight")}
    assert len(routers) == 2
    save_file(weights | routers, merged / "model.safetensors", {"format": "pt"})
    proof = prove(merged, [adapter], prompts=prompts)
    assert proof.same_experts is not None
    assert proof.same_experts < 0.8
    assert not proof.holds
    assert not proof.rounded_off
