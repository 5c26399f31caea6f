"""Norms of updates, by layer."""

from __future__ import annotations

import json

import pytest

from lora_exp.comparison.layers import by_layer, layers
from lora_exp.comparison.points import Series
from lora_exp.runs.run import read_run
from tests.comparison.conftest import Write

NAMES = ["model.layers.0.q_proj", "model.layers.0.v_proj", "model.layers.10.mlp.experts.3.up"]


def test_the_norm_of_a_layer_is_that_of_all_its_modules() -> None:
    norms = dict(zip(NAMES, (3.0, 4.0, 2.0), strict=True)) | {"lm_head": 9.0, "h.2": 0.5}
    assert by_layer(norms) == {0: pytest.approx(5.0), 2: 0.5, 10: 2.0}
    assert list(by_layer({"a.10.b": 1.0, "a.2.b": 1.0})) == [2, 10]


def test_a_group_is_a_line_of_means_over_its_runs(write_run: Write) -> None:
    runs = []
    for name, norms in (("a", [1.0, 0.0, 2.0]), ("b", [3.0, 0.0, None]), ("c", None)):
        directory = write_run(name)
        if norms:
            (directory / "updates.json").write_text(
                json.dumps(dict(zip(NAMES, norms, strict=True)))
            )
        runs.append(read_run(directory))
    damaged = write_run("d")
    (damaged / "updates.json").write_text("[1")
    figure = layers([Series("x", {}, runs), Series("none", {}, [read_run(damaged)])])
    assert figure is not None
    (line,) = figure["data"]
    assert (line["x"], line["y"], line["name"]) == ([0, 10], [2.0, 1.0], "x")
    assert layers([Series("none", {}, [read_run(damaged)])]) is None
