"""The estimate counts as the run itself does, without a weight."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from lora_exp import compose
from lora_exp.after.estimate import base_bytes, estimate, model_config, need, skeleton
from lora_exp.errors import ConfigError, TargetError
from lora_exp.model.loading import base_of
from tests.after.test_chat import lora_exp
from tests.conftest import ROOT

Trained = Callable[..., Path]
METHODS = [
    "peft=lora", "targets=qv", "targets=mlp", "peft=dora", "peft=pissa", "peft=ia3", "peft=vera",
    "peft=oft", "peft=ln_tuning", "peft=prompt_tuning", "peft=p_tuning", "peft=prefix_tuning",
    "peft.target_modules=[embed_tokens,q_proj]", "+peft.modules_to_save=[embed_tokens]",
    "peft=none",
]  # fmt: skip


def config_of(run: Path) -> DictConfig:
    return OmegaConf.create(OmegaConf.to_container(OmegaConf.load(run / "config.yaml")))


@pytest.mark.parametrize("override", METHODS)
def test_what_trains_and_what_is_saved_is_counted_as_the_run_did(
    trained: Trained, override: str
) -> None:
    run = trained(override)
    cfg = config_of(run)
    found = need(cfg, model_config(cfg))
    record = json.loads((run / "run.json").read_text())
    assert found.trainable == record["counts"]["trainable_parameters"]
    (file,) = run.glob("*/*.safetensors")
    assert found.saved == sum(t.numel() * t.element_size() for t in load_file(file).values())


def held(model: Any) -> int:
    """Count the bytes that a loaded model's weights take, their scales included."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            inner = state.state2
            tensors += [state.absmax, *([inner.absmax] if inner is not None else [])]
        if (scales := getattr(parameter, "SCB", None)) is not None:
            tensors.append(scales)
    return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in tensors}.values())


@pytest.mark.parametrize(
    "quant", [["none"], ["nf4"], ["int8"], ["fp4", "quant.double_quant=false"]], ids=lambda q: q[0]
)
def test_a_quantised_base_takes_the_bytes_that_are_told(quant: list[str]) -> None:
    cfg = compose("tracking=none", f"quant={quant[0]}", *quant[1:])
    model = skeleton(cfg, model_config(cfg))
    assert all(p.device.type == "meta" for p in model.parameters())
    loaded = held(base_of(cfg).model)
    assert base_bytes(model, cfg.quant) == pytest.approx(loaded, rel=1e-4)


@pytest.mark.parametrize(
    ("optim", "bytes_each"),
    [("adamw_torch", 8), ("sgd", 0), ("lion_32bit", 4), ("paged_adamw_32bit", 8), ("lomo", 8)],
)
def test_an_optimiser_keeps_so_many_bytes_of_each_weight(optim: str, bytes_each: int) -> None:
    found = estimate(compose("tracking=none", f"train.optim={optim}"))
    assert found["optimizer_known"] is (optim != "lomo")
    for row in found["rows"]:
        assert row["optimizer"] == bytes_each * row["trainable"]
        assert row["gradients"] == 4 * row["trainable"]


def test_an_8_bit_optimiser_keeps_small_tensors_in_32_bits() -> None:
    cfg = compose("tracking=none", "peft=none", "train.optim=adamw_8bit")
    config = model_config(cfg)
    counts = [p.numel() for p in skeleton(cfg, config).parameters()]
    small = sum(count for count in counts if count < 4096)
    assert small
    assert need(cfg, config).optimizer == 2 * (sum(counts) - small) + 8 * small


def test_a_config_stands_beside_other_bases_and_every_weight() -> None:
    rows = estimate(compose("tracking=none", "peft.r=8", "quant=nf4"))["rows"]
    assert [(row["peft"], row["quant"], row["chosen"]) for row in rows] == [
        ("lora", "none", False), ("lora", "nf4", True), ("lora", "int8", False),
        ("none", "none", False),
    ]  # fmt: skip
    none, nf4, int8, whole = rows
    assert nf4["weights"] < int8["weights"] < none["weights"]
    assert whole["trainable"] == 1_869_504
    for row in rows:
        parts = ("weights", "gradients", "optimizer", "activations")
        assert row["total"] == sum(row[part] for part in parts)


def test_a_quantisation_of_ones_own_is_a_row_too() -> None:
    rows = estimate(compose("tracking=none", "quant=fp4", "targets=qv"))["rows"]
    assert [row["quant"] for row in rows if row["chosen"]] == ["fp4"]
    assert len(rows) == 5


