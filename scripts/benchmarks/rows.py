"""Time and memory of reading and tokenising many rows, beside a bare `datasets.map`."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = ("river", "stone", "window", "garden", "winter", "morning", "letter", "number", "table")
MEASURES = ("map", "one process", "data.num_proc=2", "again")


def written(path: Path, count: int) -> None:
    """Write chats of one question and answer, about 190 of the embedded model's tokens each."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            texts = [" ".join(draw.choices(WORDS, k=n)) for n in (12, 40)]
            turns = zip(("user", "assistant"), (f"{i} {texts[0]}?", texts[1]), strict=True)
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")


def _tokenizer() -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained("lora_exp/assets/tiny")


def bare(path: str) -> int:
    """Tokenise with datasets alone: the least that gives ids and the mask of the last answer."""
    from datasets import load_dataset

    tokenizer = _tokenizer()

    def encode(batch: dict) -> dict:
        chats = batch["messages"]
        texts = tokenizer.apply_chat_template(chats, tokenize=False)
        prompts = tokenizer.apply_chat_template(
            [chat[:-1] for chat in chats], tokenize=False, add_generation_prompt=True
        )
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        labels = [
            [token if end > len(prompt) else -100 for token, (_, end) in zip(*row, strict=True)]
            for prompt, *row in zip(
                prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True
            )
        ]
        return {"input_ids": encoded["input_ids"], "labels": labels}

    rows = load_dataset("json", data_files=path, split="train")
    return len(rows.map(encode, batched=True, remove_columns=rows.column_names))


def ours(path: str, num_proc: int) -> int:
    """Read and tokenise as a run does."""
    from lora_exp.data.rows import jsonl
    from lora_exp.data.tokens import tokenise

    rows = jsonl(
        path, eval_path=None, eval_share=0.0, format="auto", max_rows=None, max_eval_rows=None,
        chat_template=None, on_error="raise", num_proc=num_proc,
    )  # fmt: skip
    tokens = tokenise(
        rows.train, _tokenizer(), max_length=512, completion_only=True, num_proc=num_proc,
        what="train",
    )  # fmt: skip
    return tokens.counts.tokens


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _measured(name: str, path: str) -> None:
    """Print seconds, and the peak of this process, without its forks, since its imports, GiB."""
    import datasets

    import lora_exp.data.tokens  # noqa: F401

    datasets.disable_progress_bars()
    _tokenizer()
    before, start = _peak(), time.perf_counter()
    if name == "map":
        bare(path)
    else:
        ours(path, 2 if name == "data.num_proc=2" else 1)
    print(json.dumps([time.perf_counter() - start, _peak() - before]))


def python(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run Python."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, text=True, check=True, stdout=subprocess.PIPE)


def rows(count: str = "200000", rounds: str = "2") -> None:
    """Seconds and memory for rows of 190 tokens: `scripts/bench rows [rows] [rounds]`."""
    scratch = Path(tempfile.mkdtemp(prefix="bench-"))
    path = scratch / "rows.jsonl"
    written(path, int(count))
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in MEASURES}
    try:
        for _ in range(int(rounds)):
            for name in MEASURES:
                folder = scratch / (name if name != "again" else "data.num_proc=2")
                if name != "again":
                    shutil.rmtree(folder, ignore_errors=True)
                caches = {"LORA_EXP_CACHE": str(folder), "HF_DATASETS_CACHE": str(folder)}
                output = python(__file__, name, str(path), env=os.environ | caches).stdout
                results[name].append(json.loads(output.splitlines()[-1]))
    finally:
        shutil.rmtree(scratch)
    print("| what | s | to map | GiB above the process's own |\n|---|---|---|---|")
    for name, measured in results.items():
        ratios = [ours[0] / bare[0] for ours, bare in zip(measured, results["map"], strict=True)]
        seconds, memory = zip(*measured, strict=True)
        columns = (
            ", ".join(f"{value:.{digits}f}" for value in values)
            for digits, values in ((0, seconds), (2, ratios), (2, memory))
        )
        print(f"| {name} | {' | '.join(columns)} |")


if __name__ == "__main__":
    _measured(*sys.argv[1:])
