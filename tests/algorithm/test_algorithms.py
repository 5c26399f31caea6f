"""Whole runs of a few steps: every algorithm, on LoRA, QLoRA and full fine-tuning."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from lora_exp import compose, run
from lora_exp.after.likeness import likeness
from lora_exp.errors import ConfigError, DataError
from tests.conftest import in_fast_dtype
from tests.lockstep.runs import outputs, run_alone, run_packed
from tests.test_experiment import copied, digest, mark_killed, rows_override

REWARDS = "algorithm.rewards=[lora_exp.rewards.similarity]"
GENERATED = [REWARDS, "algorithm.args.max_completion_length=8", "samples.rows=2"]
GROUPS = ["algorithm.args.num_generations=4", *GENERATED]
SETTINGS: dict[str, list[str]] = {
    "reward": [],
    "dpo": [],
    "kto": [],
    "grpo": GROUPS,
    "rloo": GROUPS,
    "ppo": [*GENERATED, "algorithm.args.num_iterations=2", "algorithm.args.num_minibatches=2"],
}
COMMON = ["data=demo_pairs", "data.rows=64", "data.eval_rows=4", "train.max_steps=3"]
COMMON += ["train.per_device_train_batch_size=4", "train.per_device_eval_batch_size=8"]
COMMON += ["samples.rows=2", "samples.max_new_tokens=8", "tracking=none"]


def overrides_for(algorithm: str, *overrides: str) -> list[str]:
    return [f"algorithm={algorithm}", *COMMON, *SETTINGS[algorithm], *in_fast_dtype(*overrides)]


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Any]:
    def train(algorithm: str, *overrides: str, name: str = "run") -> Any:
        return run(compose(*overrides_for(algorithm, *overrides)), tmp_path / name)

    return train


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train what other runs start from or are rewarded by; equal overrides share one run."""

    @cache
    def saved(*overrides: str) -> Path:
        cfg = compose("data=demo_pairs", *COMMON, *in_fast_dtype(*overrides))
        return Path(run(cfg, tmp_path_factory.mktemp("shared") / "run").saved)

    return saved


