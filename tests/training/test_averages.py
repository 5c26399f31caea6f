"""An evaluation's metrics are of its rows and the weights, not of how many rows a batch has."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_exp import compose
from lora_exp.adapter.attach import attach
from lora_exp.data.examples import prepared
from lora_exp.data.rows import jsonl
from lora_exp.record.run import Record
from lora_exp.training.averages import Sizes, combined, mean, predicts_first
from lora_exp.training.trainer import trainer_of
from tests.conftest import tiny

LETTERS = "abcdefghijk"
PLAIN = [{"prompt": f"say {c}: ", "completion": f"{c} " * n} for n, c in enumerate(LETTERS, 1)]
PAIRS = [
    {"prompt": f"say {c}: ", "chosen": f"{c} " * n, "rejected": "no" * (12 - n)}
    for n, c in enumerate(LETTERS, 1)
]
MARKED = [
    {"prompt": row["prompt"], "completion": row["completion"], "label": n % 3 != 0}
    for n, row in enumerate(PLAIN)
]
CASES = {
    "sft": (PLAIN, []),
    "sft of all tokens": (PLAIN, ["algorithm.args.completion_only_loss=false"]),
    "pretrain": (PLAIN, ["algorithm=pretrain", "algorithm.args.packing=false"]),
    "p_tuning": (PLAIN, ["peft=p_tuning", "algorithm.args.completion_only_loss=false"]),
    "dpo": (PAIRS, ["algorithm=dpo"]),
    "kto": (MARKED, ["algorithm=kto", "+algorithm.args.loss_type=apo_zero_unpaired"]),
    "reward": (PAIRS, ["algorithm=reward"]),
}


def trainer(base: Any, folder: Path, rows: list[Any], *words: str) -> Any:
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = compose("tracking=none", *words)
    read = jsonl(
        str(path), eval_path=str(path), eval_share=0.0, format="auto", max_rows=None,
        max_eval_rows=None, chat_template=None, on_error="raise",
    ).shaped(cfg.algorithm.shape)  # fmt: skip
    adapted = attach(base, cfg, folder)
    data = prepared(read, base.tokenizer, adapted.model, cfg)
    made = trainer_of(cfg, base, adapted, read, data, Record(folder / "run", cfg), [])
    torch.manual_seed(0)
    for parameter in made.model.parameters():  # an adapter that has learnt something
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return made


def evaluated(made: Any, rows: int) -> dict[str, float]:
    made.args.per_device_eval_batch_size = rows
    metrics: dict[str, float] = dict(made.evaluate())
    return {k: v for k, v in metrics.items() if not k.endswith(("runtime", "second", "time"))}


@pytest.mark.parametrize("case", CASES)
def test_metrics_do_not_depend_on_the_batch(fresh_base: Any, tmp_path: Path, case: str) -> None:
    rows, words = CASES[case]
    words = [*words, "algorithm=sft"] if case in ("sft", "p_tuning") else words
    base = tiny(task_type="SEQ_CLS") if case == "reward" else fresh_base
    made = trainer(base, tmp_path, rows, *words)
    whole = evaluated(made, len(rows))
    assert math.isfinite(whole["eval_loss"])
    for size in (1, 3, 4):
        parts = evaluated(made, size)
        shared = whole.keys() - {"eval_kl"}
        assert {k: parts[k] for k in shared} == pytest.approx(
            {k: whole[k] for k in shared}, rel=1e-4, abs=1e-5
        ), size


def test_packed_rows_are_measured_as_rows_apart(tmp_path: Path) -> None:
    want = evaluated(trainer(tiny(), tmp_path, PLAIN), 2)
    packed = ["algorithm.args.packing=true", "algorithm.args.max_length=96"]
    made = trainer(tiny(), tmp_path / "packed", PLAIN, *packed)
    for rows in (1, 5):
        got = evaluated(made, rows)
        for key in ("eval_loss", "eval_mean_token_accuracy"):
            assert got[key] == pytest.approx(want[key], rel=1e-4)


def test_a_batch_weighs_by_what_each_metric_is_of() -> None:
    model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False))
    ids = torch.zeros(4, 5, dtype=torch.long)
    labels = torch.tensor([[7, -100, 1, 2, 3]] * 4)
    assert Sizes.of({"input_ids": ids, "labels": labels}, model).of_metric("loss") == 12
    encoder = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True))
    assert Sizes.of({"input_ids": ids, "labels": labels}, encoder).of_metric("loss") == 16
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]])
    pairs = Sizes.of({"input_ids": ids, "completion_mask": mask}, model)
    sizes = {"logits/chosen": 7, "logits/rejected": 3, "logps/chosen": 2, "entropy": 10, "loss": 4}
    assert {name: pairs.of_metric(name) for name in sizes} == sizes
    marked = {"input_ids": ids, "completion_mask": mask, "label": [True, False, False, False]}
    sizes = {"logits/chosen": 3, "rewards/chosen": 1, "rewards/rejected": 3, "loss": 4}
    assert {name: Sizes.of(marked, model).of_metric(name) for name in sizes} == sizes
    assert Sizes.of([{}] * 3, model).of_metric("reward") == 3


def test_only_virtual_tokens_and_encoders_predict_a_first_token() -> None:
    def model(kind: str, tokens: int) -> Any:
        adapter = SimpleNamespace(peft_type=kind, num_virtual_tokens=tokens)
        config = SimpleNamespace(is_encoder_decoder=False)
        return SimpleNamespace(config=config, peft_config={"default": adapter})

    assert predicts_first(model("PeftType.P_TUNING", 8))
    assert not predicts_first(model("PeftType.PREFIX_TUNING", 8))
    assert not predicts_first(model("PeftType.LORA", 0))


def test_means_by_hand() -> None:
    assert mean([(1.0, 1), (4.0, 2)]) == 3
    assert math.isnan(mean([(1.0, 1), (math.nan, 2)]))  # a loss that is no number stays visible
    assert combined("reward", [(1.0, 1), (math.nan, 2)]) == 1  # a reward that scored none
    assert math.isnan(combined("reward", [(math.nan, 2)]))
    assert combined("min_reward", [(1.0, 1), (-2.0, 2)]) == -2
    assert combined("completions/max_length", [(1.0, 1), (9.0, 2)]) == 9
    assert mean([(0.1, 3)]) == 0.1
