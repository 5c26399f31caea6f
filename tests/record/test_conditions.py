"""Conditions of a run are compared where its record has them."""

from __future__ import annotations

from lora_exp.record.conditions import condition_changes, conditions


def test_conditions_do_not_differ_from_themselves_or_from_earlier_records() -> None:
    current = conditions()
    assert condition_changes(current, current) == []
    earlier = {"versions": {"torch": current["versions"]["torch"]}}
    assert condition_changes(earlier, current) == []


def test_versions_of_batch_invariant_kernels_are_compared_where_a_run_had_them() -> None:
    assert "megatron-core" not in conditions()["versions"]
    now = conditions(batch_invariant=True)
    before = now | {"versions": now["versions"] | {"megatron-core": "0.1"}}
    (difference,) = condition_changes(before, now)
    assert difference.startswith("megatron-core 0.1 -> ")


def test_each_difference_is_named_with_both_values() -> None:
    before = {"threads": 2, "settings": {"OMP_NUM_THREADS": "2"}, "versions": {"torch": "1"}}
    now = {"threads": 1, "settings": {"MKL_CBWR": "AVX2"}, "versions": {"torch": "2", "new": "1"}}
    assert condition_changes(before, now) == [
        "threads 2 -> 1", "MKL_CBWR None -> AVX2", "OMP_NUM_THREADS 2 -> None", "torch 1 -> 2",
    ]  # fmt: skip
