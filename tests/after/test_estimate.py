"""The estimate counts as the run itself does, without loading weights."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from lora_exp import compose
from lora_exp.after.estimate import estimate, model_config, need, skeleton
from lora_exp.config import sharding
from lora_exp.errors import ConfigError, TargetError
from lora_exp.model.loading import bnb_4bit
from tests.after.test_chat import run_cli
from tests.model.test_prequantised import saved
from tests.test_main import cli

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
def test_trained_and_saved_sizes_equal_those_of_the_run(trained: Trained, override: str) -> None:
    run = trained(override)
    cfg = config_of(run)
    needed = need(cfg, model_config(cfg))
    record = json.loads((run / "run.json").read_text())
    assert needed.trainable == record["counts"]["trainable_parameters"]
    (file,) = run.glob("*/*.safetensors")
    assert needed.saved == sum(
        tensor.numel() * tensor.element_size() for tensor in load_file(file).values()
    )


def test_of_several_processes_each_holds_its_share_of_the_rows() -> None:
    alone, rows = compose(), "train.per_device_train_batch_size"
    half, two = compose(f"{rows}=8"), compose("parallel=ddp", "parallel.processes=2")
    whole, share, each = (need(cfg, model_config(cfg)) for cfg in (alone, half, two))
    assert each.activations == share.activations < whole.activations
    assert each.gradients == 2 * whole.gradients
    assert each.weights == whole.weights


@pytest.mark.parametrize(
    ("kind", "shares"), [("ddp", (1, 0.5, 1)), ("zero2", (1, 4, 4)), ("fsdp", (4, 4, 4))]
)
def test_of_several_processes_each_holds_its_share_of_what_trains(
    kind: str, shares: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "find_spec", lambda _: object())
    cfg = compose("peft=none", f"parallel={kind}", "parallel.processes=4")
    alone, each = (need(c, model_config(c)) for c in (compose("peft=none"), cfg))
    found = [
        getattr(alone, name) / getattr(each, name) for name in ("weights", "gradients", "optimizer")
    ]
    assert found == pytest.approx(shares, rel=1e-3)


@pytest.mark.parametrize(
    ("optim", "bytes_each"),
    [("adamw_torch", 8), ("sgd", 0), ("lion_32bit", 4), ("paged_adamw_32bit", 8), ("adafactor", 8)],
)
def test_an_optimiser_keeps_a_known_number_of_bytes_per_weight(optim: str, bytes_each: int) -> None:
    result = estimate(compose("tracking=none", f"train.optim={optim}"))
    assert result["optimizer_known"] is (optim != "adafactor")
    for row in result["rows"]:
        assert row["optimizer"] == bytes_each * row["trainable"]
        assert row["gradients"] == 4 * row["trainable"]


def test_an_8_bit_optimiser_keeps_small_tensors_in_32_bits() -> None:
    cfg = compose("tracking=none", "peft=none", "train.optim=adamw_8bit")
    config = model_config(cfg)
    counts = [p.numel() for p in skeleton(cfg, config).parameters()]
    small = sum(count for count in counts if count < 4096)
    assert small
    assert need(cfg, config).optimizer == 2 * (sum(counts) - small) + 8 * small


def test_a_base_saved_in_4_bits_is_counted_so_and_not_quantised_otherwise(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", bnb_4bit("nf4", True, "auto"))
    result = estimate(compose("tracking=none", "model=local", f"model.path={folder}"))
    rows = {(row["peft"], row["quant"]): row for row in result["rows"]}
    assert rows["lora", "nf4"]["chosen"]
    assert rows["lora", "int8"]["refused"] == "the base was saved as nf4"
    assert rows["lora", "none"]["refused"] == "the base was saved as nf4"
    plain = estimate(compose("tracking=none", "quant=nf4"))["rows"]
    assert rows["lora", "nf4"]["total"] == next(r["total"] for r in plain if r["chosen"])


def test_a_config_is_compared_with_other_quantisations_and_full_fine_tuning() -> None:
    rows = estimate(compose("tracking=none", "peft.r=8", "quant=nf4"))["rows"]
    assert [(row["peft"], row["quant"], row["chosen"]) for row in rows] == [
        ("lora", "none", False), ("lora", "nf4", True), ("lora", "int8", False),
        ("none", "none", False),
    ]  # fmt: skip
    none, nf4, int8, full = rows
    assert nf4["weights"] < int8["weights"] < none["weights"]
    assert full["trainable"] == 1_869_504
    for row in rows:
        parts = ("weights", "gradients", "optimizer", "activations")
        assert row["total"] == sum(row[part] for part in parts)


def test_another_quantisation_of_the_config_is_a_row_too() -> None:
    rows = estimate(compose("tracking=none", "quant=fp4", "targets=qv"))["rows"]
    assert [row["quant"] for row in rows if row["chosen"]] == ["fp4"]
    assert len(rows) == 5


def test_a_refused_pair_has_the_reason() -> None:
    rows = estimate(compose("tracking=none", "peft=dora"))["rows"]
    (refused,) = (row for row in rows if "refused" in row)
    assert refused["quant"] == "int8"
    assert refused["refused"].startswith("dora on int8: ")


def test_pairs_and_longer_rows_take_more_memory() -> None:
    def activations(*overrides: str) -> int:
        cfg = compose("tracking=none", *overrides)
        return need(cfg, model_config(cfg)).activations

    pairs = "algorithm=dpo", "data=demo_pairs"
    assert activations(*pairs) > 1.8 * activations()
    assert activations("train.gradient_checkpointing=true") < activations() / 2
    assert activations("algorithm.args.max_length=256") < activations() / 1.7
    assert activations("algorithm=reward", "data=demo_pairs") < activations(
        *pairs
    )  # it has no logits


def test_an_earlier_run_of_the_same_config_gives_its_measured_peak(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("quant=nf4", "quant.compute_dtype=auto", "train.max_steps=1")
    cfg = config_of(run)
    monkeypatch.chdir(tmp_path)
    assert not any(row["measured"] for row in estimate(cfg)["rows"])
    shutil.copytree(run, tmp_path / "outputs" / "2026-11-22" / "12-00-00")
    nf4 = next(row for row in estimate(cfg)["rows"] if row["chosen"])
    peak = json.loads((run / "run.json").read_text())["metrics"]["peak_bytes"]
    assert nf4["measured"] == peak
    assert nf4["run"] == "outputs/2026-11-22/12-00-00"
    other_config = estimate(OmegaConf.merge(cfg, {"quant": None, "choices": {"quant": "none"}}))[
        "rows"
    ]
    assert [row["measured"] for row in other_config] == [None, peak, None, None]
    assert not any(row["measured"] for row in estimate(compose("quant=nf4"))["rows"])


RUN = """
import json, pathlib, re, sys
from lora_exp import compose, run
from lora_exp.after.estimate import model_config, need
cfg = compose(*sys.argv[2:])
estimated = need(cfg, model_config(cfg)).total
import lora_exp.experiment, lora_exp.model.memory, trl
status = pathlib.Path("/proc/self/status").read_text()
before = 1024 * int(re.search(r"VmRSS:\\s*(\\d+)", status)[1])
peak = run(cfg, sys.argv[1]).metrics["peak_bytes"]
print(json.dumps([estimated, peak - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_total_is_near_the_measured_peak_when_rows_have_full_length(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i} " + "a b c d e f g " * 200}) + "\n"
                            for i in range(40)))  # fmt: skip
    overrides = [
        "tracking=none", "algorithm=pretrain", "data=jsonl", f"data.path={rows}", "quant=nf4",
        "train.max_steps=2", "samples.rows=0", "train.save_strategy=no", "data.max_eval_rows=1",
        "train.per_device_train_batch_size=4",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "run"), *overrides],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    estimated, measured = json.loads(done.stdout.splitlines()[-1])
    assert 0.5 < estimated / measured < 2


