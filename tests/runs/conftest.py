"""Runs as they lie on disk, written without training."""

from tests.comparison.conftest import write_run as write_run
