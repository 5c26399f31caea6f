"""The models that conf/model names: licence, size and memory of their weights; without torch.

Sizes are of the published architectures; a model of your own is measured by `lora-exp estimate`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from lora_exp.config.door import CONF

TITLE = re.compile(r"# (?P<name>.+) \((?P<licence>[^()]+)\)")
BF16, INT8 = 2.0, 1.0  # bytes of a weight
NF4 = 1 / 2 + (1 + 4 / 256) / 64  # and of its scales: one byte for 64 weights, quantised themselves


@dataclass(frozen=True)
class Size:
    """Parameters of an architecture, and how many of them bitsandbytes can quantise."""

    kind: str  # transformers' model_type
    parameters: int
    quantised: int  # in linear layers, but not in the output layer
    experts: int = 0  # in stacks of experts, which are quantised to 4 bits only


SIZES = {  # by the option's name
    "deepseek_r1_distill_llama_8b": Size("llama", 8_030_261_248, 6_979_321_856),
    "deepseek_r1_distill_qwen_1_5b": Size("qwen2", 1_777_088_000, 1_310_195_712),
    "deepseek_r1_distill_qwen_7b": Size("qwen2", 7_615_616_512, 6_525_288_448),
    "gemma3_1b": Size("gemma3_text", 999_885_952, 697_761_792),
    "gemma3_4b": Size("gemma3", 4_300_079_472, 3_619_713_024),
    "glm4_9b": Size("glm4", 9_400_279_040, 8_157_921_280),
    "gpt_oss_20b": Size("gpt_oss", 20_914_757_184, 637_009_920, 19_110_297_600),
    "llama3_1_8b_instruct": Size("llama", 8_030_261_248, 6_979_321_856),
    "llama3_2_1b_instruct": Size("llama", 1_235_814_400, 973_078_528),
    "mistral_7b_v0_3": Size("mistral", 7_248_023_552, 6_979_321_856),
    "mistral_small_3": Size("mistral", 23_572_403_200, 22_229_811_200),
    "olmo2_1b": Size("olmo2", 1_484_916_736, 1_073_741_824),
    "olmo2_7b": Size("olmo2", 7_298_617_344, 6_476_005_376),
    "olmo3_7b": Size("olmo3", 7_298_011_136, 6_476_005_376),
    "phi4_mini": Size("phi3", 3_836_021_760, 3_221_225_472),
    "qwen2_5_0_5b_instruct": Size("qwen2", 494_032_768, 357_826_560),
    "qwen2_5_7b_instruct": Size("qwen2", 7_615_616_512, 6_525_288_448),
    "qwen3_0_6b": Size("qwen3", 596_049_920, 440_401_920),
    "qwen3_1_7b": Size("qwen3", 1_720_574_976, 1_409_286_144),
    "qwen3_4b": Size("qwen3", 4_022_468_096, 3_633_315_840),
    "qwen3_8b": Size("qwen3", 8_190_735_360, 6_945_767_424),
    "qwen3_30b_a3b": Size("qwen3_moe", 30_532_122_624, 905_969_664, 28_991_029_248),
    "smollm2_135m_instruct": Size("llama", 134_515_008, 106_168_320),
    "smollm3_3b": Size("smollm3", 3_075_098_624, 2_812_280_832),
    "tiny": Size("llama", 1_869_504, 1_769_472),
}


def models() -> list[dict[str, Any]]:
    """Return what is known of each option of conf/model that names a model, the smallest first.

    `bytes` are those of the weights by option of conf/quant; floats are in bfloat16. An option of
    one's own has no known size: `parameters` is None, `bytes` is empty, and it comes last.
    """
    rows = []
    for file in CONF.glob("model/*.yaml"):
        text = file.read_text(encoding="utf-8")
        values: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(text))  # type: ignore[assignment]
        path = values.get("path") or values.get("model", {}).get("path")
        if path == "???":
            continue
        title = next(filter(None, map(TITLE.fullmatch, text.splitlines())), None)
        own = str(path).startswith("pkg://lora_exp/")
        about = {"name": file.stem, "licence": "Apache-2.0" if own else None}
        about |= title.groupdict() if title else {}
        rows.append({"option": file.stem, **about, "path": path, **_sizes(SIZES.get(file.stem))})
    return sorted(rows, key=lambda row: (row["parameters"] or math.inf, row["option"]))


def _sizes(size: Size | None) -> dict[str, Any]:
    if size is None:
        return {"kind": None, "parameters": None, "bytes": {}}
    layers, experts = size.quantised, size.experts
    floats = BF16 * (size.parameters - layers - experts)
    counts = {"none": (BF16, BF16), "int8": (INT8, BF16), "nf4": (NF4, NF4)}
    weights = {
        quant: int(floats + of_layers * layers + of_experts * experts)
        for quant, (of_layers, of_experts) in counts.items()
    }
    return {"kind": size.kind, "parameters": size.parameters, "bytes": weights}
