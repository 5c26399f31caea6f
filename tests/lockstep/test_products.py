"""Which segments share a product, from the classes of their numbers of rows."""

from __future__ import annotations

import itertools

import pytest

from lora_exp.lockstep.products import APART, MAX_FILLING, Group, group, on_grid

# as measured on a processor with AMX in bfloat16: (from this number of rows on, this class)
AMX = {
    "512 to 192": [(1, "0"), (37, "1"), (192, "0")],
    "192 to 512 backward": [(1, "0"), (40, "1"), (41, "0"), (43, "1"), (45, "0"), (46, "1"),
                            (49, "0"), (71, "1"), (72, "0"), (76, "1"), (77, "0")],
    "576 to 576": [(1, "0"), (33, "1"), (617, "0")],
}  # fmt: skip


def class_of(bands: list[tuple[int, str]], rows: int) -> str:
    return [name for lower_bound, name in bands if lower_bound <= rows][-1]


def singles(groups: tuple[Group, ...]) -> list[int]:
    return [g.members[0] for g in groups if len(g.members) == 1]


def test_segments_in_the_class_of_their_total_are_one_product() -> None:
    assert group((5, 7), 12, lambda _: "a") == (Group((0, 1), 12),)


def test_a_pass_that_is_filled_up_keeps_its_filling() -> None:
    assert group((5, 7), 16, lambda rows: "b" if rows == 12 else "a") == (Group((0, 1), 16),)


def test_a_single_segment_is_its_own_product() -> None:
    assert group((5,), 5, lambda _: None) == (Group((0,), 5, own_shape=True),)


def test_a_segment_without_a_class_is_computed_alone() -> None:
    groups = group((13, 16, 16), 45, lambda rows: "a" if rows % 4 == 0 else None)
    assert groups == (Group((0,), 13, own_shape=True), Group((1, 2), 32))


def test_padding_is_left_out_in_the_class_that_the_rows_have_with_it() -> None:
    bands = [(1, "few"), (37, "a"), (192, "many")]
    groups = group((20, 30), 56, lambda rows: class_of(bands, rows), own_sizes=(60, 70))
    assert groups == (Group((0, 1), 56),)
    (alone,) = group((20,), 40, lambda rows: class_of(bands, rows), own_sizes=(60,))
    assert alone == Group((0,), 40)
    (alone,) = group((20,), 20, lambda rows: class_of(bands, rows), own_sizes=(60,))
    assert alone == Group((0,), 60, own_shape=True)


def test_padding_stays_where_rows_depend_on_each_other() -> None:
    assert group((20, 30), 56, lambda _: None, own_sizes=(60, 70)) == ()


def test_segments_whose_bits_depend_on_places_are_computed_as_alone_also_without_padding() -> None:
    def odd(rows: int) -> str:
        return "a" if rows % 8 == 0 else APART

    expected = Group((0,), 13, own_shape=True), Group((1, 2), 32)
    assert group((13, 16, 16), 48, odd) == expected
    assert group((5, 16, 10), 32, odd, own_sizes=(13, 24, 32)) == expected
    assert group((5, 5), 10, odd, own_sizes=(10, 10)) == (
        Group((0,), 10, own_shape=True),
        Group((1,), 10, own_shape=True),
    )


def test_two_classes_are_two_products() -> None:
    groups = group((8, 40, 8, 40), 96, lambda rows: "few" if rows < 32 else "many")
    assert groups == (Group((0, 2), 16), Group((1, 3), 80))


def test_a_pass_is_split_where_its_total_would_leave_the_band() -> None:
    bands = AMX["512 to 192"]
    groups = group((80, 80, 80, 80), 320, lambda rows: class_of(bands, rows))
    assert [g.members for g in groups] == [(0, 1), (2, 3)]


def test_different_sizes_are_grouped_into_the_fewest_products() -> None:
    bands = [(1, "few"), (37, "a"), (192, "many")]
    groups = group((60, 60, 112, 124), 356, lambda rows: class_of(bands, rows))
    assert [len(g.members) for g in groups] == [2, 2]


def test_a_product_is_filled_up_to_the_class_of_its_members_within_a_limit() -> None:
    bands = AMX["512 to 192"]
    groups = group((30,) * 6, 180, lambda rows: class_of(bands, rows))
    assert groups == (Group(tuple(range(6)), 192),)
    groups = group(
        (30,) * 4, 120, lambda rows: class_of(bands, rows)
    )  # 192 rows would exceed the limit
    assert singles(groups) == [0, 1, 2, 3]


@pytest.mark.parametrize("bands", AMX.values(), ids=AMX)
def test_every_segment_is_computed_once_and_only_in_its_class(bands: list[tuple[int, str]]) -> None:
    for sizes in itertools.product((1, 20, 36, 40, 47, 90, 300, 700), repeat=3):
        groups = group(sizes, sum(sizes), lambda rows: class_of(bands, rows))
        assert sorted(i for g in groups for i in g.members) == [0, 1, 2]
        for g in groups:
            assert {class_of(bands, sizes[i]) for i in g.members} == {class_of(bands, g.rows)}
            needed = sum(sizes[i] for i in g.members)
            assert needed <= g.rows <= max(needed * MAX_FILLING, on_grid(needed))


def test_a_grid_has_few_numbers_and_wastes_little() -> None:
    numbers = [on_grid(rows) for rows in range(1, 2049)]
    assert len(set(numbers)) == 128
    assert numbers == sorted(numbers)
    assert all(n >= rows for rows, n in enumerate(numbers, 1))
    assert max(n / rows for rows, n in enumerate(numbers, 1) if rows > 256) < 1.04
