"""A config."""

from lora_exp.config.settled import asset as asset
