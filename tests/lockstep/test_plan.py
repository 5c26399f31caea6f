"""Which jobs train together, and why others do not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lora_exp import compose
from lora_exp.config.settled import fingerprint
from lora_exp.files.paths import asset
from lora_exp.files.whole import sha256
from lora_exp.lockstep.plan import Job, labels, plan
from lora_exp.model.identity import files_hash, small_files
from lora_exp.record.contents import _hash

HYDRA = OmegaConf.create({"hydra": {"job": {"chdir": False, "env_set": {}}}})


def job(number: int, *overrides: str, folder: Path = Path("nowhere")) -> Job:
    return Job(number, HYDRA, compose(*overrides), folder / str(number), overrides)


def write_finished(done: Job, **record: Any) -> None:
    """Write the record of a job that has finished."""
    cfg = done.settled
    assert cfg is not None
    record |= {"status": "finished", "fingerprint": fingerprint(cfg), "name": "x"}
    record |= {"base": files_hash(asset(cfg.model.path), None)}
    record |= {"base_files": small_files(cfg.model.path)}
    done.directory.mkdir()
    (done.directory / "run.json").write_text(json.dumps(record))


def test_a_config_is_composed_once_and_again_after_it_was_forgotten() -> None:
    made: list[Any] = []
    one = Job(0, lambda: made.append(OmegaConf.create({"n": len(made)})) or made[-1], None, Path())
    assert one.config is one.config is made[0]
    one.forget_config()
    assert one.config is one.config is made[1]
    given = Job(0, HYDRA, None, Path())
    given.forget_config()
    assert given.config is HYDRA


def test_jobs_on_one_base_share_a_pack_whatever_else_differs() -> None:
    jobs = [
        job(0, "peft.r=8"), job(1, "seed=3", "targets=qv"), job(2, "quant=nf4"),
        job(3, "quant=nf4", "algorithm=pretrain"), job(4, "model.dtype=bfloat16"),
    ]  # fmt: skip
    planned = plan(jobs)
    assert [[j.number for j in pack] for pack in planned.packs] == [[0, 1], [2, 3]]
    assert [(j.number, reason) for j, reason in planned.alone] == [
        (4, "no other job to train with it")
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["peft=none"], "full fine-tuning changes the base"),
        (
            ["parallel=ddp", "parallel.processes=2"],
            "parallel=ddp trains it in 2 processes of its own",
        ),
        (["peft=ia3"], "ia3 is not LoRA"),
        (["peft=dora"], "DoRA needs"),
        (["peft=pissa"], "pissa starts"),
        (["peft=olora"], "olora starts"),
        (["peft.modules_to_save=[norm]"], "modules_to_save"),
        (["peft.bias=lora_only"], "biases"),
        (['model.add_tokens=["<a>"]'], "model.add_tokens trains new rows"),
        (["algorithm=pretrain", "model.random_weights=true"], "random_weights"),
        (["lockstep.max_jobs=1"], "lockstep.max_jobs=1"),
        (["+train.neftune_noise_alpha=5"], "NEFTune"),
        (["+algorithm.args.neftune_noise_alpha=5"], "NEFTune"),
        (["+train.full_determinism=true"], "full_determinism sets what a process has"),
        (["+train.tf32=true"], "tf32 sets"),
        (["deterministic=false"], "none can be proven equal"),
        (["+train.torch_compile=true"], "kernels of its own"),
        (
            ["experiment=demo_grpo", "+algorithm.args.cast_lm_head_to_fp32=true"],
            "casts the base's head",
        ),
        (["+train.liger_kernel_config={rope: true}"], "Liger"),
    ],
)
def test_a_job_that_would_change_the_base_runs_alone(overrides: list[str], expected: str) -> None:
    planned = plan([job(0, *overrides), job(1, *overrides)])
    assert not planned.packs
    assert all(expected in reason for _, reason in planned.alone)
    assert len(planned.alone) == 2


def test_jobs_whose_products_have_other_bits_share_no_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_exp.config.ranges.find_spec", lambda name: name)
    values = ["true", "false"] * 2
    jobs = [job(n, f"batch_invariant={value}") for n, value in enumerate(values)]
    assert [[j.number for j in pack] for pack in plan(jobs).packs] == [[0, 2], [1, 3]]


def test_a_job_with_a_directory_of_its_own_in_the_process_runs_alone() -> None:
    jobs = [Job(n, HYDRA, compose(), Path("x"), changes_process=True) for n in range(2)]
    assert "chdir and env_set" in plan(jobs).alone[0][1]


def test_finished_and_refused_jobs_are_not_trained(tmp_path: Path) -> None:
    done = job(0, "peft.r=4", folder=tmp_path)
    write_finished(done)
    planned = plan([done, Job(1, HYDRA, None, tmp_path / "1")])
    assert [(j.number, reason.split(",")[0]) for j, reason in planned.without_training] == [
        (0, "finished before"),
        (1, "refused"),
    ]
    assert not planned.packs
    assert not planned.alone


@pytest.mark.parametrize("changed", ["rows.jsonl", "base/tokenizer.json", "base/model.safetensors"])
def test_a_finished_job_is_trained_again_if_its_data_or_base_has_changed(
    tmp_path: Path, changed: str
) -> None:
    base, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    shutil.copytree(asset("pkg://lora_exp/assets/tiny"), base)
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    overrides = ["data=jsonl", f"data.path={rows}", "model=local", f"model.path={base}"]
    done = job(0, *overrides, folder=tmp_path)
    write_finished(done, data={str(rows): sha256(rows)}, adapters={})
    planned = plan([done])
    assert [reason for _, reason in planned.without_training] == ["finished before, not run again"]
    with (tmp_path / changed).open("a") as file:
        file.write(" ")
    _hash.cache_clear()  # of this process
    assert [j.number for j, _ in plan([done]).alone] == [0]


def test_a_finished_job_is_trained_again_if_its_start_has_changed(tmp_path: Path) -> None:
    start = tmp_path / "start"
    start.mkdir()
    weights = start / "adapter_model.safetensors"
    weights.write_bytes(b"one")
    done = job(0, "data=corpus", folder=tmp_path)
    settled = OmegaConf.merge(done.settled, {"adapter": str(start)})
    done = Job(0, HYDRA, settled, done.directory)
    write_finished(done, data={}, adapters={str(start): f"sha256:{sha256(weights)}"})
    assert not plan([done]).alone
    weights.write_bytes(b"two")
    assert [j.number for j, _ in plan([done]).alone] == [0]


def test_a_label_has_the_overrides_that_differ_between_jobs() -> None:
    jobs = [job(0, "peft.r=8", "seed=1"), job(1, "peft.r=16", "seed=1")]
    assert labels(jobs) == {0: "peft.r=8", 1: "peft.r=16"}


def test_a_label_is_no_wider_than_a_column() -> None:
    jobs = [
        Job(n, HYDRA, None, Path("x"), (f"train.learning_rate=1e-{n}", f"data.path={n}" * 9))
        for n in (3, 4)
    ]
    by_number = labels(jobs)
    assert all(len(label) <= 60 for label in by_number.values())
    assert by_number[3].startswith("train.learning_rate=1e-3")
    assert "…" in by_number[3]


def test_a_plan_needs_no_torch() -> None:
    code = "import sys, lora_exp.lockstep.plan; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
