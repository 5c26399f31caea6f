"""Starting from a saved adapter: the settings it determines, and errors without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_exp import compose
from lora_exp.config.start import check_start_base
from lora_exp.errors import ConfigError

LORA = {
    "peft_type": "LORA", "base_model_name_or_path": "pkg://lora_exp/assets/tiny",
    "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 64, "lora_dropout": 0.1,
    "target_modules": ["q_proj", "v_proj"], "use_rslora": True, "use_dora": False,
}  # fmt: skip


def save_adapter(folder: Path, **changes: Any) -> str:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(LORA | changes))
    (folder / "adapter_model.safetensors").touch()
    return f"adapter={folder}"


def test_the_starting_adapter_sets_rank_targets_and_scaling(tmp_path: Path) -> None:
    cfg = compose(save_adapter(tmp_path / "a"))
    assert (cfg.peft.r, cfg.peft.lora_alpha, cfg.peft.use_rslora) == (4, 64, True)
    assert list(cfg.peft.target_modules) == ["q_proj", "v_proj"]
    assert compose(f"adapter={tmp_path / 'a'}", "peft=pissa").peft.init_lora_weights is True
    assert compose(f"adapter={tmp_path / 'a'}", "peft.r=4").peft.r == 4


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
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
def test_overrides_that_contradict_the_starting_adapter_are_refused(
    changes: dict[str, Any], overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(save_adapter(tmp_path / "a", **changes), *overrides)


def test_a_text_adapter_may_become_a_reward(tmp_path: Path) -> None:
    assert compose(save_adapter(tmp_path / "a"), "algorithm=reward").peft.r == 4


def test_a_base_of_the_same_name_at_another_path_is_accepted(tmp_path: Path) -> None:
    assert compose(save_adapter(tmp_path / "a", base_model_name_or_path="/models/tiny")).peft.r == 4


def test_another_name_of_the_same_base_needs_consent(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", base_model_name_or_path="some/tiny-4bit")
    with pytest.raises(ConfigError, match=r"not on .*if they are the same, give adapter_base=tiny"):
        compose(adapter)
    with pytest.raises(ConfigError, match=r"^adapter_base: other, but .* on some/tiny-4bit"):
        compose(adapter, "adapter_base=other")
    assert compose(adapter, "adapter_base=tiny-4bit").peft.r == 4
    assert compose(adapter, "adapter_base=some/tiny-4bit").peft.r == 4


def test_a_folder_without_an_adapter_is_an_error(tmp_path: Path) -> None:
    save_adapter(tmp_path / "run" / "adapter")
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


def test_a_starting_adapter_is_read_without_torch(tmp_path: Path) -> None:
    code = "import sys; from lora_exp import compose; compose(sys.argv[1])\n"
    code += "sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, save_adapter(tmp_path / "a")]
    assert subprocess.run(command, check=False).returncode == 0


def test_bases_are_compared_only_by_hashes_of_the_same_kind(tmp_path: Path) -> None:
    adapter = tmp_path / "run" / "adapter"
    save_adapter(adapter)
    check_start_base("adapter", str(adapter), "sha256:1")  # there is no record
    (tmp_path / "run" / "run.json").write_text('{"base": "sha256:1"}')
    check_start_base("adapter", str(adapter), "sha256:1")
    check_start_base("adapter", str(adapter), "a" * 40)  # a commit of the hub, not comparable
    with pytest.raises(ConfigError, match="base of other weights"):
        check_start_base("adapter", str(adapter), "sha256:2")
    with pytest.raises(ConfigError):  # consent is for a base that was saved in another form
        check_start_base("adapter", str(adapter), "sha256:2", consent=True)
    check_start_base("adapter", str(adapter), "sha256:2", saved_as="nf4", consent=True)
    with pytest.raises(ConfigError):
        check_start_base("adapter", str(adapter), "sha256:2", saved_as="nf4")
