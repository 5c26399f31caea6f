"""Tiny models of the kinds that people tune: their own classes, random weights, one tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HEAD = {"head_dim": 16}
SLIDING = {"head_dim": 16, "sliding_window": 16}
# experts go by different names
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {  # multi-head latent attention
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
DELTA = {  # gated delta net, in three of four layers
    "num_hidden_layers": 4, "head_dim": 16, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
STATE = {  # Mamba 2, as hybrids name it
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
QUIET = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}  # no dropout of its own
TIED = {"tie_word_embeddings": True}
PATTERN = ["sliding_attention"] * 2 + ["full_attention"]

# name -> transformers' model_type and what differs from SMALL
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama 3": ("llama", TIED | {"rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "smollm3": ("smollm3", TIED | {"no_rope_layer_interval": 2}),
    "mistral": ("mistral", HEAD | {"sliding_window": None}),
    "mistral, sliding": ("mistral", SLIDING),
    "ministral3": ("ministral3", HEAD),
    "mixtral": ("mixtral", HEAD | LOCAL),
    "qwen2": ("qwen2", TIED),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3": ("qwen3", HEAD | TIED),
    "qwen3_moe": ("qwen3_moe", HEAD | EXPERTS),
    "qwen3_next": ("qwen3_next", DELTA | EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3_5_text": ("qwen3_5_text", DELTA),
    "gemma": ("gemma", HEAD),
    "gemma2": ("gemma2", SLIDING | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 9.0}),
    "gemma3_text": ("gemma3_text", SLIDING | {"num_hidden_layers": 3, "layer_types": PATTERN}),
    "gemma4_text": ("gemma4_text", SLIDING | {
        "num_hidden_layers": 6, "layer_types": PATTERN * 2, "global_head_dim": 16,
        "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 3,
    }),
    "gemma3n_text": ("gemma3n_text", SLIDING | {
        "num_hidden_layers": 6, "layer_types": PATTERN * 2, "num_kv_shared_layers": 3,
        "intermediate_size": [96] * 6, "activation_sparsity_pattern": [0.0] * 6, "laurel_rank": 8,
        "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8,
    }),
    "phi": ("phi", {"num_key_value_heads": 4}),
    "phi3": ("phi3", {}),
    "phimoe": ("phimoe", LOCAL),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 16}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("deepseek_v2", LATENT | ROUTED | {"head_dim": 8, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", LATENT | ROUTED),
    "deepseek_v32": ("deepseek_v32", LATENT | ROUTED | {  # few index heads have ties
        "head_dim": 8, "index_n_heads": 32, "index_head_dim": 16, "index_topk": 16,
    }),
    "deepseek_v3, dense": ("deepseek_v3", LATENT | ROUTED | {"first_k_dense_replace": 2}),
    "deepseek_v4": ("deepseek_v4", {
        "num_hidden_layers": 3, "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "layer_types": [
            "heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 16, "q_lora_rank": 24,
        "o_groups": 2, "o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 16,
        "index_topk": 16, "hc_mult": 2, "num_nextn_predict_layers": 0, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    }),
    "kimi_linear": ("kimi_linear", LATENT | {
        "layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "qk_head_dim": 16,
        "q_lora_rank": None, "mlp_layer_types": ["dense", "sparse"], "num_experts": 4,
        "num_experts_per_token": 2, "moe_intermediate_size": 32, "linear_head_dim": 16,
        "linear_num_heads": 4,
    }),
    "glm": ("glm", HEAD),
    "glm4": ("glm4", HEAD),
    "glm4_moe": ("glm4_moe", HEAD | ROUTED),
    "gpt_oss": ("gpt_oss", SLIDING | LOCAL),
    "granite": ("granite", {"logits_scaling": 2.0, "embedding_multiplier": 4.0}),
    "granitemoe": ("granitemoe", LOCAL),
    "granitemoehybrid": ("granitemoehybrid", STATE | {
        "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64,
        "num_local_experts": 0, "num_experts_per_tok": 0, "mamba_expand": 2,
    }),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", SLIDING | {"num_hidden_layers": 4}),
    "exaone4": ("exaone4", {"sliding_window": 16, "sliding_window_pattern": 2}),
    "ernie4_5": ("ernie4_5", HEAD),
    "ernie4_5_moe": ("ernie4_5_moe", {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
    }),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", HEAD),
    "seed_oss": ("seed_oss", HEAD),
    "arcee": ("arcee", HEAD),
    "apertus": ("apertus", HEAD),
    "dots1": ("dots1", HEAD | ROUTED),
    "minimax": ("minimax", HEAD | LOCAL | {"block_size": 16}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "jamba": ("jamba", {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8,
        "mamba_dt_rank": 8, "use_mamba_kernels": False,
    }),
    "bamba": ("bamba", STATE | {"attn_layer_indices": [1], "mamba_expand": 2}),
    "zamba2": ("zamba2", {
        "layers_block_type": ["mamba", "hybrid"], "num_key_value_heads": 4,
        "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1,
        "chunk_size": 16, "num_mem_blocks": 1, "use_mem_rope": True, "adapter_rank": 8,
    }),
    "nemotron_h": ("nemotron_h", {
        "layers_block_type": ["mamba", "attention", "moe"], "head_dim": 16, "mamba_num_heads": 8,
        "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16, **ROUTED,
        "moe_shared_expert_intermediate_size": 32,
    }),
    "falcon_h1": ("falcon_h1", HEAD | STATE | {"mamba_d_ssm": 128}),
    "mamba": ("mamba", {"state_size": 8}),
    "mamba2": ("mamba2", {
        "state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16,
    }),
    "recurrent_gemma": ("recurrent_gemma", {
        "num_hidden_layers": 3, "attention_window_size": 16, "lru_width": 64,
    }),
    "nemotron": ("nemotron", {}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "helium": ("helium", HEAD),
    "persimmon": ("persimmon", {}),
    "llama4_text": ("llama4_text", HEAD | LOCAL | {
        "intermediate_size_mlp": 96, "layer_types": ["chunked_attention", "full_attention"],
    }),
    "laguna": ("laguna", HEAD | EXPERTS | {
        "shared_expert_intermediate_size": 32, "layer_types": ["full_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"],
    }),
    "inkling2_text": ("inkling2_text", HEAD | {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
        "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["hybrid_sliding", "hybrid"],
    }),
    "rwkv": ("rwkv", {"attention_hidden_size": 64}),
    "doge": ("doge", {}),
    "ctrl": ("ctrl", {"n_embd": 64, "dff": 96, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "gpt2": ("gpt2", QUIET),
    "gpt2, dropout": ("gpt2", {}),
    "gpt_bigcode": ("gpt_bigcode", QUIET),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 16}),
    "gpt_neox": ("gpt_neox", {"tie_word_embeddings": False}),
    "gptj": ("gptj", QUIET | {"rotary_dim": 8}),
    "codegen": ("codegen", QUIET | {"rotary_dim": 8}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0}),
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {"max_seq_len": 512, "expansion_ratio": 2}),
    "falcon": ("falcon", {}),
    "t5": ("t5", {
        "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2,
        "decoder_start_token_id": 0,
    }),
}  # fmt: skip


def make(name: str, folder: Path) -> None:
    """Write a kind's tiny model and the embedded tokenizer into a folder, once."""
    if (folder / "tokenizer.json").is_file():
        return
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )

    from lora_exp.files.paths import asset

    kind, changes = KINDS[name]
    config = AutoConfig.for_model(kind, **SMALL | changes)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    spread(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(asset("pkg://lora_exp/assets/tiny")).save_pretrained(folder)


def spread(model: Any) -> None:
    """Draw matrices whose products are as wide as their inputs: answers then differ by prompt."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and "A_log" not in name:
                weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
    model.tie_weights()
