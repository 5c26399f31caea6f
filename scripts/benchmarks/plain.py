"""The trainer, model, rows and settings of `python run.py`, without it: plain FOLDER STEPS."""

import json
import sys
import time

import torch
import transformers
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

transformers.utils.logging.disable_progress_bar()
folder, steps = sys.argv[1], int(sys.argv[2])
path = "lora_exp/assets/tiny"
tokenizer = AutoTokenizer.from_pretrained(path)


def split(row):
    """Return a chat of one question and one answer as prompt and completion."""
    return {"prompt": row["messages"][:1], "completion": row["messages"][1:]}


rows = load_dataset("json", data_files="lora_exp/assets/demo_train.jsonl", split="train")
rows = rows.map(split, remove_columns=["messages", "task"])
set_seed(42)
names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
    LoraConfig(r=16, lora_alpha=32, target_modules=names, task_type="CAUSAL_LM"),
)
args = SFTConfig(
    output_dir=folder,
    max_steps=steps,
    learning_rate=0.002,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
    per_device_train_batch_size=16,
    max_length=512,
    gradient_checkpointing=False,
    bf16=False,
    logging_steps=10,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    seed=42,
    dataloader_pin_memory=False,
    optim="adamw_torch_fused",
)
trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
trainer.remove_callback(transformers.PrinterCallback)
started = time.perf_counter()
trainer.train()
seconds = time.perf_counter() - started
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(json.dumps([steps / seconds, losses[-1]]))
