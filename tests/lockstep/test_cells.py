"""Jobs of a launch are settled after earlier ones, and each as by itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from hydra_plugins.lockstep_launcher._cells import Cells
from hydra_plugins.lockstep_launcher._loading import SweepLoader
from lora_exp.config.door import plain
from lora_exp.config.validation import job_config
from lora_exp.lockstep.plan import Job

SWEEP = ["tracking=none", "hydra.sweep.dir=sweep", "hydra.mode=MULTIRUN"]
KINDS = [
    ["peft.r={}", "seed={}"],
    ["seed={}", "peft.r={}"],  # another shape: the order is part of a name
    ["targets=qv", "peft.r={}", "+train.neftune_noise_alpha={}"],
    ["rate.peft={}", "model.path=x{}"],  # decides the learning rate; a fault of each
    ["algorithm=dpo", "algorithm.learning_rate={}", "algorithm.args.beta=0.{}"],
    ["early_stopping=halving", "early_stopping.eta={}", "train.max_steps={}00"],
    ["goal=minimize", "objective=eval/loss", "seed={}"],
    ["name=a{}", "report=null"],
    ["lockstep.max_jobs={}", "train.per_device_train_batch_size={}"],
    ["tracking=none", "quant=n{}"],  # there is no such option
    ["name='a b ${{seed}} {}'", "samples.rows={}"],
    ["peft.target_modules=[q_proj]", "seed={}"],
    ["~train.optim", "seed={}"],
    ["experiment=demo_grpo", "seed={}", "algorithm.args.num_generations={}"],
    ["train.max_steps=1", "train.max_steps={}"],
    ["train.eval_steps={}", "+train.eval_steps=5"],  # may be added to null only
    ["rate.peft='${{seed}}'", "seed={}"],  # part of the name
    ["++trusted_targets={}"],
]
VALUES = ["4", "8", "true", "4.0", "null", "abc", "-1", "4"]


def launcher(loader: Any, *arguments: str) -> Any:
    master = loader.load_configuration("config", [*SWEEP, *arguments], RunMode.MULTIRUN)
    context = SimpleNamespace(config_loader=SweepLoader(loader))
    return SimpleNamespace(hydra_context=context, config=master)


def by_itself(launched: Any, overrides: list[str], number: int) -> Job:
    """Return a job without any that came before it; the second is composed by Hydra's own loader.

    That takes many times as long as ours; test_loading.py compares the two.
    """
    loader = launched.hydra_context.config_loader
    loader._first.clear()
    vars(loader).pop("job", None)
    if number == 1:
        config = loader._by_hydra(launched.config, overrides)
        loader.job = lambda *_: config
    return Cells(launched, True, ["tracking"]).job(overrides, number)


def outcome(job: Job) -> tuple[Any, ...]:
    return (
        repr(job.values), str(job.error), job.directory, job.overrides, job.changes_process,
        repr(job.settled and plain(job.settled)), OmegaConf.to_yaml(job.config),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_a_job_is_the_same_whatever_came_before_it(loader: Any, kind: list[str]) -> None:
    launched, apart = launcher(loader), launcher(loader)
    cells = Cells(launched, True, ["tracking"])
    for number, value in enumerate(VALUES):
        overrides = [*SWEEP[:1], *(word.format(value) for word in kind)]
        try:
            alone = by_itself(apart, overrides, number)
        except HydraException as error:
            with pytest.raises(type(error)):
                cells.job(overrides, number)
            continue
        job = cells.job(overrides, number)
        assert outcome(job) == outcome(alone), overrides
        if job.error is None:
            settled = job_config(alone.config, alone.config.hydra, launched.config.hydra)
            assert repr(plain(settled)) == repr(job.values)


def test_most_jobs_of_a_sweep_are_not_resolved_by_themselves(
    loader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, resolved = Cells(launcher(loader), True, []), []
    first = cells._first

    def counted(*arguments: Any) -> Job:
        resolved.append(arguments[1])
        return first(*arguments)

    monkeypatch.setattr(cells, "_first", counted)
    for number in range(12):
        job = cells.job([f"seed={number}", f"rate.peft={number % 3 + 1}", "peft.r=8"], number)
        assert job.values.seed == number
        rate = job.values.algorithm.learning_rate * (number % 3 + 1) * job.values.rate.model
        assert job.values.train.learning_rate == pytest.approx(rate)
        assert job.config.hydra.job.num == number
        assert job.config.hydra.runtime.output_dir == str(Path(f"sweep/{number}").absolute())
    assert len(resolved) == 3  # one of each rate


@pytest.mark.parametrize(
    ("arguments", "jobs"),
    [
        (["hydra.sweep.subdir=${hydra.job.override_dirname}"], ["seed=1", "seed=2"]),
        (["hydra.sweep.dir=out/r${peft.r}"], ["peft.r=16", "peft.r=8"]),
        (["hydra.job.chdir=${strict}"], ["strict=false", "strict=true"]),
        (["+hydra.sweeper.direction=${goal}"], ["goal=minimize", "goal=maximize"]),
        (
            ["hydra.searchpath=[file://$DIR]"],
            ["experiment=dated seed=1", "experiment=dated seed=2"],
        ),
    ],
    ids=str,
)
def test_jobs_that_depend_on_more_than_their_values_are_resolved_by_themselves(
    loader: Any, tmp_path: Path, arguments: list[str], jobs: list[str]
) -> None:
    (tmp_path / "experiment").mkdir()
    dated = "# @package _global_\nname: run-${now:%Y}\n"
    (tmp_path / "experiment" / "dated.yaml").write_text(dated)
    arguments = [word.replace("$DIR", str(tmp_path)) for word in arguments]
    launched = launcher(loader, *arguments)
    cells = Cells(launched, True, ["tracking"])
    for number, job in enumerate(jobs):
        overrides = ["tracking=none", *job.split()]
        assert outcome(cells.job(overrides, number)) == outcome(
            by_itself(launcher(loader, *arguments), overrides, number)
        )
    assert list(cells._settled.values()) == [None]


def test_a_job_with_a_directory_or_an_environment_of_its_own_says_so(loader: Any) -> None:
    for argument, expected in (
        ("hydra.job.chdir=false", False),
        ("hydra.job.chdir=true", True),
        ("+hydra.job.env_set.X=1", True),
    ):
        cells = Cells(launcher(loader, argument), True, [])
        jobs = [cells.job([f"seed={number}"], number) for number in range(2)]
        assert [job.changes_process for job in jobs] == [expected] * 2
        assert all(job.error is None for job in jobs)
