"""A config."""

from lora_exp.files.paths import asset as asset
