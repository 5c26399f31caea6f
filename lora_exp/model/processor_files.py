"""The files of a multimodal checkpoint's processor, which a model made from it needs, too."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig
from transformers.utils import cached_file

from lora_exp.files.paths import asset

NAMES = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "image_processor_config.json", "feature_extractor_config.json",
)  # fmt: skip


def copy_processor(model: DictConfig, folder: Path) -> None:
    """Copy a base's processor files, as far as it has them.

    Args:
        model: the `model` section of a config that loads the base.
        folder: of the model that was made from it.
    """
    for name in NAMES:
        with suppress(OSError):  # it has none, or there is no connection to the Hub
            file = cached_file(str(asset(model.path)), name, revision=model.revision)
            shutil.copy(str(file), folder / name)
