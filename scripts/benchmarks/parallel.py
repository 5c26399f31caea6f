"""One run in two processes: how far its weights are from those of one, and of other options."""

import tempfile
from importlib.util import find_spec
from pathlib import Path

from safetensors.numpy import load_file

from benchmarks.commands import QUIET, run

STEPS = [
    "train.max_steps=6", "train.per_device_train_batch_size=4", *QUIET,
]  # fmt: skip
ROWS = ["data.max_rows=32", "data.max_eval_rows=4"]
PAIRS = ["data.rows=32", "data.eval_rows=4"]  # generated
BFLOAT16 = "model.dtype=float32 +train.bf16=true"
CASES = {
    "LoRA": "",
    "LoRA, no clipping": "train.max_grad_norm=0",
    "LoRA, bfloat16": BFLOAT16,
    "LoRA on nf4": "quant=nf4",
    "LoRA on int8": "quant=int8",
    "DoRA": "peft=dora",
    "reward model": "experiment=demo_reward",
    "DPO": "experiment=demo_dpo",
    "full fine-tuning": "peft=none",
    "full, no clipping": "peft=none train.max_grad_norm=0",
    "full, bfloat16": f"peft=none {BFLOAT16}",
}
OPTIONS = ("none", "fsdp", "zero2")


def refused(case: str, option: str) -> bool:
    """Return whether an option does not train a case, or its package is missing."""
    if option == "zero2":
        return find_spec("deepspeed") is None
    return option == "fsdp" and "quant=" in CASES[case]


def parallel(*words: str) -> None:
    """Print the largest difference of a weight from two processes of `ddp`, for cases with a word.

    It is what another sum, in another order, makes of six steps.
    """
    print(
        "| | the largest weight | one process | fsdp | zero2 |\n|---|---|---|---|---|", flush=True
    )
    for case in CASES:
        if words and not any(word in case for word in words):
            continue
        with tempfile.TemporaryDirectory() as name:
            copies = trained(Path(name), case, "ddp")
            cells = [f"{max(abs(tensor).max() for tensor in copies.values()):.2g}"]
            for option in OPTIONS:
                if refused(case, option):
                    cells.append("")
                    continue
                other = trained(Path(name), case, option)
                difference = max(abs(copies[key] - other[key]).max() for key in copies)
                cells.append(f"{difference:.0e}" if difference else "0")
        print(f"| {case} | {' | '.join(cells)} |", flush=True)


def trained(folder: Path, case: str, option: str) -> dict:
    """Train a case in two processes, or one, and return its weights."""
    shared = [] if option == "none" else [f"parallel={option}", "parallel.processes=2"]
    rows = PAIRS if "experiment=" in CASES[case] else ROWS
    run(folder / option, *CASES[case].split(), *STEPS, *rows, *shared)
    (file,) = [*folder.glob(f"{option}/adapter/*.safetensors")] or [
        *folder.glob(f"{option}/model/*.safetensors")
    ]
    return load_file(file)
