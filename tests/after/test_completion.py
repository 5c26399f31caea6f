"""Files of answers: equal to the run's, whole or absent, and identical after a resume."""

from __future__ import annotations

import inspect
import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import date
from decimal import Decimal
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from lora_exp.after.completion import Part, _line, generate
from lora_exp.after.merging import merge
from lora_exp.data.rows import hub, jsonl
from lora_exp.errors import DataError, SavedError
from tests.after.test_chat import run_cli
from tests.conftest import ROOT
from tests.warm import Process

Trained = Callable[..., Path]
HELD_OUT = (ROOT / "lora_exp/assets/demo_eval.jsonl").read_text().splitlines(keepends=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def held_out(folder: Path, count: int) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(HELD_OUT[:count]))
    return path


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_greedy_answers_equal_those_at_the_end_of_the_run(
    trained: Trained, tmp_path: Path, quant: str
) -> None:
    run = trained("peft=lora", f"quant={quant}", "samples.max_new_tokens=24")
    samples = read_rows(run / "samples.jsonl")
    answers = generate(run, held_out(tmp_path, 4), tmp_path / "out.jsonl", max_new_tokens=24)
    assert [row["completion"] for row in read_rows(answers)] == [s["after"] for s in samples]
    assert any(s["after"] != s["before"] for s in samples)
    texts = write_rows(tmp_path / "texts.jsonl", *({"prompt": s["prompt"]} for s in samples))
    again = generate(run, texts, tmp_path / "again.jsonl", max_new_tokens=24)
    assert [row["completion"] for row in read_rows(again)] == [s["after"] for s in samples]


def test_a_part_of_another_quantisation_is_not_continued(trained: Trained, tmp_path: Path) -> None:
    run, prompts = trained("peft=lora"), held_out(tmp_path, 1)
    generate(run, prompts, tmp_path / "out.jsonl", quant="nf4", max_new_tokens=4)
    (tmp_path / "out.jsonl").rename(tmp_path / "nf4.jsonl")
    Part(tmp_path / "out.jsonl", {"quant": "nf4"}, force=False).close()
    with pytest.raises(SavedError, match="quant: none, was nf4"):
        generate(run, prompts, tmp_path / "out.jsonl", max_new_tokens=4)


@pytest.mark.parametrize(
    ("temperature", "number", "code"), [("0.7", signal.SIGKILL, -9), ("0", signal.SIGINT, 130)]
)
def test_a_stopped_generation_continues_to_the_same_bytes(
    trained: Trained, tmp_path: Path, temperature: str, number: int, code: int
) -> None:
    run, prompts = trained("peft=lora"), held_out(tmp_path, 30)
    options: dict[str, Any] = {"max_new_tokens": 64, "batch_size": 2, "seed": 5}
    options["temperature"] = float(temperature)
    whole = generate(run, prompts, tmp_path / "whole.jsonl", **options)
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    command = ["generate", run, "--prompts", prompts, "-o", out, "--max-new-tokens", "64"]
    command += ["--batch-size", "2", "--seed", "5", "--temperature", temperature]
    process = Process("-m", "lora_exp.cli", *map(str, command))
    while process.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == code, stderr
    answered = part.read_bytes().count(b"\n") - 1
    assert 3 <= answered < 15
    assert not out.exists()
    if number == signal.SIGINT:
        message = r"\d+ of 15 batches .* answered; the same command continues\ninterrupted\n"
        assert re.fullmatch(message, stderr)
    with part.open("ab") as file:
        file.write(b'["torn')
    assert generate(run, prompts, out, **options) == out
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.jsonl", "prompts.jsonl", "whole.jsonl",
    ]  # fmt: skip


