"""The option files in docs/extending.md are complete: they compose, and the method trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lora_exp import compose, run
from lora_exp.errors import ConfigError
from tests.conftest import QUICK, ROOT

BLOCKS = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.S)
SHOWN = {m[1]: block for block in BLOCKS if (m := re.match(r"# conf/(\w+/\w+)\.yaml", block))}


@pytest.fixture
def conf_dir(tmp_path: Path) -> Path:
    for name, block in SHOWN.items():
        path = tmp_path / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
    return tmp_path / "conf"


def test_every_shown_option_composes(conf_dir: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    needs = {
        "peft/loha": ["trusted_targets=[peft.LoHaConfig]"],
        "data/support": [f"data.path={rows}", f"data.eval_path={rows}"],
    }
    assert {"model/mine", "peft/loha", "algorithm/dft", "data/support"} == set(SHOWN)
    for name in SHOWN:
        group, _, option = name.partition("/")
        cfg = compose(f"{group}={option}", *needs.get(name, []), config_dir=conf_dir)
        assert cfg.choices[group] == option


def test_a_users_method_is_refused_until_it_is_trusted_and_then_trains(
    conf_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"add trusted_targets=\[peft.LoHaConfig\]"):
        compose("peft=loha", config_dir=conf_dir)
    trust = "trusted_targets=[peft.LoHaConfig]"
    cfg = compose("peft=loha", trust, "tracking=none", *QUICK, config_dir=conf_dir)
    assert run(cfg, tmp_path / "run").metrics["eval/loss"] > 0


TRAINER = """
from trl import SFTConfig, SFTTrainer

class MyTrainer(SFTTrainer):
    trained = []

    def train(self, *args, **kwargs):
        MyTrainer.trained.append(self.args.beta)
        return super().train(*args, **kwargs)

from dataclasses import dataclass

@dataclass
class MyArguments(SFTConfig):
    beta: float = 0.1
"""


def test_a_users_trainer_is_built_with_its_own_arguments(
    conf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_module.py").write_text(TRAINER)
    monkeypatch.syspath_prepend(str(tmp_path))
    (shown,) = (block for block in BLOCKS if "my_module.MyTrainer" in block)
    (conf_dir / "algorithm" / "mine.yaml").write_text(shown)
    trust = "trusted_targets=[my_module.MyTrainer,my_module.MyArguments]"
    overrides = ["algorithm=mine", "+algorithm.args.beta=0.5", trust, "tracking=none", *QUICK]
    cfg = compose(*overrides, config_dir=conf_dir)
    run(cfg, tmp_path / "run")
    my_module: Any = __import__("my_module")
    assert my_module.MyTrainer.trained == [0.5]
    with pytest.raises(ConfigError, match="gamma"):
        compose(*overrides, "+algorithm.args.gamma=1", config_dir=conf_dir)
