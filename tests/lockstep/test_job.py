"""A job of a pack runs as Hydra would run it."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lora_exp import compose as our_compose
from lora_exp.__main__ import job
from lora_exp.config.door import CONF
from lora_exp.lockstep.job import run_in_pack, without_hydra
from lora_exp.training.place import Alone, here

FIELDS = ("cfg", "hydra_cfg", "overrides", "working_dir", "status", "_return_value")


@pytest.fixture
def composed(tmp_path: Path) -> Iterator[Any]:
    """A job's config in a folder, as the launcher composes it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def composed(folder: str) -> DictConfig:
        overrides = ["peft.r=8", "tracking=none", f"hydra.sweep.dir={tmp_path / folder}"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", overrides, return_hydra_config=True)
        with read_write(config), open_dict(config):
            config.hydra.mode, config.hydra.job.num = RunMode.MULTIRUN, 0
            config.hydra.overrides.task = overrides[:2]
            config.hydra.runtime.output_dir = str(tmp_path / folder / "0")
        return config

    yield composed
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def by_hydra(config: DictConfig, task: Any) -> JobReturn:
    context = HydraContext(config_loader=None, callbacks=Callbacks())  # type: ignore[arg-type]
    keys = {"job_dir_key": "hydra.sweep.dir", "job_subdir_key": "hydra.sweep.subdir"}
    return run_job(task, config, hydra_context=context, **keys)


def test_it_leaves_the_files_and_the_result_that_hydra_leaves(
    tmp_path: Path, composed: Any
) -> None:
    seen = []

    def task(config: DictConfig) -> int:
        seen.append((HydraConfig.get().runtime.output_dir, OmegaConf.is_struct(config), config))
        logging.getLogger().warning("a line")
        return 7

    before = HydraConfig.instance().cfg
    result = run_in_pack(composed("one"), task)
    assert HydraConfig.instance().cfg is before
    files = {p.relative_to(tmp_path): p for p in (tmp_path / "one").rglob("*") if p.is_file()}
    texts = {path: file.read_text() for path, file in files.items()}
    (tmp_path / "one").rename(tmp_path / "kept")
    expected = by_hydra(composed("one"), task)
    assert seen[0] == seen[1]
    assert {name: getattr(result, name) for name in FIELDS} == {
        name: getattr(expected, name) for name in FIELDS
    }
    assert len(texts) == 4
    for path, text in texts.items():
        theirs = (tmp_path / path).read_text()
        if path.suffix == ".log":  # with the time
            assert text[-8:] == theirs[-8:] == " a line\n"
        else:
            assert text == theirs, path


def test_a_result_makes_its_configs_when_they_are_asked_for(composed: Any) -> None:
    result = run_in_pack(composed("one"), lambda config: len(config))
    sent = pickle.loads(pickle.dumps(result))
    assert not {"cfg", "hydra_cfg"} & vars(sent).keys()
    assert {name: getattr(sent, name) for name in FIELDS} == {
        name: getattr(result, name) for name in FIELDS
    }
    assert sent.cfg is sent.cfg
    result.cfg.peft.r = 99  # by the task
    assert pickle.loads(pickle.dumps(result)).cfg.peft.r == 99


def test_a_task_that_raises_has_failed(composed: Any) -> None:
    def task(_: DictConfig) -> None:
        raise ValueError("no")

    result = run_in_pack(composed("one"), task)
    assert (result.status, str(result._return_value)) == (JobStatus.FAILED, "no")


def test_a_config_without_hydra_is_otherwise_the_same(composed: Any) -> None:
    config = composed("one")
    task = without_hydra(config)
    assert "hydra" in config
    assert task.keys() == config.keys() - {"hydra"}
    assert task.train.learning_rate == config.train.learning_rate  # an interpolation
    assert OmegaConf.is_struct(task)
    task.peft.r = 99
    assert config.peft.r == 8


def test_a_job_takes_the_config_that_its_launcher_has_settled(composed: Any) -> None:
    settled = our_compose("tracking=none", "data=jsonl", f"data.path={__file__}")
    with read_write(settled):
        settled.data.path = "nowhere.jsonl"  # as if the file had gone since
    before = here.set(Alone(settled=settled))
    try:
        result = run_in_pack(composed("one"), job)
    finally:
        here.reset(before)
    assert "nowhere.jsonl" in str(result._return_value)
