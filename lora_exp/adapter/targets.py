"""What an adapter adapts: roles or names, resolved to the modules and parameters of a base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_exp.adapter.roles import ROLES, experts_of, modules_of, stacks_of
from lora_exp.adapter.stacks import check_stacks
from lora_exp.errors import TargetError, did_you_mean
from lora_exp.model.participation import unused
from lora_exp.model.text_part import text_modules

KEY = "peft.target_modules"
# settings of LoRA that peft has for modules only
FOR_MODULES = ("lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out", "layers_to_transform")


@dataclass(frozen=True)
class Targets:
    """Names for peft, and what was meant too but cannot be adapted."""

    modules: list[str]
    parameters: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # a layer's whole name -> why


def resolve(
    model: Any,
    wanted: str | Iterable[str],
    settings: Mapping[str, Any],
    quantised: bool = False,
    base: str | None = None,
) -> Targets:
    """Return what roles or names stand for on a base.

    On mixtures of experts peft takes names like `up_proj` for the stacks that the experts' layers
    have become; there, dense layers and shared experts of these names are adapted as parameters.

    Args:
        model: the base.
        wanted: `all_linear`, `attention`, `mlp`, `experts`, `qv` or `norm`, several joined by `+`;
            or names as target_modules takes them: whole, or the last parts.
        settings: the config's `peft` section.
        quantised: whether the base is, or will be.
        base: what identifies its weights; None: unknown.

    Raises:
        TargetError: an unknown role or name, or one of which nothing can be adapted.
        ConfigError: experts cannot be adapted with a setting, or are in 4 bits.
    """
    roles = _roles(wanted) if isinstance(wanted, str) else None
    names = None if isinstance(wanted, str) else list(wanted)
    modules, stacks = _of_roles(model, roles) if roles else _of_names(model, names or [])
    is_lora = str(settings.get("_target_")).rpartition(".")[2] == "LoraConfig"
    hindrance = next((key for key in FOR_MODULES if settings.get(key)), None)
    check_stacks(model, stacks, is_lora, hindrance)
    renamed = _renamed_by_peft(model, modules) if is_lora else set()
    hindrance = hindrance or ("quantised weights" if quantised else None)
    lost = _lost_by_peft(model, modules - renamed) if is_lora else {}
    left_out = _why_not(model, modules, renamed, hindrance, base) | lost
    _check_remains(names or [""], modules - left_out.keys() | stacks, left_out)
    parameters = stacks | {f"{name}.weight" for name in renamed - left_out.keys()}
    parameters -= _excluded(parameters, below(model, settings.get("exclude_modules") or ()))
    modules -= renamed | left_out.keys()
    if roles and not stacks and {*roles} & {"all_linear", "mlp"}:
        text = f"experts are a role of their own: {wanted}+experts"
        left_out |= dict.fromkeys(stacks_of("experts", model), text)
    if names is not None and not (left_out or parameters or _in_towers(model, names, modules)):
        return Targets(sorted(names))
    return Targets(
        _shortest(modules, [name for name, _ in model.named_modules()], 1),
        _shortest(parameters, [name for name, _ in model.named_parameters()], 2),
        dict(sorted(left_out.items())),
    )


def _roles(wanted: str) -> list[str]:
    return wanted.replace("all-linear", "all_linear").split("+")  # peft writes all-linear


def _excluded(parameters: set[str], excluded: list[str]) -> set[str]:
    """Return the parameters of excluded modules: peft excludes modules only."""
    ends = tuple(f".{name}" for name in excluded)
    return {name for name in parameters if f".{name}".rpartition(".")[0].endswith(ends)}


def _why_not(
    model: Any, modules: set[str], renamed: set[str], hindrance: str | None, base: str | None
) -> dict[str, str]:
    """Return the modules that cannot be adapted, and why."""
    why_not = _refused_by_peft(model, modules) | _without_part(model, modules, base)
    if hindrance:
        text = f"peft adapts it as a parameter, without {hindrance}"
        why_not |= dict.fromkeys(renamed, text)
    return why_not


def _of_roles(model: Any, roles: list[str]) -> tuple[set[str], set[str]]:
    """Return the whole names of the modules, and of the stacks of experts, of roles."""
    if unknown := [role for role in roles if role not in ROLES]:
        near = did_you_mean(unknown[0], [*ROLES, *_last_names(model)])
        raise TargetError(
            f"{KEY}: {unknown[0]!r} is no role ({', '.join(ROLES)}){near};"
            f" names go in a list: {KEY}=[{unknown[0]}]"
        )
    modules = {name for role in roles for name in modules_of(role, model)}
    stacks = {name for role in roles for name in stacks_of(role, model)}
    if not modules | stacks:
        hint = "; its experts are a role, experts" if stacks_of("experts", model) else ""
        text = f"{'+'.join(roles)}: {type(model).__name__} has no such module{hint}"
        raise TargetError(f"{KEY}: {text}")
    return modules, stacks


def _of_names(model: Any, names: list[str]) -> tuple[set[str], set[str]]:
    """Return the whole names of the modules, and of the stacks of experts, of names."""
    stacks = stacks_of("experts", model)
    check_names(model, KEY, names, stacks)
    ends = tuple(f".{name}" for name in names)
    modules = {name for name in text_modules(model) if f".{name}".endswith(ends)}
    stacks_named = {name for name in stacks if f".{name}".endswith(ends)}
    for name, end in zip(names, ends, strict=True):
        if not any(f".{other}".endswith(end) for other in modules | stacks_named):
            text = f"{name!r} is no module of the language model of {type(model).__name__}"
            raise TargetError(f"{KEY}: {text}, and only that is trained")
    return modules, stacks_named


def _in_towers(model: Any, names: list[str], modules: set[str]) -> bool:
    """Return whether names also stand for modules of towers, which take no part in texts."""
    ends = tuple(f".{name}" for name in names)
    return any(f".{n}".endswith(ends) and n not in modules for n, _ in model.named_modules())


def _check_remains(names: list[str], remaining: set[str], left_out: Mapping[str, str]) -> None:
    """Refuse a name of which nothing can be adapted; an empty one stands for all layers.

    Raises:
        TargetError: with the reason of one layer.
    """
    for name in names:
        end = f".{name}" if name else ""
        if not any(f".{other}".endswith(end) for other in remaining):
            layer = next(other for other in left_out if f".{other}".endswith(end))
            raise TargetError(f"{KEY}: {layer}: {left_out[layer]}")


def _renamed_by_peft(model: Any, modules: set[str]) -> set[str]:
    """Return the modules whose names peft takes for those of experts in transformers 4."""
    by_last: dict[str, set[str]] = {}
    for name in modules:
        by_last.setdefault(name.rpartition(".")[2], set()).add(name)
    renamed: set[str] = set()
    for last, whole in by_last.items():
        config = peft.LoraConfig(target_modules=[last])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it is fused with another one, which is missing here
            renamed |= whole
        else:
            renamed |= whole if last not in config.target_modules else set()
    return renamed


def _refused_by_peft(model: Any, modules: set[str]) -> dict[str, str]:
    """Return the modules that peft refuses to adapt on this architecture."""
    refused = {}
    for name in modules:
        try:
            _check_lora_target_modules_mamba(peft.LoraConfig(), model, name.rpartition(".")[2])
        except ValueError:
            refused[name] = f"peft does not adapt it on {model.config.model_type}"
    return refused


def _lost_by_peft(model: Any, modules: set[str]) -> dict[str, str]:
    """Return the modules whose saved weights peft would not find again, without an error.

    It renames an adapter's keys when it loads them, as transformers renames those of the base's
    published files; what has its new name already may then get a wrong one.
    """
    text = f"peft loads its weights by another name on {model.config.model_type}: they were lost"
    keys = {name: f"base_model.model.{name}.lora_A.weight" for name in modules}
    return {name: text for name, key in keys.items() if key not in _loaded_keys(model, key)}


def _loaded_keys(model: Any, key: str) -> list[str]:
    """Return the keys that peft makes of one of a saved adapter; none: it refuses it."""
    weights = {key: torch.zeros(1, 1)}
    convert = convert_peft_adapter_state_dict_for_transformers
    try:
        return [*convert(model, peft.LoraConfig(), weights)]
    except (ValueError, RuntimeError, KeyError):
        return []


def _without_part(model: Any, modules: set[str], base: str | None) -> dict[str, str]:
    experts = experts_of(model)
    linear = {n for n in modules if isinstance(model.get_submodule(n), nn.Linear | Conv1D)}
    layers = {name for name in linear if not f"{name}.".startswith(experts)}
    if not layers or model.device.type == "meta":  # without weights nothing is computed
        return {}
    text = f"it takes no part in what {type(model).__name__} computes, or not as a linear layer"
    return dict.fromkeys(unused(model, layers, base), text)


def _shortest(names: set[str], known: list[str], parts: int) -> list[str]:
    """Return names by their last parts where these stand for no other, else whole, sorted."""
    by_end: dict[str, set[str]] = {}
    end_of: Callable[[str], str] = lambda name: ".".join(name.split(".")[-parts:])  # noqa: E731
    for name in known:
        by_end.setdefault(end_of(name), set()).add(name)
    return sorted({end_of(n) if by_end[end_of(n)] <= names else n for n in names})


def _last_names(model: Any) -> set[str]:
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return {name for name in names if name and not name.isdigit()}


def check_names(model: Any, key: str, names: Iterable[str], stacks: Iterable[str] = ()) -> None:
    """Refuse names that no module has, whole or as last parts; peft would ignore some of them.

    Args:
        model: the base.
        key: of the config, for errors.
        names: to check.
        stacks: whole names of parameters that are known too.

    Raises:
        TargetError: with near names for each.
    """
    whole = [f".{name}" for name in (*(name for name, _ in model.named_modules()), *stacks)]
    unknown = [name for name in names if not any(module.endswith(f".{name}") for module in whole)]
    if unknown:
        known = _last_names(model) | {name.rpartition(".")[2] for name in stacks}
        listed = ", ".join(f"{name!r}{did_you_mean(name, known)}" for name in unknown)
        raise TargetError(f"{key}: no module of {type(model).__name__} is called {listed}")


def below(model: Any, names: Iterable[str]) -> list[str]:
    """Return names for `exclude_modules`: of a container, also the layers below it.

    Args:
        model: the base.
        names: whole, or the last parts; peft excludes only the modules of these names themselves.
    """
    excluded: set[str] = set()
    modules = dict(model.named_modules())
    for name in names:
        inside = tuple(f"{m}." for m in modules if f".{m}".endswith(f".{name}"))
        excluded |= {name} | {m for m in modules if m.startswith(inside)}
    return sorted(excluded)


def of_parameters(values: Mapping[str, Any], targets: Targets) -> dict[str, Any]:
    """Return ranks or alphas by name, with `.weight` after layers that peft adapts as parameters.

    Args:
        values: by names of modules or stacks, whole or the last parts.
        targets: what is adapted.
    """
    weights = [f".{name}" for name in targets.parameters if name.endswith(".weight")]

    def name_of(key: str) -> str:
        end = f".{key}.weight"
        is_weight = any(weight.endswith(end) or end.endswith(weight) for weight in weights)
        return f"{key}.weight" if is_weight else key

    return {name_of(key): value for key, value in values.items()}
