"""LoRAs of parameters: of a layer's stacked experts, or of a single weight.

Shapes: E experts, R rank, I and O the widths of an expert's input and output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from typing import Any

from torch import Tensor

from lora_exp.adapter.untrusted import Search
from lora_exp.errors import ConfigError
from lora_exp.model.experts import quantised_stacks

EXPERTS = "quant.experts"
WRAPPED = ".base_layer"  # peft nests the LoRAs of a module's parameters, the first one innermost


def by_pattern(
    config: Mapping[str, Any], key: str, default: str, names: Iterable[str], path: str
) -> dict[str, Any]:
    """Return the value of each name: that of the first pattern that matches it, as in peft.

    Args:
        config: of an adapter.
        key: rank_pattern or alpha_pattern.
        default: the key of all others' value.
        names: whole names.
        path: the adapter's folder, for errors.

    Raises:
        AdapterError: a pattern is invalid, or takes too long to match.
    """
    values: dict[str, Any] = {}
    search = Search(sorted(names), path)
    for pattern, value in (config.get(key) or {}).items():
        for name in search.matches(rf"(.*\.)?({pattern})", key, optional=True):
            values.setdefault(name, value)
    return {name: values.get(name, config.get(default)) for name in search.names}


def parameters_of(
    heights: Mapping[str, int], config: Mapping[str, Any], path: str
) -> dict[str, tuple[str, int]]:
    """Return the parameters that the LoRAs of a file adapt, where these are none of layers.

    The file does not name them. All parameters of a module have as many experts, so the heights of
    the matrices A are in the ratio of the ranks. Of equal ranks, what leads out of the experts is
    the last, as in transformers' classes.

    Args:
        heights: of the matrices A, by the names in the file.
        config: of the adapter.
        path: its folder, for errors.

    Returns:
        The whole name of each and its number of experts, by the names in the file.
    """
    targets = [str(name) for name in config.get("target_parameters") or ()]
    modules: dict[str, list[str]] = {}
    for name in sorted(heights, key=lambda name: -name.count(WRAPPED)):
        modules.setdefault(name.replace(WRAPPED, ""), []).append(name)
    own = {module: _own(module, targets) for module in modules}
    whole = [name for names in own.values() for name in names]
    ranks = by_pattern(config, "rank_pattern", "r", whole, path)
    found: dict[str, tuple[str, int]] = {}
    for module, wrapped in modules.items():
        for order in permutations(own[module], len(wrapped)):
            pairs = list(zip(wrapped, order, strict=True))
            counts = {heights[in_file] / ranks[name] for in_file, name in pairs}
            if len(counts) == 1 and (count := counts.pop()).is_integer():
                found |= {in_file: (name, int(count)) for in_file, name in pairs}
                break
    return found


def _own(module: str, targets: Sequence[str]) -> list[str]:
    """Return the whole names of a module's parameters that are adapted, in their order."""
    lasts = {target.rpartition(".")[2] for target in targets}
    ends = tuple(f".{target}" for target in targets)
    whole = [f"{module}.{last}" for last in sorted(lasts, key=lambda last: ("down" in last, last))]
    return [name for name in whole if f".{name}".endswith(ends)]


def factors_of_experts(first: Tensor, second: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return A [R, I] and B [O, R] of each expert, in peft's layout of their stack.

    Args:
        first: A of all, [E R, I]; the rows of an expert are together.
        second: B of all, [O, R E]; the columns of an expert are E apart.
        count: E.
    """
    rows_ERI = first.reshape(count, -1, first.shape[-1])
    columns_ORE = second.reshape(len(second), -1, count)
    return [(rows_ERI[i], columns_ORE[..., i]) for i in range(count)]


def check_stacks(model: Any, stacks: set[str], is_lora: bool, hindrance: str | None) -> None:
    """Refuse to adapt stacks of experts that peft cannot adapt.

    Raises:
        ConfigError: with what would be right.
    """
    if stacks and not is_lora:
        text = "experts are stacked weights, which only peft=lora adapts"
        raise ConfigError([("peft", text)])
    if stacks and hindrance:
        text = f"experts are stacked weights, for which peft has no {hindrance}; leave it out"
        raise ConfigError([(f"peft.{hindrance}", text)])
    check_in_floats(stacks, quantised_stacks(model))


def check_in_floats(adapted: Iterable[str], in_4_bits: Iterable[str]) -> None:
    """Refuse to adapt stacks of experts that are in 4 bits.

    Args:
        adapted: weights, by their names or the last parts.
        in_4_bits: the names of the stacks that are.

    Raises:
        ConfigError: with the first of them.
    """
    ends = tuple(f".{name}" for name in adapted)
    if names := sorted(name for name in in_4_bits if f".{name}".endswith(ends)):
        text = f"peft adapts experts in floats only, and {names[0]} is in 4 bits"
        raise ConfigError([(EXPERTS, f"{text}; give {EXPERTS}=false")])
