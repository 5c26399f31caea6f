"""PPO on one base: policy and critic are adapters, the reference is the policy at the start.

A batch of the data loader is a rollout's prompts; the rollout is generated when its first
micro-batch is needed. Shapes as in `rollout`; C channels.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trl.trainer.utils import RepeatSampler, entropy_from_logits, selective_log_softmax

from lora_exp.adapter.several import add_copy, is_adapted, using
from lora_exp.algorithm.critic import Critic
from lora_exp.algorithm.ppo_losses import (
    adapted_beta,
    explained_variance,
    gae_advantages,
    kl_estimate,
    masked_mean,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from lora_exp.algorithm.rollout import Batch, RolloutConfig, RolloutTrainer, model_inputs
from lora_exp.parallel.world import world


@dataclass
class PPOConfig(RolloutConfig):
    """PPO's arguments; those that TRL's GRPO has too are named as there."""

    num_minibatches: int = field(
        default=1, metadata={"help": "Minibatches of a rollout, an update each."}
    )
    num_iterations: int = field(default=4, metadata={"help": "Passes over each rollout."})
    beta: float = field(default=0.04, metadata={"help": "Coefficient of the KL to the reference."})
    kl_target: float | None = field(
        default=None, metadata={"help": "KL of an answer, in nats, that beta aims for."}
    )
    kl_horizon: int = field(default=10000, metadata={"help": "Completions over which beta adapts."})
    gamma: float = field(default=1.0, metadata={"help": "Discount for each token."})
    lam: float = field(default=0.95, metadata={"help": "GAE's lambda."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip of the policy's ratio."})
    value_epsilon: float = field(default=0.2, metadata={"help": "Clip of a value's step."})
    value_coef: float = field(default=0.5, metadata={"help": "Weight of the value's loss."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    whiten_advantages: bool = field(default=True, metadata={"help": "To variance 1, mean 0."})
    whiten_rewards: bool = field(default=False, metadata={"help": "To variance 1."})
    shuffle_dataset: bool = field(default=True, metadata={"help": "Shuffle the prompts."})


class PPOTrainer(RolloutTrainer):
    """Train policy and critic with clipped losses on rollouts sampled from the policy."""

    loss_is_scaled_for_ga = False
    saved_apart = ("ppo_value.",)  # weights that `_save` writes to a file of their own

    def _add_parts(self, model: Any) -> None:
        """Add the critic to the policy and its reference."""
        if self.args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end restores the policy but not its critic")
        if is_adapted(model):
            add_copy(model, "value", trainable=True)
        body = None if is_adapted(model) else copy.deepcopy(model.base_model)
        width = model.config.get_text_config().hidden_size
        model.ppo_value = Critic(body, width, model.device)
        self.beta, self.micro_step = self.args.beta, 0
        self.buffer: Batch = {}  # the current rollout
        self.rollout_size = self.args.per_device_train_batch_size * self.parts
        count = len(self.train_dataset)
        if count < (size := self.rollout_size * world.size):
            raise ValueError(f"a rollout takes {size} prompts, but there are {count}")

    @property
    def parts(self) -> int:
        """Return the number of micro-batches that a rollout is cut into."""
        return int(self.args.num_minibatches * self.args.gradient_accumulation_steps)

    # --- prompts

    def get_train_dataloader(self) -> Any:
        """Return a loader that yields a rollout's prompts once for each micro-batch step on it."""
        return self._get_dataloader(
            dataset=self.train_dataset, description="Training", batch_size=self.rollout_size,
            sampler_fn=self._get_train_sampler, is_training=True,
        )  # fmt: skip

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return RepeatSampler(
            dataset, mini_repeat_count=1, batch_size=self.rollout_size * world.size,
            repeat_count=self.parts * self.args.num_iterations,
            shuffle=self.args.shuffle_dataset, seed=self.args.seed,
        )  # fmt: skip

    # --- rollouts

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Return the next micro-batch of the rollout; generate a new rollout when it is used up."""
        step = self.micro_step % (self.parts * self.args.num_iterations)
        if step == 0 or not self.buffer:
            self.buffer = self._training_batch(self._rollout(inputs, "train"))
        if step % self.parts == 0:  # every pass over the rollout has its own order
            self.order = torch.randperm(self.rollout_size)
        self.micro_step += 1
        indices = self.order.chunk(self.parts)[step % self.parts].to(self.buffer["ids"].device)
        return {key: tensor[indices] for key, tensor in self.buffer.items()}

    def _training_batch(self, batch: Batch) -> Batch:
        """Add values, advantages and returns to a rollout, and adapt beta to the KL."""
        mask = batch["mask"]
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        with self._critic_active(model):
            values = self._in_batches(batch, self._values) * mask
        model.train(training)
        rewards = token_rewards(batch["scores"], batch["kl"], mask, self.beta)
        if self.args.whiten_rewards:
            rewards = whiten(rewards, mask, keep_mean=True)
        advantages = gae_advantages(rewards, values, mask, self.args.gamma, self.args.lam)
        returns = advantages + values
        self._record("train", {
            "beta": self.beta, "explained_variance": explained_variance(values, returns, mask),
        })  # fmt: skip
        if self.args.kl_target is not None:
            share = min(1.0, len(mask) * world.size / self.args.kl_horizon)
            kl = world.mean(batch["kl"].sum(1).mean().item())
            self.beta = adapted_beta(self.beta, kl, self.args.kl_target, share)
        if self.args.whiten_advantages:
            advantages = whiten(advantages, mask)
        keys = ("ids", "attention", "mask", "logps")
        return {key: batch[key] for key in keys} | {
            "values": values, "advantages": advantages, "returns": returns,
        }  # fmt: skip

    # --- forwards

    @contextmanager
    def _critic_active(self, model: Any) -> Iterator[None]:
        with using(model, "value") if is_adapted(model) else nullcontext():
            yield

    def _hidden(self, batch: Batch, body: Any) -> Tensor:
        """Return the hidden state that predicts each completion token, [B, T, C]."""
        with self.accelerator.autocast():
            hidden = body(**model_inputs(batch), use_cache=False).last_hidden_state
        return hidden[:, -batch["mask"].shape[1] - 1 : -1]  # type: ignore[no-any-return]

    def _values(self, batch: Batch) -> Tensor:
        """Return the value of the state before each completion token, [B, T], in float32."""
        critic, model = self.model.ppo_value, self.model
        base_model = model.get_base_model() if is_adapted(model) else model
        body = base_model.base_model if critic.body is None else critic.body
        return critic.score(self._hidden(batch, body).float()).squeeze(-1)  # type: ignore[no-any-return]

    # --- learning

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run the backward pass of the policy's loss, then that of the critic's.

        Two passes: gradient checkpointing recomputes with the adapter that is active at that time.
        """
        model.train()
        batch = self._prepare_inputs(inputs)
        loss = self._backward(self._policy_loss(batch))
        with self._critic_active(self.accelerator.unwrap_model(model)):
            loss = loss + self._backward(self.args.value_coef * self._value_loss(batch))
        if self.accelerator.sync_gradients:
            # its forward passes are not those that DistributedDataParallel watches
            world.average_gradients(model.parameters())
        return loss

    def _backward(self, loss: Tensor) -> Tensor:
        loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()

    def _policy_loss(self, batch: Batch) -> Tensor:
        logits, mask = self._logits(batch, self.model), batch["mask"]
        logps = selective_log_softmax(logits, batch["ids"][:, -mask.shape[1] :])
        args = batch["logps"], batch["advantages"], mask, self.args.epsilon
        loss, clipped = policy_loss(logps, *args)
        with nullcontext() if self.args.entropy_coef else torch.no_grad():
            entropy = masked_mean(entropy_from_logits(logits), mask)
        self._record("train", {
            "policy_loss": loss, "clip_ratio": clipped, "entropy": entropy,
            "approx_kl": masked_mean(kl_estimate(batch["logps"], logps, "k3"), mask),
        })  # fmt: skip
        bonus: Tensor = self.args.entropy_coef * entropy
        return loss - bonus

    def _value_loss(self, batch: Batch) -> Tensor:
        values = self._values(batch)
        args = batch["values"], batch["returns"], batch["mask"], self.args.value_epsilon
        loss, clipped = value_loss(values, *args)
        self._record("train", {"value_loss": loss, "value_clip_ratio": clipped})
        return loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        """Answer held-out prompts and log rewards and KL; no loss is computed."""
        self._rollout(inputs, "eval")
        return None, None, None

    # --- files

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Save policy and adapters as transformers does, and the critic's own weights."""
        if not is_adapted(self.model):
            states = self.model.state_dict().items()
            state_dict = {k: v for k, v in states if not k.startswith("ppo_value.")}
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        save_file(_contiguous(self.model.ppo_value), folder / "value.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        trainable = [(p, p.requires_grad) for p in self.model.parameters()]
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for parameter, requires_grad in trainable:  # transformers makes only one adapter trainable
            parameter.requires_grad = requires_grad
        saved = load_file(Path(resume_from_checkpoint) / "value.safetensors")
        self.model.ppo_value.load_state_dict(saved)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the rollout, too: a checkpoint may fall between two passes over it."""
        super()._save_optimizer_and_scheduler(output_dir)
        save_file(
            _contiguous(self.buffer | {"order": self.order}),
            Path(output_dir) / world.own("rollout.safetensors"),
        )
        state = {
            "micro_step": self.micro_step, "beta": self.beta, "num_tokens": self.num_tokens,
        }  # fmt: skip
        (Path(output_dir) / world.own("ppo.json")).write_text(json.dumps(state))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / "ppo.json").is_file():
            buffer = load_file(Path(checkpoint) / world.own("rollout.safetensors"))
            self.order = buffer.pop("order")
            self.buffer = {key: tensor.to(self.model.device) for key, tensor in buffer.items()}
            state = json.loads((Path(checkpoint) / world.own("ppo.json")).read_text())
            self.micro_step, self.beta = state["micro_step"], state["beta"]
            self.num_tokens = state["num_tokens"]


def _contiguous(tensors: Any) -> dict[str, Tensor]:
    """Return copies that safetensors can save: contiguous, sharing no memory."""
    items = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
    return {key: tensor.detach().clone().contiguous() for key, tensor in items.items()}
