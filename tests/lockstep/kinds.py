"""Small models of kinds that differ in what their layers compute."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "odd width": ("Llama", {"intermediate_size": 65}),  # rows may begin at any memory address
    "eager": ("Llama", {"attn_implementation": "eager"}),
    "own dropout": ("Llama", {"attention_dropout": 0.1}),
    "qwen3": ("Qwen3", {}),
    "sliding": ("Mistral", {"sliding_window": 8}),
    "sliding by layer": ("Olmo3", {"sliding_window": 8, "num_hidden_layers": 4}),
    "soft-capped": ("Gemma2", {"sliding_window": 8, "attn_implementation": "eager"}),
    "experts": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "sinks": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
                         "attn_implementation": "eager"}),
    "latent attention": ("DeepseekV3", EXPERTS | {
        "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
        "v_head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 8}),
    "hybrid": ("Qwen3_5Text", {
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}),
    "long rope": ("Phi3", {"max_position_embeddings": 256, "original_max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0,
                            "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}}),
    "transposed weights": ("GPT2", {}),  # with dropout of its own
    "flat rows": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "alibi": ("Bloom", {"n_layer": 2, "n_head": 4, "attn_implementation": "eager"}),
}  # fmt: skip


def small_model(kind: str, **more: Any) -> Any:
    """Return a model of a kind, with random weights that are not trained."""
    name, changes = KINDS[kind]
    torch.manual_seed(0)
    arguments = SMALL | changes | more
    implementation = arguments.pop("attn_implementation", "sdpa")
    config = getattr(transformers, f"{name}Config")(**arguments)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.requires_grad_(False)
