"""The space of a search is what Hydra's override grammar says."""

from __future__ import annotations

import pytest

from lora_exp.errors import ConfigError
from lora_exp.search.space import Dimension
from tests.search.spaces import space_of


@pytest.mark.parametrize(
    ("override", "dimension"),
    [
        ("a=4,8,16", Dimension("a", ("4", "8", "16"))),
        ("a=choice(x,'y z',null1)", Dimension("a", ("x", r"y\ z", "null1"))),
        ("a=[q_proj,v_proj],[o_proj]", Dimension("a", ("[q_proj,v_proj]", "[o_proj]"))),
        ("a=range(1,4)", Dimension("a", ("1", "2", "3"), ordered=True)),
        ("a=range(0,0.35,0.1)", Dimension("a", ("0.0", "0.1", "0.2", "0.3"), ordered=True)),
        ("a=shuffle(3,1,2)", Dimension("a", ("3", "1", "2"))),
        ("+a=1,2,1", Dimension("+a", ("1", "2"))),
        ("a=interval(1,4)", Dimension("a", (), False, 1, 4)),
        ("a=int(interval(4,64))", Dimension("a", (), False, 4, 64, whole=True)),
        ("a=tag(log,interval(1e-5,1e-2))", Dimension("a", (), False, 1e-5, 1e-2, log=True)),
        ("a=tag(log,int(interval(4,64)))", Dimension("a", (), False, 4, 64, True, True)),
    ],
)
def test_an_override_is_a_dimension(override: str, dimension: Dimension) -> None:
    assert space_of(override).dimensions == (dimension,)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a=1", "nothing to search; give a key several values"),
        ("a=interval(4,1)", "a: an interval from 4 to 1 is empty"),
        ("+a=interval(2,2)", "a: an interval from 2 to 2 is empty"),
        ("a=tag(log,interval(0,1))", "a: a logarithmic interval has ends above 0, not 0"),
        ("a=tag(log,interval(-1,1))", "ends above 0, not -1"),
        ("a=interval(0,inf)", "a: an interval has two finite ends"),
        ("a=tag(lgo,interval(1,2))", "a: the tag lgo is unknown; there is tag(log"),
        ("a=tag(log,choice(1,2))", "a: options have no scale"),
        ("a=range(4,4)", "a: has no values"),
        ("a=range(4,5,0)", "a: has no values"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        space_of(override)
    assert message in str(refused.value)


def test_an_interval_of_options_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"peft: is a group: give its options, or glob\(\*\)"):
        space_of("peft=interval(1,2)", groups=["peft"])


def test_all_faults_are_listed() -> None:
    with pytest.raises(ConfigError, match="2 faults"):
        space_of("a=interval(4,1)", "b=range(1,1)")


def test_other_overrides_are_common_and_the_last_of_a_key_counts() -> None:
    space = space_of("b=4", "a=1,2", "c=1,2", "a=7", "~d", "e=[1,'x y']", "b=5", groups=["c"])
    assert [d.key for d in space.dimensions] == ["c"]
    assert space.common == ("b=5", "a=7", "~d", "e=[1,'x y']")
    assert space.groups == ("c",)


def test_numbers_have_four_digits_and_stay_inside() -> None:
    log = Dimension("a", low=1e-5, high=1e-2, log=True)
    assert [log.text(v) for v in (0.000314159, 1e-5, 0.0099999999)] == [
        "0.0003142",
        "1e-05",
        "0.01",
    ]
    linear = Dimension("a", low=1.00001, high=3.0)
    assert [linear.text(v) for v in (1.00001, 2.34567, 3.0)] == ["1.00001", "2.346", "3.0"]
    narrow = Dimension("a", low=1e6, high=1e6 + 1e-3, log=True)
    assert narrow.low < float(narrow.text(1e6 + 5e-4)) < narrow.high


def test_a_dimension_holds_its_own_values_only() -> None:
    whole = Dimension("a", low=4, high=8, whole=True)
    assert [whole.holds(text) for text in ("4", "8", "8.0", "4.5", "9", "x")] == [True] * 3 + [
        False
    ] * 3
    assert Dimension("a", ("1", "x")).holds("x")
    assert not Dimension("a", ("1", "x")).holds("1.0")


def test_shares_reach_both_ends_of_whole_numbers() -> None:
    for log in (False, True):
        whole = Dimension("a", low=4, high=8, whole=True, log=log)
        assert {whole.at(n / 100) for n in range(100)} == {"4", "5", "6", "7", "8"}
    assert Dimension("a", ("x", "y")).at(0.999) == "y"


def test_cells_are_in_the_order_of_hydras_grid() -> None:
    cells = space_of("a=1,2", "b=int(interval(3,4))").cells()
    assert cells is not None
    assert [tuple(cell.values()) for cell in cells] == [
        ("1", "3"),
        ("1", "4"),
        ("2", "3"),
        ("2", "4"),
    ]
    assert space_of("a=1,2", "b=interval(3,4)").cells() is None
