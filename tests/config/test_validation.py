"""All faults are reported at once, each with its key and its fix."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lora_exp import compose
from lora_exp.errors import ConfigError


def faults(*overrides: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        compose(*overrides)
    return dict(caught.value.faults)


def test_all_faults_are_reported_together() -> None:
    faults_by_key = faults(
        "+peft.lora_alpa=3", "peft.r=0", "train.learning_rate=0", "data.eval_share=1", "seed=-1"
    )
    keys = {"peft.lora_alpa", "peft.r", "train.learning_rate", "data.eval_share", "seed"}
    assert set(faults_by_key) == keys
    assert faults_by_key["peft.lora_alpa"].startswith(
        "peft.LoraConfig has no such argument (did you mean"
    )
    assert "lora_alpha" in faults_by_key["peft.lora_alpa"]


def test_one_fault_is_a_line_and_several_are_a_list() -> None:
    with pytest.raises(ConfigError) as caught:
        compose("peft.r=0")
    assert str(caught.value) == "peft.r: 0 is not a rank; give 1 or more"
    with pytest.raises(ConfigError) as caught:
        compose("peft.r=0", "seed=x")
    assert str(caught.value).startswith("2 faults\n  ")
    assert str(caught.value).count("\n  ") == 2


@pytest.mark.parametrize(
    "override",
    [
        "peft.r=abc",
        "train.learning_rate=fast",
        "train.max_steps=abc",
        "algorithm.args.max_length=0",
        "algorithm.args.max_length=513",
        "algorithm.args.packing=maybe",
        "+algorithm.args.learning_rate=1",
        "+train.learning_rat=1",
        "model.path=/nowhere/at/all",
        "model.gguf_file=none.gguf",
        "data.path=nowhere.jsonl",
        "data.eval_path=nowhere.jsonl",
        "train.max_steps=null",
        "train.learning_rate=null",
        "peft.r=null",
        "train.lr_scheduler_type=cosin",
        "train.optim=adam",
        "train.eval_strategy=epochs",
        "model.dtype=fp32",
        "tracking.mode=of",
        "tracking.project=a/b",
        "+algorithm.args.loss_type=ntl",
        "data.format=csv",
        "data.chat_template=none.jinja",
        "data.path=[a,b]",
        "data.columns=ask",
        "data.columns=[prompt]",
        "data.columns={prompt: 3}",
        "resume=[a,b]",
        "model.path=pkg://not_installed/x",
        "+train.report_to=wandb",
        "+train.seed=3",
        "+algorithm.args.output_dir=x",
        "+peft.init_lora_weights=loftq",
        "samples=null",
        "+samples.row=3",
        "+rate.pefft=3",
    ],
)
def test_an_impossible_value_is_refused_by_its_key(override: str) -> None:
    key = override.lstrip("+").partition("=")[0]
    assert list(faults(override)) == [key]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("+train.hub_token=abc", "train.hub_token"),
        ("tracking.project=canary-in-a-mine", "tracking.project"),
        ("tracking.entity=hf_" + "a1B2" * 8, "tracking.entity"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(
    override: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "canary-in-a-mine")
    faults_by_key = faults(override)
    assert set(faults_by_key) == {key}
    assert override.partition("=")[2] not in faults_by_key[key]


def test_nan_is_no_secret() -> None:
    assert "secret" not in faults("train.learning_rate=nan")["train.learning_rate"]


def test_a_section_that_nothing_reads_is_refused() -> None:
    message = "nothing reads this key (did you mean train, tracking?)"
    assert faults("+trian.max_steps=3") == {"trian": message}


def test_a_target_that_accepts_any_argument_is_refused() -> None:
    faults_by_key = faults(
        "quant=nf4",
        "quant._target_=transformers.BitsAndBytesConfig",
        "trusted_targets=[transformers.BitsAndBytesConfig]",
    )
    assert "a misspelt one would go unnoticed" in faults_by_key["quant._target_"]


def test_a_target_that_does_not_exist_is_named() -> None:
    faults_by_key = faults("peft._target_=peft.LoraConfigg", "trusted_targets=[peft.LoraConfigg]")
    assert faults_by_key == {"peft._target_": "no class or function is called peft.LoraConfigg"}


def test_composing_and_validating_imports_no_torch() -> None:
    code = (
        "import sys\nfrom lora_exp import compose\nfrom lora_exp.errors import ConfigError\n"
        "compose('quant=nf4', 'peft=dora')\n"
        "try: compose('peft.r=0')\nexcept ConfigError: pass\n"
        "assert not {'torch', 'transformers', 'peft', 'wandb'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