@pytest.mark.parametrize(
    "method", ["quant=none", "quant=nf4", "quant=int8", "peft=none", "peft=dora"]
)
@pytest.mark.parametrize("algorithm", SETTINGS)
def test_every_algorithm_trains(
    train: Callable[..., Any], algorithm: str, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    if (algorithm, method) == ("reward", "peft=none"):
        pytest.skip("tested below, with its head")
    result = train(algorithm, method)
    assert "get no gradient" not in caplog.text
    expected = {"reward": "accuracy", "dpo": "rewards/accuracies", "kto": "loss"}.get(
        algorithm, "reward"
    )
    assert math.isfinite(result.metrics[f"before/{expected}"])
    assert math.isfinite(result.metrics[f"eval/{expected}"])
    for weight in load_file(next(result.saved.glob("*.safetensors"))).values():
        assert torch.isfinite(weight).all()
    names = {p.name for p in result.saved.iterdir()}
    assert not names & {"ref", "value", "reward_adapter"}, "only the trained adapter is saved"


@pytest.mark.parametrize("method", ["rslora", "ia3", "oft", "vera", "ln_tuning"])
@pytest.mark.parametrize("algorithm", ["dpo", "ppo"])
def test_other_methods_have_a_reference_and_a_value_adapter(
    train: Callable[..., Any], algorithm: str, method: str, tmp_path: Path
) -> None:
    start = train(algorithm, f"peft={method}", name="start").saved
    result = train(
        algorithm, f"peft={method}", f"adapter={start}", "train.learning_rate=1e-9", name="next"
    )
    if algorithm == "dpo":  # the reference is the start, not the base
        assert result.metrics["before/loss"] == pytest.approx(math.log(2), abs=1e-6)
    else:
        assert result.metrics["before/kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_a_resumed_run_equals_the_uninterrupted_one(
    train: Callable[..., Any], algorithm: str, tmp_path: Path
) -> None:
    # step 5 is after the first epoch, and within a rollout of four steps of PPO
    rows = 2 if algorithm in ("grpo", "rloo") else 8
    settings = [f"data.rows={rows}", "train.max_steps=10", "train.save_strategy=steps"]
    settings += ["train.save_steps=5"]
    settings += ["train.save_total_limit=2", "peft.lora_dropout=0.1"]
    settings += ["train.logging_steps=3"]  # the resume lies between two log lines
    uninterrupted = train(algorithm, *settings)
    cut = copied(uninterrupted, tmp_path / "cut")
    shutil.rmtree(cut.directory / "checkpoints" / "checkpoint-10")
    mark_killed(cut.directory)
    run(compose(f"resume={cut.directory}"))
    result = likeness(uninterrupted.directory, cut.directory)
    assert result.weights == result.metrics == []
    assert result.files > (6 if algorithm == "ppo" else 0)  # with the value's


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_a_sweep_over_every_algorithm_equals_its_runs_alone(algorithm: str, tmp_path: Path) -> None:
    jobs = [
        ["peft.r=4"],
        ["peft.r=8", "seed=7", "peft.lora_dropout=0.1"],
        ["train.learning_rate=1e-3" if algorithm == "reward" else "algorithm.args.beta=0.5"],
    ]
    common = overrides_for(algorithm, "train.logging_steps=1", "train.save_strategy=no")
    results, _ = run_packed(jobs, tmp_path / "packed", *common, defaults=[])
    for packed, alone in zip(
        results, run_alone(jobs, tmp_path / "alone", *common, defaults=[]), strict=True
    ):
        assert outputs(packed) == outputs(alone)


@pytest.mark.parametrize("algorithm", ["dpo", "kto", "grpo", "rloo", "ppo"])
def test_a_starting_adapter_is_trained_further_and_is_the_reference(
    train: Callable[..., Any],
    shared: Callable[..., Path],
    algorithm: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = shared("peft.r=4", "targets=qv")
    capsys.readouterr()
    result = train(algorithm, f"adapter={start}", "train.learning_rate=1e-9", name="next")
    assert json.loads((result.saved / "adapter_config.json").read_text())["r"] == 4
    old, new = (load_file(path / "adapter_model.safetensors") for path in (start, result.saved))
    for name, weight in old.items():
        torch.testing.assert_close(new[name], weight, atol=1e-6, rtol=0)
    message = " ".join(capsys.readouterr().out.split())
    assert "reference the adapter that the run starts from" in message
    if algorithm == "dpo":  # nothing is preferred over the reference yet
        assert result.metrics["before/loss"] == pytest.approx(math.log(2), abs=1e-6)
    if algorithm in ("grpo", "rloo", "ppo"):
        assert result.metrics["before/kl"] == pytest.approx(0, abs=1e-5)


def test_ppo_resumes_with_its_reference_and_reward_adapters(
    train: Callable[..., Any], shared: Callable[..., Path], tmp_path: Path
) -> None:
    start = shared()
    scorer = train("reward", f"adapter={start}", name="reward").saved
    overrides = [f"adapter={start}", f"algorithm.rewards=[{scorer}]", "train.max_steps=4"]
    overrides += ["train.save_strategy=steps", "train.save_steps=2", "train.save_total_limit=2"]
    overrides += ["train.logging_steps=1"]
    uninterrupted = train("ppo", *overrides)
    cut = copied(uninterrupted, tmp_path / "cut")
    shutil.rmtree(cut.directory / "checkpoints" / "checkpoint-4")
    mark_killed(cut.directory)
    assert digest(run(compose(f"resume={cut.directory}")).saved) == digest(uninterrupted.saved)


def test_an_adapter_of_a_base_with_other_weights_is_refused(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    start = run(compose("data=demo_pairs", *COMMON), tmp_path / "sft")
    record = json.loads((start.directory / "run.json").read_text())
    changed = json.dumps(record | {"base": "sha256:another"})
    (start.directory / "run.json").write_text(changed)
    with pytest.raises(ConfigError, match="was trained on a base of other weights"):
        train("dpo", f"adapter={start.saved}")


def test_a_run_that_starts_from_pissa_saves_plain_lora(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    start = run(compose(*COMMON, "data=demo_pairs", "peft=pissa"), tmp_path / "sft").saved
    overrides = ["peft=pissa", f"adapter={start}", "train.learning_rate=1e-9"]
    result = run(compose(*COMMON, "data=demo_pairs", *overrides), tmp_path / "next")
    old, new = (load_file(path / "adapter_model.safetensors") for path in (start, result.saved))
    for name, weight in old.items():
        torch.testing.assert_close(new[name], weight, atol=1e-6, rtol=0)


def test_a_starting_adapter_on_a_quantised_base_is_the_reference(
    train: Callable[..., Any], shared: Callable[..., Path]
) -> None:
    start = shared("quant=nf4")
    result = train("dpo", f"adapter={start}", "quant=nf4", name="next")
    assert result.metrics["before/loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_fully_trained_reward_model_is_a_classifier_of_one_label(
    train: Callable[..., Any],
) -> None:
    saved = train("reward", "peft=none").saved
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    assert model.config.num_labels == 1
    assert model.score.weight.shape == (1, model.config.hidden_size)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "ppo"])
@pytest.mark.parametrize("method", ["quant=none", "quant=nf4", "peft=none"])
def test_a_reward_adapter_rewards_on_the_same_base(
    train: Callable[..., Any], shared: Callable[..., Path], algorithm: str, method: str
) -> None:
    scorer = shared("algorithm=reward", "quant=none" if method == "peft=none" else method)
    rewards = f"algorithm.rewards=[{scorer},lora_exp.rewards.similarity]"
    result = train(algorithm, method, rewards, "+algorithm.args.reward_weights=[0.5,1.0]")
    lines = map(json.loads, (result.directory / "metrics.jsonl").read_text().splitlines())
    logged = {key for line in lines for key in line}
    assert "eval/rewards/reward_adapter/mean" in logged
    assert "eval/rewards/similarity/mean" in logged


def test_an_adapter_without_a_score_head_is_refused_as_reward(
    train: Callable[..., Any], shared: Callable[..., Path]
) -> None:
    saved = shared()
    with pytest.raises(ConfigError, match="has no score head; a reward adapter is made by"):
        train("grpo", f"algorithm.rewards=[{saved}]")


def test_sft_trains_on_the_chosen_answers_of_pairs(tmp_path: Path) -> None:
    result = run(compose(*COMMON, "data=demo_pairs"), tmp_path / "run")
    accuracy = result.metrics["eval/preference_accuracy"]
    assert 0 <= accuracy <= 1
    by_pair = json.loads((result.directory / "pairs.json").read_text())
    assert sum(by_pair["preferred"]) / len(by_pair["pairs"]) == accuracy


@pytest.mark.parametrize(
    ("algorithm", "row", "message"),
    [
        ("dpo", {"messages": [{"role": "assistant", "content": "x"}]},
         "needs rows of shape preference .chosen, prompt, rejected., but these were read as mess"),
        ("grpo", {"text": "x"}, "needs rows of shape prompt .* read as text with the fields text"),
        ("kto", {"prompt": "a", "completion": "b"}, "needs rows of shape unpaired_preference"),
        ("sft", {"prompt": "a"}, "needs rows of shape completion"),
    ],
)  # fmt: skip
def test_rows_of_another_shape_are_refused_with_what_is_needed(
    algorithm: str, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = rows_override(tmp_path / "rows.jsonl", row, row)
    settings = SETTINGS.get(algorithm, [])
    cfg = compose(f"algorithm={algorithm}", "data=jsonl", path, *settings, "tracking=none")
    with pytest.raises(DataError, match=message):
        run(cfg, tmp_path / "run")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("{_target_: lora_exp.rewards.regex, pattern: '('}", "makes no reward: error: missing"),
        ("{_target_: lora_exp.rewards.regex}", "makes no reward: .*pattern"),
    ],
)
def test_a_reward_factory_that_fails_is_named(
    train: Callable[..., Any], reward: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"algorithm.rewards.0: .*{message}"):
        train("grpo", f"algorithm.rewards=[{reward}]")


def test_rows_that_are_all_too_long_are_an_error(train: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="each of the 64 train rows is longer than 3 tokens"):
        train("reward", "algorithm.args.max_length=3")
    with pytest.raises(DataError, match="none of the 64 train prompts has at most 2 tokens"):
        train("grpo", "algorithm.args.max_completion_length=510", name="other")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm=grpo"], "algorithm.rewards: is required"),
        (["algorithm=grpo", "algorithm.rewards=[]"], "algorithm.rewards: name at least one"),
        (["algorithm=grpo", "algorithm.rewards=[os.system]"], "'os.system' is not trusted"),
        (
            ["algorithm=grpo", "algorithm.rewards=[lora_exp.rewards.exact]"],
            r"nothing of that name \(did you mean lora_exp.rewards.exact_match\?\)",
        ),
        (
            ["algorithm=grpo", "algorithm.rewards=[exact_match]"],
            r"\(did you mean lora_exp.rewards.exact_match\?\)",
        ),
        (
            ["algorithm=dpo", "algorithm.args.loss_type=[sigmoid,ipoo]"],
            "algorithm.args.loss_type: 'ipoo' is none of",
        ),
        (["algorithm=grpo", "algorithm.rewards=[./nowhere]"], "no adapter in ./nowhere"),
        (
            ["algorithm=ppo", REWARDS, "+algorithm.args.reward_weights=[1,2]"],
            "2 weights for 1 rewards",
        ),
        (
            ["algorithm=ppo", REWARDS, "algorithm.args.temperature=0"],
            "gives the same answer each time",
        ),
        (["algorithm=ppo", REWARDS, "algorithm.args.kl_taget=1"], "did you mean kl_target"),
        (
            ["algorithm=dpo", "peft=pissa"],
            "pissa rewrites the base, but reference, value or reward need the original",
        ),
        (["algorithm=ppo", REWARDS, "peft=pissa", "algorithm.args.beta=0"], "pissa rewrites"),
        (["algorithm=ppo", REWARDS, "algorithm.args.kl_target=0"], "kl_target: 0 is not above 0"),
        (["algorithm=ppo", REWARDS, "algorithm.args.beta=-1"], "beta: -1 is not 0 or more"),
        (
            ["algorithm=ppo", REWARDS, "algorithm.args.kl_target=6", "algorithm.args.beta=0"],
            "0 stays 0",
        ),
        (["algorithm=ppo", REWARDS, "+algorithm.args.reward_weights=0.5"], "1 weights for|a list"),
        (["adapter=5"], "5 is no folder"),
        (["algorithm=ppo", REWARDS, "peft=adalora"], "adalora allows one adapter on a base"),
        (["+algorithm.rewards=[lora_exp.rewards.similarity]"], "trl.SFTTrainer takes no rewards"),
        (
            ["algorithm=grpo", REWARDS, "algorithm.args.num_generations=5"],
            "5 answers to a prompt do not divide a step's 16 rows",
        ),
        (["goal=best"], "'best' is neither minimize nor maximize"),
    ],
)
def test_a_wrong_override_is_one_clear_error(overrides: list[str], message: str) -> None:
    new_key = "algorithm.args.kl_taget"
    arguments = [f"+{o}" if o.startswith(new_key) else o for o in overrides]
    with pytest.raises(ConfigError, match=message):
        compose(*arguments)


@pytest.mark.parametrize("method", ["quant=none", "quant=nf4", "quant=int8", "peft=none"])
def test_an_encoder_decoder_model_learns(t5: Path, tmp_path: Path, method: str) -> None:
    rows = [{"prompt": f"say {c}", "completion": c * 3} for c in "abcdefgh"] * 8
    path = rows_override(tmp_path / "rows.jsonl", *rows)
    overrides = ["algorithm=seq2seq", "model=local", f"model.path={t5}", "data=jsonl", path]
    overrides += in_fast_dtype(method)
    overrides += [
        "train.max_steps=60",
        "train.learning_rate=1e-2",
        "tracking=none",
        "samples.rows=4",
    ]
    overrides += ["train.per_device_train_batch_size=16", "samples.max_new_tokens=4"]
    result = run(compose(*overrides), tmp_path / "run")
    assert result.metrics["eval/loss"] < 0.8 * result.metrics["before/loss"]
    samples = [
        json.loads(line) for line in (result.directory / "samples.jsonl").read_text().splitlines()
    ]
    assert {sample["expected"] for sample in samples} <= {c * 3 for c in "abcdefgh"}