def test_a_part_is_continued_after_its_last_whole_line(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    with closing(Part(target, {"seed": 1}, force=False)) as part:
        part.add(["a", "b"])
        with pytest.raises(SavedError, match="being written by another process"):
            Part(target, {"seed": 1}, force=True)
    with part.path.open("ab") as file:
        file.write(b'["c", ')
    with closing(Part(target, {"seed": 1}, force=False)) as part:
        assert part.answers == [["a", "b"]]
        part.add(["c\nd"])
    with closing(Part(target, {"seed": 1}, force=False)) as part:
        assert part.answers == [["a", "b"], ["c\nd"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": 2, "top_p": 1.0}\n["a"]\n', "seed: 1, was 2; give the same settings"),
        ('{"seed": 1, "top_p": 1.0, "new": 3}\n', "new: None, was 3"),
        ("no json\n", "it is damaged"),
        ("[1]\n", "it is damaged"),
        ('{"seed": 1, "top_p": 1.0}\n["a"]\n["b\n["c"]\n', "it is damaged"),
    ],
)
def test_a_part_of_other_settings_is_replaced_only_with_force(
    tmp_path: Path, text: str, message: str
) -> None:
    target, shape = tmp_path / "out.jsonl", {"seed": 1, "top_p": 1.0}
    (tmp_path / "out.jsonl.part").write_text(text)
    with pytest.raises(SavedError, match=message):
        Part(target, shape, force=False)
    assert (tmp_path / "out.jsonl.part").read_text() == text
    with closing(Part(target, shape, force=True)) as part:
        assert part.answers == []
    assert read_rows(tmp_path / "out.jsonl.part") == [shape]


def test_a_part_is_refused_when_settings_adapter_or_prompts_changed(
    trained: Trained, tmp_path: Path
) -> None:
    run, prompts = trained("peft=lora"), held_out(tmp_path, 2)
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    options: dict[str, Any] = {"max_new_tokens": 4}
    with pytest.raises(KeyboardInterrupt), _interrupt_when_written(part):
        generate(run, prompts, out, **options)
    content = part.read_bytes()
    for changes, message in (
        ({"temperature": 0.5}, "temperature: 0.5, was 0.0"),
        ({"seed": 1}, "seed: 1, was 0"),
        ({"batch_size": 3}, "batch_size: 3, was 16"),
        ({"max_new_tokens": 5}, "max_new_tokens: 5, was 4"),
    ):
        with pytest.raises(SavedError, match=message):
            generate(run, prompts, out, **(options | changes))
    with pytest.raises(SavedError, match=r"adapter\.adapter_model\.safetensors changed") as error:
        generate(trained("peft=lora", "seed=7"), prompts, out, **options)
    assert not re.search(r"[0-9a-f]{64}", str(error.value))
    with prompts.open("a") as file:
        file.write(HELD_OUT[2])
    with pytest.raises(SavedError, match="prompts changed; tokens changed; give the same"):
        generate(run, prompts, out, **options)
    assert part.read_bytes() == content
    assert len(read_rows(generate(run, prompts, out, force=True, **options))) == 3
    assert not part.exists()


@contextmanager
def _interrupt_when_written(part: Path) -> Iterator[None]:
    """Press Ctrl-C when the first line is write_rows."""

    def press() -> None:
        while not (part.exists() and part.stat().st_size):
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    thread = Thread(target=press)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)


def test_a_row_of_a_table_is_written_as_json() -> None:
    row = {"at": date(2026, 1, 2), "score": float("nan"), "é": Decimal("1.5")}
    assert json.loads(_line(row)) == {"at": "2026-01-02", "score": None, "é": "1.5"}


