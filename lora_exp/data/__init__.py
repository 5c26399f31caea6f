"""A row."""

from lora_exp.data.rows import Rows as Rows
