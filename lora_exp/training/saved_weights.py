"""The weights of a trainer's checkpoints: by the names of the parameters that train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lora_exp.errors import CheckpointError

TRAINED, REFERENCE = "trained.safetensors", "reference.safetensors"


class SavedWeights:
    """A mixin for trainers: a checkpoint holds all that trains, or is refused.

    peft saves the output of a prompt's encoder, not the encoder. transformers saves some weights by
    the names and in the shapes in which they were first published, those of experts for one, and
    skips them when it loads the checkpoint.
    """

    model: Any
    args: Any

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        with _own_names(self.model):
            super()._save(output_dir, state_dict)  # type: ignore[misc]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint with other weights than the model's; transformers would only warn.

        Raises:
            CheckpointError: it names one that is missing, or that the model does not have.
        """
        tensors = self.model.state_dict(keep_vars=True)
        missing = set(load_result.missing_keys)
        loaded = {id(tensor) for name, tensor in tensors.items() if name not in missing}  # or tied
        apart = (*getattr(self, "saved_apart", ()), *(self.model._keys_to_ignore_on_save or ()))
        for name in load_result.missing_keys:
            if id(tensors[name]) not in loaded and not name.startswith(apart):
                raise CheckpointError(f"the checkpoint does not hold {name}; start a new run")
        for name in load_result.unexpected_keys:
            text = f"the checkpoint holds {name}, and the model does not; start a new run"
            raise CheckpointError(text)

    def _load_best_model(self) -> None:
        if self._trains_prompts():
            self._load_trained(Path(self.state.best_model_checkpoint))  # type: ignore[attr-defined]
        else:
            super()._load_best_model()  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._trains_prompts():
            self._load_trained(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _trains_prompts(self) -> bool:
        return hasattr(self.model, "prompt_encoder")

    def _updates_reference(self) -> bool:
        return bool(getattr(self.args, "sync_ref_model", False))

    def _trained(self) -> list[tuple[str, torch.Tensor]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def _load_trained(self, folder: Path) -> None:
        _fill(self._trained(), folder / TRAINED)

    def _reference(self) -> Iterable[tuple[str, torch.Tensor]]:
        reference = self.accelerator.unwrap_model(self.ref_model)  # type: ignore[attr-defined]
        return list(reference.named_parameters())

    def _load_reference(self, folder: Path) -> None:
        if self._updates_reference():
            _fill(self._reference(), folder / REFERENCE)

    def _save_extra_weights(self, folder: Path) -> None:
        """Save other weights that the next step uses: prompt encoders, an updated reference."""
        if self._trains_prompts():
            save_file({n: p.detach().contiguous() for n, p in self._trained()}, folder / TRAINED)
        if self._updates_reference():
            tensors = {n: p.detach().contiguous() for n, p in self._reference()}
            save_file(tensors, folder / REFERENCE)


@contextmanager
def _own_names(model: Any) -> Iterator[None]:
    """Let a whole model be saved by the names of its parameters."""
    if not isinstance(model, PreTrainedModel):
        yield
        return
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained


def _fill(parameters: Iterable[tuple[str, torch.Tensor]], path: Path) -> None:
    """Copy saved tensors into parameters of the same names.

    Raises:
        CheckpointError: the file, or a parameter in it, is missing.
    """
    saved = load_file(path) if path.is_file() else {}
    for name, parameter in parameters:
        if name not in saved:
            text = f"{path.parent} does not hold {name}, which trains; start a new run"
            raise CheckpointError(text)
        parameter.data.copy_(saved[name])
