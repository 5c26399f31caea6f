"""What is tried on each kind: functions of a folder of models that return a word for the table.

A check raises LoraExpError where we refuse, and anything else where something is broken.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

WORDS = ["red", "blue", "green", "small", "big", "old", "new", "cold", "warm", "dark"]
QUICK = [
    "tracking=none", "model=local", "samples.rows=0", "train.max_steps=4", "peft.r=4",
    "train.per_device_train_batch_size=4", "train.learning_rate=1e-2", "train.logging_steps=1",
    "train.save_strategy=no", "train.eval_strategy=no",
]  # fmt: skip
ANSWERS = ["algorithm.args.max_completion_length=8", "samples.rows=0"]
GROUPS = [*ANSWERS, "algorithm.args.num_generations=4", "data.max_eval_rows=4"]


def write_rows(folder: Path) -> None:
    """Write rows of chats, and pairs of them, into a folder."""
    chats, pairs = [], []
    for i in range(40):
        first, second = WORDS[i % 10], WORDS[(3 * i + i // 10) % 10]
        prompt = [{"role": "user", "content": f"Say {first} and {second}" + "!" * (i % 5)}]
        answer = [{"role": "assistant", "content": f"{first} {second}"}]
        other = [{"role": "assistant", "content": f"not {second}"}]
        chats.append({"messages": [*prompt, *answer]})
        pairs.append({"prompt": prompt, "chosen": answer, "rejected": other})
    for name, rows in (("chats", chats), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Checks:
    """The checks of one kind; each trains into a folder of its own."""

    def __init__(self, work: Path, name: str) -> None:
        self.work, self.name = work, name.replace(", ", "-").replace(" ", "-")
        self.model, self.runs = work / "models" / self.name, work / "runs" / self.name
        self.seq2seq = name == "t5"

    def values(self, *overrides: str, rows: str = "chats") -> list[str]:
        """Return the overrides of a run."""
        data = ["data=jsonl", f"data.path={self.work / rows}.jsonl", "data.eval_share=0.2"]
        own = ["algorithm=seq2seq"] if self.seq2seq and rows == "chats" else []
        return [*QUICK, f"model.path={self.model}", *data, *own, *overrides]

    def run(self, tag: str, *overrides: str, rows: str = "chats") -> Any:
        """Train, in a new folder."""
        from lora_exp import compose, run

        shutil.rmtree(self.runs / tag, ignore_errors=True)
        return run(compose(*self.values(*overrides, rows=rows)), self.runs / tag)

    def trained(self) -> Path:
        """Return the folder of the run of `train`, made if need be."""
        if not (self.runs / "train" / "adapter").is_dir():
            self.train()
        return self.runs / "train"

    def train(self) -> str:
        """LoRA on all linear layers; the loss of held-out rows must fall, at one of two rates."""
        for rate in ("1e-2", "2e-3"):  # the gradients of random delta rules are large
            steps = ["train.max_steps=6", f"train.learning_rate={rate}"]
            metrics = self.run("train", *steps).metrics
            if metrics["eval/loss"] < metrics["before/loss"]:
                return "yes"
        return "**loss rises**"

    def peft(self) -> str:
        """Plain PEFT must load the adapter, and compute the same logits."""
        import peft
        import torch

        from lora_exp import load_adapter

        folder, ids = self.trained(), torch.arange(5, 37)[None]
        more = {"decoder_input_ids": ids[:, :5]} if self.seq2seq else {}
        auto = peft.AutoPeftModelForSeq2SeqLM if self.seq2seq else peft.AutoPeftModelForCausalLM
        plain = auto.from_pretrained(folder / "adapter", dtype=torch.float32).eval()
        with torch.no_grad():
            expected = plain(input_ids=ids, **more).logits
            ours = load_adapter(folder)[0](input_ids=ids, **more).logits
        return "yes" if torch.equal(ours, expected) else "**differs**"

    def merge(self) -> str:
        """The merged model must answer as the adapter on its base."""
        from lora_exp.after.merging import merge
        from lora_exp.after.proof import prove

        folder = self.trained()
        merged = merge([folder], self.runs / "merged", force=True)
        return "yes" if prove(merged, [folder], max_new_tokens=8).holds else "**no proof**"

    def sweep(self) -> str:
        """Two jobs in lockstep must equal the runs alone; they may share passes or train apart."""
        from tests.lockstep.runs import outputs, run_alone, run_packed

        shutil.rmtree(self.runs / "sweep", ignore_errors=True)
        shutil.rmtree(self.runs / "alone", ignore_errors=True)
        jobs, defaults = [["seed=1"], ["peft.r=2", "seed=2"]], self.values("train.max_steps=2")
        defaults += ["samples.rows=2", "samples.max_new_tokens=4"]
        packed, pack = run_packed(jobs, self.runs / "sweep", defaults=defaults, verify=0.05)
        for error in packed:
            if isinstance(error, Exception):
                raise error
        alone = run_alone(jobs, self.runs / "alone", defaults=defaults)
        if [outputs(one) for one in packed] != [outputs(one) for one in alone]:
            return "**differs**"
        return "shared" if pack.passes.counts["most jobs"] > 1 else "apart"

    def nf4(self) -> str:
        """A 4-bit run that resumes must end with the bytes of the whole one."""
        from lora_exp import compose, run
        from tests.test_experiment import digest, mark_killed

        saving = ["quant=nf4", "train.save_strategy=steps", "train.save_steps=2"]
        whole, cut = self.run("nf4", *saving), self.run("nf4-cut", *saving)
        shutil.rmtree(cut.directory / "checkpoints" / "checkpoint-4")
        shutil.rmtree(cut.saved)
        mark_killed(cut.directory)
        resumed = run(compose(f"resume={cut.directory}"))
        return "yes" if digest(resumed.saved) == digest(whole.saved) else "**resumes differently**"

    def packing(self) -> str:
        """Held-out rows must have the same loss packed and alone."""
        one = ["train.max_steps=1"]
        alone = self.run("alone-rows", *one).metrics["before/loss"]
        packed = self.run("packed-rows", *one, "algorithm.args.packing=true").metrics["before/loss"]
        return "yes" if abs(alone - packed) < 1e-4 else "**rows see each other**"

    def reward(self) -> str:
        """A reward adapter must train, and be loaded."""
        from lora_exp import load_adapter

        load_adapter(self.run("reward", "algorithm=reward", rows="pairs").saved)
        return "yes"

    def dpo(self) -> str:
        """DPO must train."""
        self.run("dpo", "algorithm=dpo", rows="pairs")
        return "yes"

    def grpo(self) -> str:
        """GRPO must sample and train."""
        reward = "algorithm.rewards=[lora_exp.rewards.similarity]"
        self.run("grpo", "algorithm=grpo", reward, *GROUPS, "train.max_steps=2")
        return "yes"


NAMES = ("train", "peft", "merge", "sweep", "nf4", "packing", "reward", "dpo", "grpo")