def test_rows_keep_their_columns_order_and_known_answers(trained: Trained, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Mirror: a b c"}]
    rows: list[dict[str, Any]] = [
        {"messages": [*turns, {"role": "assistant", "content": "?"}], "id": 1, "é": "ü"},
        {"prompt": "Mirror: a b c", "completion": "known", "extra": [1]},
        {"messages": turns},
        {"prompt": turns, "label": False, "completion": "bad", "tools": None},
        {"instruction": "Mirror: a b c", "output": "?"},
        {"prompt": "M"},
    ]
    prompts = write_rows(tmp_path / "prompts.jsonl", *rows)
    out = generate(
        trained("peft=lora"), prompts, tmp_path / "out.jsonl", max_new_tokens=8, as_chat=True
    )
    got = read_rows(out)
    assert "ü" in out.read_text(encoding="utf-8")
    assert len({row.pop("completion") for row in got[:5]}) == 1, "the same question"
    assert [row.pop("expected", None) for row in got] == ["?", "known", None, "bad", "?", None]
    got[5].pop("completion")
    assert got == [{k: v for k, v in row.items() if k != "completion"} for row in rows]


@pytest.mark.parametrize(
    ("function", "positional"), [(jsonl, 1), (hub, 1), (merge, 2), (generate, 3)]
)
def test_functions_of_many_arguments_take_them_by_keyword(
    function: Callable[..., Any], positional: int
) -> None:
    arguments = list(inspect.signature(function).parameters.values())
    assert len(arguments) > 6
    assert [a.kind is a.KEYWORD_ONLY for a in arguments] == [
        i >= positional for i in range(len(arguments))
    ]


def test_sampled_answers_depend_on_the_seed_only(trained: Trained, tmp_path: Path) -> None:
    next_draws = set()

    def sample(name: str, seed: int) -> bytes:
        torch.manual_seed(len(next_draws))
        out = generate(
            trained("peft=lora"), prompts, tmp_path / name, seed=seed, temperature=2.0,
            max_new_tokens=16, batch_size=3,
        )  # fmt: skip
        next_draws.add(torch.rand(1).item())
        return out.read_bytes()

    prompts = held_out(tmp_path, 4)
    first = sample("one", 1)
    assert sample("again", 1) == first
    assert sample("two", 2) != first
    assert len({row["completion"] for row in read_rows(tmp_path / "one")}) > 1
    prompts = write_rows(tmp_path / "same.jsonl", *[{"prompt": "Mirror: a"}] * 6)
    sample("six", 1)
    assert len({row["completion"] for row in read_rows(tmp_path / "six")}) > 3, "each batch anew"
    assert len(next_draws) == 4, "the caller's random numbers are not affected"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "t"}], "prompts.jsonl:1: has no prompt"),
        ([{"prompt": "a"}, {"prompt": ""}], "prompts.jsonl:2: field 'prompt' is empty"),
        ([], "prompts.jsonl: no rows"),
        ([5], "prompts.jsonl:1: a row is an object"),
        ([{"prompt": "a", "x": "\ud800"}], "prompts.jsonl:1: field 'x' holds half a surrogate"),
        (
            [{"prompt": "a"}, {"prompt": "a b " * 300}, {"prompt": "a b " * 300}],
            r"prompts.jsonl:2: \d+ tokens, and the context holds 256 beside 256 new ones"
            r" \(and 1 more\); shorten it",
        ),
    ],
)
def test_an_error_names_file_and_line_of_a_row_that_cannot_be_answered(
    trained: Trained, tmp_path: Path, rows: list[Any], message: str
) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", *rows)
    with pytest.raises(DataError, match=message):
        generate(trained("peft=lora"), prompts, tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_a_reward_model_is_refused(trained: Trained, tmp_path: Path) -> None:
    reward = trained("algorithm=reward", "data=demo_pairs", "data.rows=64", "data.eval_rows=8")
    with pytest.raises(SavedError, match=r"gives scores .*; lora-exp evaluate measures it"):
        generate(reward, held_out(tmp_path, 1), tmp_path / "out.jsonl")


def test_the_generate_command(trained: Trained, tmp_path: Path) -> None:
    run, out = str(trained("peft=lora")), str(tmp_path / "out.jsonl")
    command = ["generate", run, "--prompts", str(held_out(tmp_path, 2)), "-o", out]
    done = run_cli(*command, "--max-new-tokens", "4")
    assert (done.returncode, done.stdout.strip()) == (0, out), done.stderr
    again = run_cli(*command)
    assert again.returncode == 1
    assert again.stderr.strip() == f"SavedError: {out} exists; --force replaces it"
    assert run_cli(*command, "--top-p", "2").returncode == 2
