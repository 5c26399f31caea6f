"""Exact match of ADAPTER on 400 held-out rows of the base's own tasks: own_tasks ADAPTER QUANT."""

import sys
from types import SimpleNamespace

from peft import PeftModel

from lora_exp import compose
from lora_exp.data import tasks
from lora_exp.model.loading import base_of
from lora_exp.training.answers import answer, exact_match_rates

base = base_of(compose(f"quant={sys.argv[2]}"))
model = PeftModel.from_pretrained(base.model, sys.argv[1])
rows = tasks.take(tasks.CORPUS, 0, 400, held_out=True)
settings = SimpleNamespace(rows=400, max_new_tokens=24, batch_size=200)
print(exact_match_rates(answer(model, base.tokenizer, rows, settings, "after"))["exact_match"])
