"""Save a base with random weights: random_base FOLDER SHAPE, a JSON list of the shape's fields."""

import json
import sys

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

device = "cuda" if torch.cuda.is_available() else "cpu"
folder = sys.argv[1]
channels, inner, layers, heads, heads_kv, vocabulary, saved_as = json.loads(sys.argv[2])
config = LlamaConfig(
    hidden_size=channels, intermediate_size=inner, num_hidden_layers=layers, head_dim=128,
    num_attention_heads=heads, num_key_value_heads=heads_kv, vocab_size=vocabulary,
    max_position_embeddings=4096, tie_word_embeddings=saved_as != "nf4",
)  # fmt: skip
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
with torch.device(device):
    model = LlamaForCausalLM(config)
torch.set_default_dtype(torch.float32)
model.save_pretrained(folder)
if saved_as == "nf4":
    del model
    form = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=form, dtype=torch.bfloat16, device_map={"": device}
    )
    model.save_pretrained(folder)
AutoTokenizer.from_pretrained("lora_exp/assets/tiny").save_pretrained(folder)