def test_a_wrong_override_gives_the_same_error_as_a_run() -> None:
    for wrong in (["modle=tiny"], ["peft.r=0", "+peft.lora_alpa=2"], ["model=tny"]):
        run = cli(*wrong)
        estimated = run_cli("estimate", *wrong)
        assert (estimated.returncode, estimated.stderr) == (1, run.stderr)


def test_an_error_that_needs_the_model_names_its_key(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="did you mean q_proj"):
        estimate(compose("tracking=none", "peft.target_modules=[q_prj]"))
    with pytest.raises(ConfigError, match=r"model\.path: .* cannot be loaded"):
        estimate(compose("tracking=none", "model=local", f"model.path={tmp_path}"))


def test_the_page_marks_the_config_and_accepts_own_option_files(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "small.yaml").write_text("# small\ndefaults: [lora]\nr: 2\n")
    overrides = ["--config-dir", str(tmp_path), "peft=small", "quant=int8"]
    page = run_cli("estimate", *overrides)
    assert page.returncode == 0, page.stderr
    head, trainable = page.stdout.splitlines()[1:3]
    assert re.split("  +", head.strip()) == ["small", "small, nf4", "> small, int8", "every weight"]
    assert trainable.split() == ["trainable", *["29,184"] * 3, "1,869,504"]
    result = json.loads(run_cli("estimate", *overrides, "--json").stdout)
    assert [row["trainable"] for row in result["rows"]][:3] == [29_184] * 3
