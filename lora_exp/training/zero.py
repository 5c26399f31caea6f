"""ZeRO-2 by DeepSpeed: each process has the model, and its share of the optimizer's state.

A trainer goes on as with a copy of the model in each process, so weights are saved, loaded and
evaluated as those of any run. Only accelerate knows of DeepSpeed: it prepares, runs the backward
pass, clips and steps.
"""

from __future__ import annotations

import logging
import math
import warnings
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType
from accelerate.utils.operations import convert_outputs_to_fp32

from lora_exp.errors import ConfigError, LoraExpError
from lora_exp.model.mixture import expert_count
from lora_exp.training.shares import Shares

BUCKET = 50_000_000  # gradients that are reduced at a time
MASKED = -1.0  # DeepSpeed's norm of gradients that are not finite


def deepspeed_config() -> dict[str, Any]:
    """Return DeepSpeed's config; `auto` is what the trainer's arguments say."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # it uses older names
    # on a CPU it would compile an all-reduce of its own, for a minute; gloo's is as exact
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": BUCKET},
        **dict.fromkeys((*sizes, "gradient_clipping"), "auto"),
    }


class Zero(Shares):
    """A mixin for trainers: the optimizer's state is shared out."""

    model: Any
    args: Any
    accelerator: Any

    @property
    def is_deepspeed_enabled(self) -> bool:
        """Return False: transformers would save and load as DeepSpeed does, which takes pickles."""
        return False

    @is_deepspeed_enabled.setter
    def is_deepspeed_enabled(self, value: bool) -> None:
        pass

    def use_autocast(self) -> None:
        """Compute in bfloat16 as without DeepSpeed, which would round the trained weights to it.

        Raises:
            ConfigError: the loss would be scaled, or a gradient may be missing in one process.
            LoraExpError: accelerate does not use DeepSpeed.
        """
        if self.args.fp16:
            text = "float16 needs a scaled loss, which zero2 does not have; give bfloat16"
            raise ConfigError([("quant.compute_dtype", text)])
        if expert_count(self.model.config) is not None:
            text = "zero2 adds gradients up in the order in which they come, which may differ in a"
            text = f"{text} mixture of experts; parallel=ddp"
            raise ConfigError([("parallel", text)])
        state = self.accelerator.state
        if state.distributed_type != DistributedType.DEEPSPEED:
            raise LoraExpError(f"zero2 asked for DeepSpeed, but it is {state.distributed_type}")
        state.deepspeed_plugin.deepspeed_config["bf16"] = {"enabled": False}
        if self.args.bf16:
            kind = self.args.device.type
            self.accelerator.autocast = partial(torch.autocast, kind, dtype=torch.bfloat16)
            compute = self.accelerator.autocast()(self.model.forward)
            self.model.forward = convert_outputs_to_fp32(compute)

    def _get_grad_norm(self, model: Any, grad_norm: float | None = None) -> float:
        norm: float = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        return math.nan if norm == MASKED else norm

    def share(self) -> dict[str, Any]:
        """Return this process's share of what DeepSpeed updates."""
        share = self.optimizer.optimizer  # DeepSpeed's, in accelerate's
        weights = share.single_partition_of_fp32_groups
        return {"weights": weights, "state": share.optimizer.state_dict()}

    def take_share(self, saved: dict[str, Any]) -> None:
        """Go on from a share that this process has saved."""
        share = self.optimizer.optimizer
        weights = share.single_partition_of_fp32_groups
        for tensor, saved_tensor in zip(weights, saved["weights"], strict=True):
            tensor.data.copy_(saved_tensor)
        share.optimizer.load_state_dict(saved["state"])
