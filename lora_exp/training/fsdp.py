"""Full fine-tuning of a model whose weights are shared out: FSDP2, as ZeRO's third stage.

A gradient is averaged into the process that has that part of the weight, so gradients and the
optimizer's state are shared out, too. Weights are gathered to be saved.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lora_exp.model.sharded import from_whole, gathered, own_part, part_of
from lora_exp.parallel.world import world
from lora_exp.training.shares import Shares


class Fsdp(Shares):
    """A mixin for trainers of a model after `share_weights`."""

    model: Any
    args: Any

    def leave_wrapping(self) -> None:
        """Let accelerate not wrap the model, whose gradients come averaged."""
        self.is_distributed_loading_by_transformers = True  # its word for such a model

    def _defer_fsdp_gradient_reduction(self) -> Any:
        """Reduce each pass's gradients: until the last one, whole ones would fill the memory."""
        return nullcontext()

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """Do nothing: each part is on its device."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights of all processes, by the first one."""
        weights = gathered(self.model)
        if self.args.should_save:
            self._save(output_dir, weights)  # type: ignore[attr-defined]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_weights(Path(self.state.best_model_checkpoint))  # type: ignore[attr-defined]

    def _load_weights(self, folder: Path) -> None:
        saved: dict[str, Any] = {}
        if world.is_first:
            for path in sorted(folder.glob("model*.safetensors")):
                saved |= load_file(path)
        result = from_whole(self.model, saved)
        self._issue_warnings_after_load(result)  # type: ignore[attr-defined]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        whole = getattr(norm, "full_tensor", None)
        return float(norm if whole is None else whole())

    def share(self) -> dict[str, Any]:
        """Return the optimizer's state of this process's part of the weights."""
        state: dict[str, Any] = self.optimizer.state_dict()
        parts = {n: {k: own_part(v) for k, v in own.items()} for n, own in state["state"].items()}
        return state | {"state": parts}

    def take_share(self, saved: dict[str, Any]) -> None:
        """Go on from a share that this process has saved."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, state in saved["state"].items():
            saved["state"][number] = {k: part_of(parameters[number], v) for k, v in state.items()}
        self.optimizer.load_state_dict(saved)
