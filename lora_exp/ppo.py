"""PPO on one base: policy and value are adapters, the reference is what the policy began as.

A `transformers.Trainer`, so that schedules, clipping, checkpoints and lockstep are its own. A batch
of its data loader is a rollout's prompts; the rollout is made when its first part is asked for.

Shapes as in `surrogate`; P tokens of prompt, padded on the left; C channels.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, Trainer, TrainingArguments, set_seed
from trl.trainer.utils import (
    RepeatSampler,
    disable_dropout_in_model,
    entropy_from_logits,
    selective_log_softmax,
)

from lora_exp.examples import prompt_ids
from lora_exp.surrogate import (
    advantages,
    controlled,
    divergence,
    explained_variance,
    mean,
    policy_loss,
    shaped,
    value_loss,
    whitened,
)
from lora_exp.switch import add_copy, changes_nothing, is_adapted, using
from lora_exp.value import Value

Batch = dict[str, Tensor]


@dataclass
class PPOConfig(TrainingArguments):  # type: ignore[misc]
    """What PPO adds to transformers' arguments, in the words of TRL's GRPO where it has them."""

    max_completion_length: int = field(default=64, metadata={"help": "Tokens of an answer."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling and of all log-probs."})
    top_p: float = field(default=1.0, metadata={"help": "Share of probability sampled from."})
    num_minibatches: int = field(default=1, metadata={"help": "Updates a rollout is cut into."})
    num_iterations: int = field(default=4, metadata={"help": "Passes over each rollout."})
    beta: float = field(default=0.04, metadata={"help": "Coefficient of the KL to the reference."})
    kl_estimator: Literal["k1", "k3"] = field(
        default="k1", metadata={"help": "Of the per-token KL."}
    )
    kl_target: float | None = field(default=None, metadata={"help": "Nats; beta follows it."})
    kl_horizon: int = field(default=10000, metadata={"help": "Completions in which beta follows."})
    gamma: float = field(default=1.0, metadata={"help": "Discount for each token."})
    lam: float = field(default=0.95, metadata={"help": "GAE's lambda."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip of the policy's ratio."})
    value_epsilon: float = field(default=0.2, metadata={"help": "Clip of a value's step."})
    value_coef: float = field(default=0.5, metadata={"help": "Weight of the value's loss."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    whiten_advantages: bool = field(default=True, metadata={"help": "To variance 1, mean 0."})
    whiten_rewards: bool = field(default=False, metadata={"help": "To variance 1."})
    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "Taken from unended answers."}
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One a reward."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "Ratios are of the policies then, not of the dropout."}
    )
    shuffle_dataset: bool = field(default=True, metadata={"help": "Prompts in a new order."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rewards read columns."})


class PPOTrainer(Trainer):  # type: ignore[misc]
    """Trains policy and value by clipped steps on rollouts that the policy makes itself."""

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: Any,
        args: PPOConfig,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
        reward_funcs: list[Any],
        callbacks: list[Any] | None = None,
    ) -> None:
        """Put value and reference beside the policy.

        Args:
            model: the policy: a PeftModel, or a whole model whose weights train.
            args: PPO's.
            train_dataset: rows with a `prompt`; the other columns are for the rewards.
            eval_dataset: held-out rows, or None.
            processing_class: the tokenizer.
            reward_funcs: as TRL's; called with prompts, completions, completion_ids and columns.
            callbacks: transformers' own.

        Raises:
            ValueError: no rollout can be filled, or weights and rewards do not pair.
            AdapterError: the method allows one adapter only.
        """
        if args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end brings the policy back and not its value")
        set_seed(args.seed)
        if args.disable_dropout:
            disable_dropout_in_model(model)
        self.reward_funcs = reward_funcs
        self.weights = args.reward_weights or [1.0] * len(reward_funcs)
        if len(self.weights) != len(reward_funcs):
            text = f"{len(self.weights)} reward_weights for {len(reward_funcs)} rewards"
            raise ValueError(text)
        body, self.ref, self.reference = None, None, None
        if is_adapted(model):
            if not changes_nothing(model):
                self.ref = "ref"
                add_copy(model, "ref", trainable=False)
            add_copy(model, "value", trainable=True)
        else:
            self.reference = copy.deepcopy(model).eval().requires_grad_(False)
            body = copy.deepcopy(model.base_model)
        width = model.config.get_text_config().hidden_size
        model.ppo_value = Value(body, width, model.device)
        self.beta, self.micro_step = args.beta, 0
        self.buffer: Batch = {}  # the rollout that is learnt from
        self._metrics: dict[str, dict[str, list[float]]] = {
            mode: defaultdict(list) for mode in ("train", "eval")
        }
        self.num_tokens = 0
        super().__init__(
            model=model, args=args, data_collator=list, train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=processing_class, callbacks=callbacks,
        )  # fmt: skip
        self.rollout_size = args.per_device_train_batch_size * self.parts
        if len(train_dataset) < self.rollout_size:
            text = (
                f"a rollout takes {self.rollout_size} prompts, but there are {len(train_dataset)}"
            )
            raise ValueError(text)

    @property
    def parts(self) -> int:
        """Return into how many micro-batches a rollout is cut."""
        return int(self.args.num_minibatches * self.args.gradient_accumulation_steps)

    # --- prompts

    def get_train_dataloader(self) -> Any:
        """Return a loader whose every batch is a rollout's prompts, as often as it is used."""
        return self._get_dataloader(
            dataset=self.train_dataset, description="Training", batch_size=self.rollout_size,
            sampler_fn=self._get_train_sampler, is_training=True,
        )  # fmt: skip

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return RepeatSampler(
            dataset, mini_repeat_count=1, batch_size=self.rollout_size,
            repeat_count=self.parts * self.args.num_iterations,
            shuffle=self.args.shuffle_dataset, seed=self.args.seed,
        )  # fmt: skip

    # --- rollouts

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Return the micro-batch to learn from; with the first one the rollout is made."""
        turn = self.micro_step % (self.parts * self.args.num_iterations)
        if turn == 0 or not self.buffer:
            self.buffer = self._learnable(self._rollout(inputs, "train"))
        if turn % self.parts == 0:  # every pass goes through the rollout in another order
            self.order = torch.randperm(self.rollout_size)
        self.micro_step += 1
        chosen = self.order.chunk(self.parts)[turn % self.parts].to(self.buffer["ids"].device)
        return {key: value[chosen] for key, value in self.buffer.items()}

    @torch.no_grad()
    def _rollout(self, rows: list[dict[str, Any]], mode: str) -> Batch:
        """Answer prompts and score the answers.

        Returns:
            ids and attention [B, P+T]; mask, logps, ref_logps and kl [B, T]; scores [B].
        """
        model, tokenizer = self.accelerator.unwrap_model(self.model), self.processing_class
        training = model.training
        model.eval()
        asked = [prompt_ids(row, tokenizer) for row in rows]
        inputs = tokenizer.pad({"input_ids": asked}, padding_side="left", return_tensors="pt")
        inputs = inputs.to(model.device)
        with self.accelerator.autocast(), self._sampling(model):
            ids = model.generate(**inputs)
        new = ids[:, inputs["input_ids"].shape[1] :]
        ended = torch.isin(new, torch.tensor(self._ends(model), device=new.device))
        mask = (ended.cumsum(1) - ended.long() == 0).long()  # up to the first end, and with it
        batch = {
            "ids": ids, "attention": torch.cat([inputs["attention_mask"], mask], 1), "mask": mask,
        }  # fmt: skip
        batch["logps"] = self._no_grad(batch, self._logps)
        with self._reference(model) as reference:
            batch["ref_logps"] = self._no_grad(batch, self._logps, reference)
        kl = divergence(batch["logps"], batch["ref_logps"], self.args.kl_estimator)
        batch["kl"] = kl * mask
        batch["scores"] = self._scores(rows, new, mask, mode).to(new.device)
        batch["scores"] -= self.args.missing_eos_penalty * ~ended.any(1)
        model.train(training)
        self._note(mode, {
            "kl": batch["kl"].sum(1).mean(),
            "completions/mean_length": mask.sum(1).float().mean(),
            "completions/clipped_ratio": (~ended.any(1)).float().mean(),
        })  # fmt: skip
        return batch

    @contextmanager
    def _sampling(self, model: Any) -> Iterator[None]:
        """Sample from what the log-probs are of, without penalties of the model's own."""
        whole = model.get_base_model() if is_adapted(model) else model
        own = whole.generation_config
        plainly = GenerationConfig(
            max_new_tokens=self.args.max_completion_length, do_sample=True,
            temperature=self.args.temperature, top_p=self.args.top_p, top_k=0,
            eos_token_id=self._ends(whole), pad_token_id=self.processing_class.pad_token_id,
        )  # fmt: skip
        try:
            model.generation_config = whole.generation_config = plainly
            yield
        finally:
            model.generation_config = whole.generation_config = own

    def _ends(self, model: Any) -> list[int]:
        known = model.generation_config.eos_token_id
        known = known if isinstance(known, list) else [known]
        return sorted({self.processing_class.eos_token_id, *known} - {None})

    def _scores(self, rows: list[dict[str, Any]], new: Tensor, mask: Tensor, mode: str) -> Tensor:
        """Return the weighted sum of all rewards, [B]; one that has nothing to say adds nothing."""
        ids = [row[there.bool()].tolist() for row, there in zip(new, mask, strict=True)]
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        prompts = [row["prompt"] for row in rows]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        own = ("prompt", "completions", "completion_ids")
        columns = {key: [row[key] for row in rows] for key in rows[0] if key not in own}
        total = torch.zeros(len(rows))
        for function, weight in zip(self.reward_funcs, self.weights, strict=True):
            found = function(
                prompts=prompts, completions=completions, completion_ids=ids,
                trainer_state=self.state, log_extra=_unheard,
                log_metric=lambda key, number: self._note(mode, {key: number}), **columns,
            )  # fmt: skip
            known = torch.tensor(
                [float("nan") if r is None else r for r in found], dtype=torch.float32
            )
            self._note(mode, {f"rewards/{function.__name__}/mean": known.nanmean()})
            total += weight * known.nan_to_num(0.0)
        self._note(mode, {"reward": total.mean(), "reward_std": total.std(correction=0)})
        return total

    def _learnable(self, batch: Batch) -> Batch:
        """Add values, advantages and returns to a rollout, and let beta follow the KL."""
        mask = batch["mask"]
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        with self._as_value(model):
            values = self._no_grad(batch, self._values) * mask
        model.train(training)
        rewards = shaped(batch["scores"], batch["kl"], mask, self.beta)
        if self.args.whiten_rewards:
            rewards = whitened(rewards, mask, keep_mean=True)
        gained = advantages(rewards, values, mask, self.args.gamma, self.args.lam)
        returns = gained + values
        self._note("train", {
            "beta": self.beta, "explained_variance": explained_variance(values, returns, mask),
        })  # fmt: skip
        if self.args.kl_target is not None:
            share = min(1.0, len(mask) / self.args.kl_horizon)
            kl = batch["kl"].sum(1).mean().item()
            self.beta = controlled(self.beta, kl, self.args.kl_target, share)
        if self.args.whiten_advantages:
            gained = whitened(gained, mask)
        kept = ("ids", "attention", "mask", "logps")
        self.num_tokens += int(batch["attention"].sum())
        return {key: batch[key] for key in kept} | {
            "values": values, "advantages": gained, "returns": returns,
        }  # fmt: skip

    # --- forwards

    @contextmanager
    def _reference(self, model: Any) -> Iterator[Any]:
        with using(model, self.ref) if is_adapted(model) else nullcontext():
            yield self.reference if self.reference is not None else model

    @contextmanager
    def _as_value(self, model: Any) -> Iterator[None]:
        with using(model, "value") if is_adapted(model) else nullcontext():
            yield

    def _hidden(self, batch: Batch, body: Any) -> Tensor:
        """Return the states that each completion token was chosen from, [B, T, C]."""
        with self.accelerator.autocast():
            hidden = body(**_inputs(batch), use_cache=False).last_hidden_state
        return hidden[:, -batch["mask"].shape[1] - 1 : -1]  # type: ignore[no-any-return]

    def _logits(self, batch: Batch, model: Any) -> Tensor:
        whole = model.get_base_model() if is_adapted(model) else model
        kept = batch["mask"].shape[1] + 1
        with self.accelerator.autocast():
            logits = whole(**_inputs(batch), use_cache=False, logits_to_keep=kept).logits
        return logits[:, :-1].float() / self.args.temperature  # type: ignore[no-any-return]

    def _logps(self, batch: Batch, model: Any = None) -> Tensor:
        """Return the log-probabilities of the completions' tokens, [B, T]."""
        logits = self._logits(batch, self.model if model is None else model)
        chosen = batch["ids"][:, -batch["mask"].shape[1] :]
        found: Tensor = selective_log_softmax(logits, chosen)
        return found

    def _values(self, batch: Batch) -> Tensor:
        """Return the value of the state before each completion token, [B, T], in float32."""
        value, model = self.model.ppo_value, self.model
        whole = model.get_base_model() if is_adapted(model) else model
        body = whole.base_model if value.body is None else value.body
        return value.score(self._hidden(batch, body).float()).squeeze(-1)  # type: ignore[no-any-return]

    def _no_grad(self, batch: Batch, of: Any, *rest: Any) -> Tensor:
        """Compute for a rollout in parts that fit where an evaluation batch fits."""
        size = self.args.per_device_eval_batch_size
        with torch.no_grad():
            cut = range(0, len(batch["ids"]), size)
            keys = ("ids", "attention", "mask")
            return torch.cat([of({k: batch[k][i : i + size] for k in keys}, *rest) for i in cut])

    # --- learning

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Step back through policy and value, one after the other.

        Apart, since a checkpointed forward is recomputed under the adapter of the moment.
        """
        model.train()
        batch = self._prepare_inputs(inputs)
        loss = self._part(self._policy_loss(batch))
        with self._as_value(self.accelerator.unwrap_model(model)):
            loss = loss + self._part(self.args.value_coef * self._value_loss(batch))
        return loss

    def _part(self, loss: Tensor) -> Tensor:
        loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()

    def _policy_loss(self, batch: Batch) -> Tensor:
        logits, mask = self._logits(batch, self.model), batch["mask"]
        logps = selective_log_softmax(logits, batch["ids"][:, -mask.shape[1] :])
        args = batch["logps"], batch["advantages"], mask, self.args.epsilon
        loss, clipped = policy_loss(logps, *args)
        with nullcontext() if self.args.entropy_coef else torch.no_grad():
            entropy = mean(entropy_from_logits(logits), mask)
        self._note("train", {
            "policy_loss": loss, "clip_ratio": clipped, "entropy": entropy,
            "approx_kl": mean(divergence(batch["logps"], logps, "k3"), mask),
        })  # fmt: skip
        bonus: Tensor = self.args.entropy_coef * entropy
        return loss - bonus

    def _value_loss(self, batch: Batch) -> Tensor:
        values = self._values(batch)
        args = batch["values"], batch["returns"], batch["mask"], self.args.value_epsilon
        loss, clipped = value_loss(values, *args)
        self._note("train", {"value_loss": loss, "value_clip_ratio": clipped})
        return loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        """Answer held-out prompts and note rewards and KL; there is no loss to speak of."""
        self._rollout(inputs, "eval")
        return None, None, None

    def _note(self, mode: str, numbers: dict[str, Any]) -> None:
        for key, number in numbers.items():
            number = number.detach() if isinstance(number, Tensor) else number
            self._metrics[mode][key].append(float(number))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last line."""
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        prefix = "eval_" if mode == "eval" else ""
        for key, numbers in self._metrics[mode].items():
            logs[prefix + key] = sum(numbers) / len(numbers)
        self._metrics[mode].clear()
        if mode == "train":
            logs["num_tokens"] = self.num_tokens
        super().log(logs, start_time)

    # --- files

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Save policy and adapters as transformers does, and what else is the value's."""
        if not is_adapted(self.model):
            states = self.model.state_dict().items()
            state_dict = {k: v for k, v in states if not k.startswith("ppo_value.")}
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        save_file(_whole(self.model.ppo_value), folder / "value.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for parameter, flag in flags:  # transformers lets one adapter train
            parameter.requires_grad = flag
        saved = load_file(Path(resume_from_checkpoint) / "value.safetensors")
        self.model.ppo_value.load_state_dict(saved)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the rollout with them: a checkpoint may fall between two of its passes."""
        super()._save_optimizer_and_scheduler(output_dir)
        save_file(
            _whole(self.buffer | {"order": self.order}), Path(output_dir) / "rollout.safetensors"
        )
        state = {
            "micro_step": self.micro_step, "beta": self.beta, "num_tokens": self.num_tokens,
            "metrics": self._metrics["train"],
        }  # fmt: skip
        (Path(output_dir) / "ppo.json").write_text(json.dumps(state))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / "ppo.json").is_file():
            buffer = load_file(Path(checkpoint) / "rollout.safetensors")
            self.order = buffer.pop("order")
            self.buffer = {key: value.to(self.model.device) for key, value in buffer.items()}
            state = json.loads((Path(checkpoint) / "ppo.json").read_text())
            self.micro_step, self.beta = state["micro_step"], state["beta"]
            self.num_tokens = state["num_tokens"]
            self._metrics["train"] |= state["metrics"]


def _inputs(batch: Batch) -> Batch:
    """Return what a model reads of a rollout; padding on the left does not count as places."""
    places = (batch["attention"].cumsum(1) - 1).clamp_min(0)
    return {
        "input_ids": batch["ids"], "attention_mask": batch["attention"], "position_ids": places,
    }  # fmt: skip


def _unheard(*_: Any) -> None:
    """Take columns that a reward function wants to log: TRL's tables, which are not shown here."""


def _whole(tensors: Any) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: contiguous, nothing shared."""
    items = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
    return {key: value.detach().clone().contiguous() for key, value in items.items()}
