"""Starting from a saved adapter: what it decides, and what is refused without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_exp import compose
from lora_exp.config.start import check_base
from lora_exp.errors import ConfigError

LORA = {
    "peft_type": "LORA", "base_model_name_or_path": "pkg://lora_exp/assets/tiny",
    "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 64, "lora_dropout": 0.1,
    "target_modules": ["q_proj", "v_proj"], "use_rslora": True, "use_dora": False,
}  # fmt: skip


def saved(folder: Path, **changes: Any) -> str:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(LORA | changes))
    (folder / "adapter_model.safetensors").touch()
    return f"adapter={folder}"


def test_the_start_decides_what_the_adapter_is(tmp_path: Path) -> None:
    cfg = compose(saved(tmp_path / "a"))
    assert (cfg.peft.r, cfg.peft.lora_alpha, cfg.peft.use_rslora) == (4, 64, True)
    assert list(cfg.peft.target_modules) == ["q_proj", "v_proj"]
    assert compose(f"adapter={tmp_path / 'a'}", "peft=pissa").peft.init_lora_weights is True
    assert compose(f"adapter={tmp_path / 'a'}", "peft.r=4").peft.r == 4


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({}, ["peft.r=8"], "peft.r: 8, but the adapter that the run starts from has 4"),
        ({}, ["peft=none"], "adapter: peft=none trains every weight"),
        ({}, ["peft=ia3"], "is LORA; peft=lora"),
        ({"peft_type": "P_TUNING"}, [], "is P_TUNING; peft=p_tuning"),
        ({"use_dora": True}, [], "is DoRA; peft=dora"),
        ({"base_model_name_or_path": "org/other"}, [], "was trained on org/other, not on pkg://"),
        ({"task_type": "SEQ_CLS"}, [], "was trained for SEQ_CLS; this algorithm trains for CAUSAL"),
    ],
)
def test_what_does_not_go_with_the_start_is_refused(
    changes: dict[str, Any], words: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(saved(tmp_path / "a", **changes), *words)


def test_a_text_adapter_may_become_a_reward(tmp_path: Path) -> None:
    assert compose(saved(tmp_path / "a"), "algorithm=reward").peft.r == 4


def test_a_copy_of_the_base_elsewhere_is_the_same_base(tmp_path: Path) -> None:
    assert compose(saved(tmp_path / "a", base_model_name_or_path="/models/tiny")).peft.r == 4


def test_a_folder_that_is_no_adapter_is_said_so(tmp_path: Path) -> None:
    saved(tmp_path / "run" / "adapter")
    with pytest.raises(ConfigError, match=f"that is a run, its adapter is {tmp_path}/run/adapter"):
        compose(f"adapter={tmp_path / 'run'}")
    with pytest.raises(ConfigError, match=r"no adapter in .*rum: .* \(did you mean run\?\)"):
        compose(f"adapter={tmp_path / 'rum'}")
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no weights: neither adapter_model"):
        compose(f"adapter={tmp_path / 'run/adapter'}")
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        compose(f"adapter={tmp_path / 'run/adapter'}")


def test_a_start_is_read_without_torch(tmp_path: Path) -> None:
    code = "import sys; from lora_exp import compose; compose(sys.argv[1])\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, saved(tmp_path / "a")], check=True)


def test_a_base_is_another_one_only_where_the_two_can_be_compared(tmp_path: Path) -> None:
    adapter = tmp_path / "run" / "adapter"
    saved(adapter)
    check_base("adapter", str(adapter), "sha256:1")  # no record says anything
    (tmp_path / "run" / "run.json").write_text('{"base": "sha256:1"}')
    check_base("adapter", str(adapter), "sha256:1")
    check_base("adapter", str(adapter), "a" * 40)  # the hub's own of the same name
    with pytest.raises(ConfigError, match="base of other weights"):
        check_base("adapter", str(adapter), "sha256:2")