def test_a_pair_that_is_refused_says_why() -> None:
    rows = estimate(compose("tracking=none", "peft=dora"))["rows"]
    (refused,) = (row for row in rows if "refused" in row)
    assert refused["quant"] == "int8"
    assert refused["refused"].startswith("dora on int8: ")


def test_rows_in_pairs_and_longer_ones_take_more() -> None:
    def kept(*overrides: str) -> int:
        cfg = compose("tracking=none", *overrides)
        return need(cfg, model_config(cfg)).activations

    pairs = "algorithm=dpo", "data=demo_pairs"
    assert kept(*pairs) > 1.8 * kept()
    assert kept("train.gradient_checkpointing=true") < kept() / 2
    assert kept("algorithm.args.max_length=256") < kept() / 1.7
    assert kept("algorithm=reward", "data=demo_pairs") < kept(*pairs)  # it has no logits


def test_a_run_that_was_the_same_is_told_with_its_peak(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("quant=nf4")
    cfg = config_of(run)
    monkeypatch.chdir(tmp_path)
    assert not any(row["measured"] for row in estimate(cfg)["rows"])
    shutil.copytree(run, tmp_path / "outputs" / "2026-11-22" / "12-00-00")
    nf4 = next(row for row in estimate(cfg)["rows"] if row["chosen"])
    peak = json.loads((run / "run.json").read_text())["metrics"]["peak_bytes"]
    assert nf4["measured"] == peak
    assert nf4["run"] == "outputs/2026-11-22/12-00-00"
    beside = estimate(OmegaConf.merge(cfg, {"quant": None, "choices": {"quant": "none"}}))["rows"]
    assert [row["measured"] for row in beside] == [None, peak, None, None]
    assert not any(row["measured"] for row in estimate(compose("quant=nf4"))["rows"])


RUN = """
import json, pathlib, re, sys
from lora_exp import compose, run
from lora_exp.after.estimate import model_config, need
cfg = compose(*sys.argv[2:])
told = need(cfg, model_config(cfg)).total
import lora_exp.experiment, lora_exp.model.memory, trl
status = pathlib.Path("/proc/self/status").read_text()
before = 1024 * int(re.search(r"VmRSS:\\s*(\\d+)", status)[1])
peak = run(cfg, sys.argv[1]).metrics["peak_bytes"]
print(json.dumps([told, peak - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_total_is_near_the_peak_of_a_run_with_rows_as_long_as_told(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i} " + "a b c d e f g " * 200}) + "\n"
                            for i in range(40)))  # fmt: skip
    overrides = [
        "tracking=none", "algorithm=pretrain", "data=jsonl", f"data.path={rows}", "quant=nf4",
        "train.max_steps=2", "samples.rows=0", "train.save_strategy=no", "data.max_eval_rows=1",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "run"), *overrides],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told, measured = json.loads(done.stdout.splitlines()[-1])
    assert 0.5 < told / measured < 2


def test_a_wrong_override_is_told_as_a_run_would() -> None:
    for wrong in (["modle=tiny"], ["peft.r=0", "+peft.lora_alpa=2"], ["model=tny"]):
        command = [sys.executable, str(ROOT / "run.py"), *wrong]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        told = lora_exp("estimate", *wrong)
        assert (told.returncode, told.stderr) == (1, ran.stderr)


def test_what_only_the_model_can_tell_is_an_error_by_name(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="did you mean q_proj"):
        estimate(compose("tracking=none", "peft.target_modules=[q_prj]"))
    with pytest.raises(ConfigError, match=r"model\.path: .* cannot be loaded"):
        estimate(compose("tracking=none", "model=local", f"model.path={tmp_path}"))


def test_the_page_marks_what_was_chosen_and_options_of_ones_own_count(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "small.yaml").write_text("# small\ndefaults: [lora]\nr: 2\n")
    own = ["--config-dir", str(tmp_path), "peft=small", "quant=int8"]
    page = lora_exp("estimate", *own)
    assert page.returncode == 0, page.stderr
    head, trainable = page.stdout.splitlines()[1:3]
    assert re.split("  +", head.strip()) == ["small", "small, nf4", "> small, int8", "every weight"]
    assert trainable.split() == ["trainable", *["29,184"] * 3, "1,869,504"]
    found = json.loads(lora_exp("estimate", *own, "--json").stdout)
    assert [row["trainable"] for row in found["rows"]][:3] == [29_184] * 3
