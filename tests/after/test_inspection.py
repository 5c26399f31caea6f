"""What `inspect` reports equals what the files contain."""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from lora_exp import load_adapter
from lora_exp.adapter.updates import modules
from lora_exp.after.inspection import inspect
from lora_exp.after.pages import inspection
from lora_exp.after.saving import save
from lora_exp.errors import AdapterError
from tests.adapter.test_targets import DOTS
from tests.after.copies import copy_run, copy_with_weights
from tests.after.test_saved import ADALORA

Trained = Callable[..., Path]


PATTERNS = ("+peft.rank_pattern={q_proj:4}", "+peft.alpha_pattern={q_proj:2}")


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")  # peft: of layers without a bias
@pytest.mark.parametrize(
    ("method", "overrides", "ranks"),
    [
        ("lora", PATTERNS, {4, 16}), ("rslora", PATTERNS, {4, 16}), ("adalora", ADALORA, None),
        ("lora", ("+peft.lora_bias=true",), {16}),
    ],
)  # fmt: skip
def test_norms_equal_those_of_pefts_updates(
    trained: Trained, method: str, overrides: tuple[str, ...], ranks: set[int] | None
) -> None:
    run = trained(f"peft={method}", *overrides)
    model, _ = load_adapter(run)
    reported = {module["name"]: module for module in inspect(run)["modules"]}
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert reported.keys() == layers.keys()
    for name, layer in layers.items():
        norm = float(layer.get_delta_weight("default").norm())
        assert math.isclose(reported[name]["norm"], norm, rel_tol=1e-4)
    assert ranks is None or {module["r"] for module in reported.values()} == ranks
    recorded = json.loads((run / "updates.json").read_text())  # for reports, which have no torch
    assert recorded == {name: module["norm"] for name, module in reported.items()}


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # peft: without experts
@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        (["peft.rank_pattern={experts.gate_up_proj:2}"], {"gate_up_proj": 2, "down_proj": 4}),
        (
            ["peft.alpha_pattern={experts.down_proj:1,up_proj:3}", "peft=rslora"],
            {"gate_up_proj": 4, "down_proj": 4},
        ),
    ],
    ids=["rank_pattern", "alpha_pattern"],
)
def test_stacked_experts_have_the_rank_and_norm_of_each(
    folder_of: Callable[[Any], Path],
    quick_run: Callable[..., Any],
    settings: list[str],
    ranks: dict[str, int],
) -> None:
    model = ["model=local", f"model.path={folder_of(DOTS)}", "targets=all_linear+experts"]
    short = ["samples.rows=0", "train.warmup_steps=0", "peft.r=4", "train.max_steps=2"]
    run = quick_run(*model, *short, *settings).directory
    reported = {module["name"]: module for module in inspect(run)["modules"]}
    adapted, _ = load_adapter(run)
    for name, layer in adapted.named_modules():
        if not hasattr(layer, "get_delta_weight"):
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        parameter = getattr(layer, "parameter_name", "weight")
        stack = layer.get_delta_weight("default")
        module = reported.pop(name if parameter == "weight" else f"{name}.{parameter}")
        assert module["r"] == ranks.get(parameter, 4)
        norms = stack.flatten(1).norm(dim=1) if stack.dim() == 3 else stack.norm()[None]
        assert math.isclose(module["norm"], norms.max(), rel_tol=1e-4)
        assert math.isclose(module.get("mean_norm", norms[0]), norms.mean(), rel_tol=1e-4)
        assert module.get("experts", 1) == len(norms)
    assert not reported
    page = _printed(inspect(run))
    assert "largest" in page
    assert "mean of" in page


def test_a_report_has_method_base_size_and_run(trained: Trained) -> None:
    run = trained("peft=dora", "quant=nf4")
    report = inspect(run)
    assert report["kind"] == "adapter"
    assert report["method"] == "LORA"
    assert report["settings"]["use_dora"] is True
    assert report["base"] == "pkg://lora_exp/assets/tiny"
    assert report["base_revision"].startswith("sha256:")
    file = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    assert report["parameters"] == sum(value.numel() for value in weights.values())
    assert report["files"][file.name] == file.stat().st_size
    assert report["dtypes"] == ["float32"]
    assert report["finite"] is True
    assert report["run"]["status"] == "finished"
    assert report["run"]["choices"]["quant"] == "nf4"
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("method", ["ia3", "vera", "oft", "ln_tuning", "prompt_tuning"])
def test_every_method_can_be_inspected(trained: Trained, method: str) -> None:
    report = inspect(trained(f"peft={method}"))
    assert report["modules"]
    assert all(module["norm"] > 0 for module in report["modules"])


def test_a_whole_model_and_a_sweep_can_be_inspected(trained: Trained, tmp_path: Path) -> None:
    report = inspect("lora_exp/assets/tiny")
    model, _ = load_adapter("lora_exp/assets/tiny")
    assert report["kind"] == "model"
    assert report["architecture"] == "LlamaForCausalLM"
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    for number, run in enumerate([trained("peft=lora"), trained("peft=rslora")]):
        copy_run(run, tmp_path / "sweep" / str(number))
    sweep = inspect(tmp_path / "sweep")
    assert [job["status"] for job in sweep["jobs"]] == ["finished"] * 2
    assert all(job["value"] is not None for job in sweep["jobs"])


def test_a_damaged_file_is_an_error(trained: Trained, tmp_path: Path) -> None:
    run = copy_run(trained("peft=lora"), tmp_path / "run")
    file = run / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(AdapterError, match="its weights are damaged"):
        inspect(run)


def test_matrices_that_do_not_fit_each_other_are_an_error(trained: Trained, tmp_path: Path) -> None:
    run, file, weights = copy_with_weights(trained("peft=lora"), tmp_path / "run")
    first = min(key for key in weights if "lora_A" in key)
    save_file(weights | {first: weights[first][:3].clone()}, file)
    for function in (inspect, lambda path: save(path, tmp_path / "taken")):
        with pytest.raises(AdapterError, match=r"down_proj do not fit: lora_A.weight \[3, "):
            function(run)
    assert not (tmp_path / "taken").exists()


def test_weights_that_are_not_finite_are_reported(trained: Trained, tmp_path: Path) -> None:
    run, file, weights = copy_with_weights(trained("peft=lora"), tmp_path / "run")
    weights[min(weights)][0, 0] = float("nan")
    save_file(weights, file)
    report = inspect(run)
    assert report["finite"] is False
    assert report["modules"][0]["norm"] is None
    assert "not finite" in _printed(report)
    assert "NaN" not in json.dumps(report)


def _printed(report: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(inspection(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_an_alpha_pattern_matches_as_in_peft_but_within_a_time_limit() -> None:
    weights = {
        f"base_model.model.layers.{i}.q_proj.{end}": torch.ones(2, 2)
        for i in range(3)
        for end in ("lora_A.weight", "lora_B.weight")
    }
    config = {"lora_alpha": 2, "alpha_pattern": {r"layers\.[01]\.q_proj": 8, "q_proj": 4}}
    assert [module["lora_alpha"] for module in modules(weights, config)] == [8, 8, 4]
    hostile = {"lora_alpha": 2, "alpha_pattern": {"(x+x+)+y": 8}}
    long = {f"{'x' * 60}.{end}": torch.ones(1, 1) for end in ("lora_A.weight", "lora_B.weight")}
    started = time.perf_counter()
    with contextlib.suppress(AdapterError):
        modules(long, hostile)
    assert time.perf_counter() - started < 5
