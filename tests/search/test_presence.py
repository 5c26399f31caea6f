"""A key that only some options have is absent with the others."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_exp.search.presence import Presence
from tests.search.spaces import presence_of, space_of

CONFIGS: dict[str, Any] = {
    "lora": {"peft": {"r": 8, "x": None}},
    "ia3": {"peft": {"y": 1}},
    "none": {"peft": None},
}


def test_a_key_is_absent_where_the_option_does_not_have_it() -> None:
    space = space_of(
        "peft=lora,ia3,none", "peft.r=4,8", "peft.y=1,2", "+peft.z=1,2", groups=["peft"]
    )
    presence = presence_of(space, CONFIGS)
    values = {"peft.r": "4", "peft.y": "1", "+peft.z": "2"}
    for option, keys in (("lora", {"peft.r"}), ("ia3", {"peft.y"}), ("none", set())):
        present = presence.present({"peft": option, **values})
        assert present.keys() == keys | {"peft", "+peft.z"}


def test_a_null_value_exists() -> None:
    space = space_of("peft=lora,ia3", "peft.x=1,2", groups=["peft"])
    assert presence_of(space, CONFIGS).exists("peft.x", {"peft": "lora"})


def test_without_groups_every_key_is_for_hydra_to_judge() -> None:
    space = space_of("nothing.like.it=1,2")
    assert presence_of(space).present({"nothing.like.it": "1"}) == {"nothing.like.it": "1"}


def test_a_key_that_no_option_has_is_composed_for_hydras_error() -> None:
    space = space_of("peft=lora,ia3", "peft.r=4,8", "peft.rr=4,8", groups=["peft"])
    composed: list[list[str]] = []

    def compose(overrides: list[str]) -> DictConfig:
        composed.append(overrides)
        return OmegaConf.create(CONFIGS[overrides[0].removeprefix("peft=")])

    Presence(space, compose)
    assert composed[-1] == ["peft=lora", "peft.rr=4"]
    assert sorted(composed[:-1]) == [["peft=ia3"], ["peft=lora"]]
