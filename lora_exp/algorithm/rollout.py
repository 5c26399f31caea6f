"""Rollouts: answers sampled from the policy, with their rewards and KL to the reference.

The trainer is a `transformers.Trainer`, so schedules, clipping, checkpoints and lockstep apply.

Shapes: B answers of T tokens, padded on the right, to prompts of P tokens, padded on the left.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, Trainer, TrainingArguments, set_seed
from trl.trainer.utils import disable_dropout_in_model, selective_log_softmax

from lora_exp.adapter.several import add_copy, changes_nothing, is_adapted, using
from lora_exp.algorithm.ppo_losses import kl_estimate
from lora_exp.data.examples import prompt_ids
from lora_exp.errors import RewardError
from lora_exp.model.special_tokens import end_tokens
from lora_exp.parallel.world import world

Batch = dict[str, Tensor]


@dataclass
class RolloutConfig(TrainingArguments):  # type: ignore[misc]
    """Arguments for rollouts, added to transformers' and named as in TRL's GRPO."""

    max_completion_length: int = field(default=64, metadata={"help": "Tokens of an answer."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling and of all log-probs."})
    top_p: float = field(default=1.0, metadata={"help": "Share of probability sampled from."})
    kl_estimator: Literal["k1", "k3"] = field(
        default="k1", metadata={"help": "Of the per-token KL."}
    )
    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "Subtracted for answers without an end token."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One for each reward."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Ratios then depend on the policies, not on the dropout."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rewards read columns."})


class RolloutTrainer(Trainer):  # type: ignore[misc]
    """A trainer that samples answers from the policy and scores them with rewards."""

    def __init__(
        self,
        model: Any,
        args: RolloutConfig,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
        reward_funcs: list[Any],
        callbacks: list[Any] | None = None,
    ) -> None:
        """Keep the policy as it is now for its reference.

        Args:
            model: the policy: a PeftModel, or a whole model whose weights train.
            args: its arguments.
            train_dataset: rows with a `prompt`; the other columns are passed to the rewards.
            eval_dataset: held-out rows, or None.
            processing_class: the tokenizer.
            reward_funcs: as TRL's: of prompts, completions, completion_ids and columns.
            callbacks: transformers' own.

        Raises:
            ValueError: rewards and weights differ in number, or the algorithm refuses a setting.
            AdapterError: a reference is needed, but the method allows only one adapter.
        """
        set_seed(args.seed)
        if args.disable_dropout:
            disable_dropout_in_model(model)
        self.reward_funcs = reward_funcs
        self.reward_weights = args.reward_weights or [1.0] * len(reward_funcs)
        if len(self.reward_weights) != len(reward_funcs):
            text = f"{len(self.reward_weights)} reward_weights for {len(reward_funcs)} rewards"
            raise ValueError(text)
        self.reference_adapter, self.reference_model = None, None
        if not is_adapted(model):
            self.reference_model = copy.deepcopy(model).eval().requires_grad_(False)
        elif not changes_nothing(model):
            self.reference_adapter = "ref"
            add_copy(model, "ref", trainable=False)
        self.num_tokens = 0
        self._metrics: dict[str, dict[str, list[float]]] = {
            mode: defaultdict(list) for mode in ("train", "eval")
        }
        super().__init__(
            model=model, args=args, data_collator=list, train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=processing_class, callbacks=callbacks,
        )  # fmt: skip
        self._add_parts(model)

    def _add_parts(self, model: Any) -> None:
        """Add what the algorithm needs beside the policy; called once the trainer is built."""

    @torch.no_grad()
    def _rollout(self, rows: list[dict[str, Any]], mode: str) -> Batch:
        """Sample an answer to each prompt and score it.

        Returns:
            ids and attention [B, P+T]; mask, logps, ref_logps and kl [B, T]; scores [B].
        """
        model, tokenizer = self.accelerator.unwrap_model(self.model), self.processing_class
        training = model.training
        model.eval()
        prompts = [prompt_ids(row, tokenizer) for row in rows]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        inputs = inputs.to(model.device)
        with self.accelerator.autocast(), self._sampling(model):
            ids = model.generate(**inputs)
        new = ids[:, inputs["input_ids"].shape[1] :]
        ended = torch.isin(new, torch.tensor(end_tokens(model, tokenizer), device=new.device))
        mask = (
            ended.cumsum(1) - ended.long() == 0
        ).long()  # up to and including the first end token
        batch = {
            "ids": ids, "attention": torch.cat([inputs["attention_mask"], mask], 1), "mask": mask,
        }  # fmt: skip
        batch["logps"] = self._in_batches(batch, self._logps)
        with self._reference_policy(model) as reference:
            batch["ref_logps"] = self._in_batches(batch, self._logps, reference)
        kl = kl_estimate(batch["logps"], batch["ref_logps"], self.args.kl_estimator)
        batch["kl"] = kl * mask
        batch["scores"] = self._scores(rows, new, mask, mode).to(new.device)
        batch["scores"] -= self.args.missing_eos_penalty * ~ended.any(1)
        model.train(training)
        if mode == "train":
            self.num_tokens += sum(world.gathered(int(batch["attention"].sum())))
        self._record(mode, {
            "kl": batch["kl"].sum(1).mean(),
            "completions/mean_length": mask.sum(1).float().mean(),
            "completions/clipped_ratio": (~ended.any(1)).float().mean(),
        })  # fmt: skip
        return batch

    @contextmanager
    def _sampling(self, model: Any) -> Iterator[None]:
        """Sample as the log-probs are computed, without the penalties of the model's config."""
        base_model = model.get_base_model() if is_adapted(model) else model
        original = base_model.generation_config
        sampling = GenerationConfig(
            max_new_tokens=self.args.max_completion_length, do_sample=True,
            temperature=self.args.temperature, top_p=self.args.top_p, top_k=0,
            eos_token_id=end_tokens(base_model, self.processing_class),
            pad_token_id=self.processing_class.pad_token_id,
        )  # fmt: skip
        try:
            model.generation_config = base_model.generation_config = sampling
            yield
        finally:
            model.generation_config = base_model.generation_config = original

    def _scores(self, rows: list[dict[str, Any]], new: Tensor, mask: Tensor, mode: str) -> Tensor:
        """Return the weighted sum of all rewards, [B]; None (not applicable) adds nothing.

        Raises:
            RewardError: no answer of a rollout to learn from has a reward.
        """
        ids = [row[row_mask.bool()].tolist() for row, row_mask in zip(new, mask, strict=True)]
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        prompts = [row["prompt"] for row in rows]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        ours = ("prompt", "completions", "completion_ids")
        columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ours}
        total, rewarded = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.bool)
        for function, weight in zip(self.reward_funcs, self.reward_weights, strict=True):
            values = function(
                prompts=prompts, completions=completions, completion_ids=ids,
                trainer_state=self.state, log_extra=_ignore,
                log_metric=lambda key, number: self._record(mode, {key: number}), **columns,
            )  # fmt: skip
            rewards = torch.tensor(
                [float("nan") if r is None else r for r in values], dtype=torch.float32
            )
            if not rewards.isnan().all():
                self._record(mode, {f"rewards/{function.__name__}/mean": rewards.nanmean()})
            total += weight * rewards.nan_to_num(0.0)
            rewarded |= ~rewards.isnan()
        if mode == "train" and not rewarded.any():
            names = ", ".join(function.__name__ for function in self.reward_funcs)
            text = f"gave no reward (None) to any of {len(rows)} answers"
            raise RewardError(f"{names} {text}; nothing can be learnt from that")
        self._record(mode, {"reward": total.mean(), "reward_std": total.std(correction=0)})
        return total

    @contextmanager
    def _reference_policy(self, model: Any) -> Iterator[Any]:
        with using(model, self.reference_adapter) if is_adapted(model) else nullcontext():
            yield self.reference_model if self.reference_model is not None else model

    def _logits(self, batch: Batch, model: Any) -> Tensor:
        base_model = model.get_base_model() if is_adapted(model) else model
        length = batch["mask"].shape[1] + 1
        with self.accelerator.autocast():
            logits = base_model(
                **model_inputs(batch), use_cache=False, logits_to_keep=length
            ).logits
        return logits[:, :-1].float() / self.args.temperature  # type: ignore[no-any-return]

    def _logps(self, batch: Batch, model: Any = None) -> Tensor:
        """Return the log-probabilities of the completions' tokens, [B, T]."""
        logits = self._logits(batch, self.model if model is None else model)
        sampled = batch["ids"][:, -batch["mask"].shape[1] :]
        logps: Tensor = selective_log_softmax(logits, sampled)
        return logps

    def _in_batches(self, batch: Batch, compute: Any, *rest: Any) -> Tensor:
        """Compute for a rollout, without gradients, in parts of the evaluation batch size."""
        size = self.args.per_device_eval_batch_size
        with torch.no_grad():
            starts = range(0, len(batch["ids"]), size)
            keys = ("ids", "attention", "mask")
            return torch.cat(
                [compute({k: batch[k][i : i + size] for k in keys}, *rest) for i in starts]
            )

    def _record(self, mode: str, numbers: dict[str, Any]) -> None:
        tensors = [n.detach().double().view(()) for n in numbers.values() if isinstance(n, Tensor)]
        values = iter(torch.stack(tensors).tolist() if tensors else [])  # waits for the device once
        for key, number in numbers.items():
            value = next(values) if isinstance(number, Tensor) else float(number)
            self._metrics[mode][key].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of rollout metrics since the last log line."""
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        prefix = "eval_" if mode == "eval" else ""
        for key, numbers in world.pooled(self._metrics[mode]).items():
            logs[prefix + key] = sum(numbers) / len(numbers)
        self._metrics[mode].clear()
        if mode == "train":
            logs["num_tokens"] = self.num_tokens
        super().log(logs, start_time)


def model_inputs(batch: Batch) -> Batch:
    """Return a rollout's model inputs; position ids do not count the padding on the left."""
    position_ids = (batch["attention"].cumsum(1) - 1).clamp_min(0)
    return {
        "input_ids": batch["ids"],
        "attention_mask": batch["attention"],
        "position_ids": position_ids,
    }


def _ignore(*_: Any) -> None:
    """Ignore the columns that a reward function logs; TRL shows them in tables, we do not."""
