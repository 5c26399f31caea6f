"""Proposals depend on the settings and the earlier results, and on nothing else."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from lora_exp.search.settings import SAMPLERS
from lora_exp.search.study import _places, propose
from lora_exp.search.trial import State, Trial, best
from tests.search.spaces import presence_of, settings_of, space_of

SPACE = space_of(
    "rate=tag(log,interval(1e-5,1e-1))", "r=int(interval(4,64))", "kind=a,b", "n=range(1,9)"
)


def objective(trial: Trial) -> float:
    """Least at rate 1e-3, r 16, kind a, n 5."""
    values = trial.values
    rate, r, n = (float(values[key]) for key in ("rate", "r", "n"))
    distance = abs(math.log10(rate) + 3) + abs(math.log2(r) - 4) + abs(n - 5) / 4
    return distance + (values["kind"] == "b")


def searched(sampler: str, count: int, **values: object) -> list[Trial]:
    settings, presence = settings_of(sampler=sampler, **values), presence_of(SPACE)
    trials: list[Trial] = []
    while len(trials) < count:
        batch = propose(settings, presence, trials)
        trials += [t.ended("complete", objective(t)) for t in batch]
    return trials


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "grid"])
def test_the_same_settings_propose_the_same_other_seeds_others(sampler: str) -> None:
    trials = searched(sampler, 16)
    assert trials == searched(sampler, 16)
    assert trials != searched(sampler, 16, seed=2)
    assert len({t.cell for t in trials}) == 16
    assert all(SPACE[key].holds(text) for t in trials for key, text in t.values.items())


@pytest.mark.parametrize(
    ("sampler", "learns"),
    [("tpe", True), ("gp", True), ("nsga2", True), ("random", False), ("qmc", False)],
)
def test_a_batch_depends_on_earlier_results_where_the_sampler_learns(
    sampler: str, learns: bool
) -> None:
    settings, presence = settings_of(sampler=sampler), presence_of(SPACE)
    trials = searched(sampler, 12)
    mirrored = [Trial(t.values).ended("complete", -(t.value or 0)) for t in trials]
    batches = [propose(settings, presence, earlier) for earlier in (trials, mirrored)]
    assert (batches[0] != batches[1]) == learns


def test_a_batch_has_random_numbers_of_its_own() -> None:
    settings, presence = settings_of(sampler="random"), presence_of(SPACE)
    others = searched("random", 4, seed=9)
    assert propose(settings, presence, others)[0] != propose(settings, presence, ())[0]


def test_samplers_that_learn_find_better_than_random() -> None:
    least = {}
    for sampler, batch, seeds in (("tpe", 4, 5), ("gp", 12, 2), ("random", 4, 5)):
        values = []
        for seed in range(seeds):
            trials = searched(sampler, 48 if sampler != "gp" else 36, seed=seed, batch=batch)
            number = best(trials, "minimize")
            assert number is not None
            values.append(trials[number].value or 0.0)
        least[sampler] = sum(values) / seeds
    assert max(least["tpe"], least["gp"]) < least["random"]


def test_failed_and_pruned_trials_are_evidence_of_their_kind() -> None:
    presence, settings = presence_of(SPACE), settings_of(batch=8)
    trials = propose(settings, presence, ())
    ended = [t.ended("complete", objective(t)) for t in trials]
    failed = [ended[0].ended("failed", None), *ended[1:]]
    pruned = [t.ended("pruned", objective(t), 3) for t in trials]
    mirrored = [t.ended("pruned", -objective(t), 3) for t in trials]
    kinds = (ended, failed, pruned, mirrored)
    proposals = [propose(settings, presence, earlier) for earlier in kinds]
    assert proposals[0] != proposals[1]
    assert proposals[2] != proposals[3]


@pytest.mark.parametrize("pruned", [False, True])
def test_gp_learns_from_the_finished_trials_though_most_are_stopped_early(pruned: bool) -> None:
    settings, presence = settings_of(sampler="gp", batch=8), presence_of(SPACE)

    def ended(sign: int) -> list[Trial]:
        trials = searched("random", 16)
        return [
            t.ended("pruned", sign * objective(t), 3)
            if pruned and n % 8
            else t.ended("complete", sign * objective(t))
            for n, t in enumerate(trials)
        ]

    assert propose(settings, presence, ended(1)) != propose(settings, presence, ended(-1))


def test_gp_tries_all_of_a_small_space_without_a_fixed_order() -> None:
    presence = presence_of(space_of("a=1,2,3,4,5,6", "b=1,2,3"))
    orders = []
    for seed in (1, 2):
        settings, trials = settings_of(sampler="gp", batch=6, seed=seed), list[Trial]()
        while batch := propose(settings, presence, trials):
            trials += [t.ended("complete", float(t.values["a"])) for t in batch]
        assert len({t.cell for t in trials}) == len(trials) == 18
        orders.append([t.cell for t in trials[12:]])
    assert orders[0] != orders[1]


SEVERAL = {"eval/loss": "minimize", "parameters": "minimize"}


def of_two(trial: Trial, state: State = "complete", step: int = 0) -> Trial:
    """End a trial with a loss that falls with the rank, and the rank."""
    return trial.ended(state, objective(trial), step, {"parameters": float(trial.values["r"])})


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "random", "qmc"])
def test_several_objectives_are_searched_and_repeat(sampler: str) -> None:
    settings, presence = settings_of(sampler=sampler, objectives=SEVERAL), presence_of(SPACE)

    def trials() -> list[Trial]:
        found: list[Trial] = []
        while len(found) < 16:
            found += [of_two(t) for t in propose(settings, presence, found)]
        return found

    first = trials()
    assert first == trials()
    assert len({t.cell for t in first}) == 16
    smaller = [t.ended("complete", t.value, 0, {"parameters": -t.objectives[1]}) for t in first]
    batches = [propose(settings, presence, earlier) for earlier in (first, smaller)]
    assert (batches[0] != batches[1]) == (sampler in ("tpe", "gp", "nsga2"))


def test_a_pruned_trial_of_several_objectives_counts_by_its_step_then_by_its_first() -> None:
    settings, presence = settings_of(objectives=SEVERAL, batch=8), presence_of(SPACE)
    first, *rest = [of_two(t) for t in searched("random", 24)]
    pruned = [of_two(t, "pruned", 3) for t in rest]
    lacking = [t.ended("pruned", t.value, 3) for t in pruned]  # other values are not known
    later = [t.ended("pruned", t.value, 3 + number) for number, t in enumerate(pruned)]
    turned = [t.ended("pruned", -(t.value or 0), 3) for t in pruned]
    kinds = (pruned, lacking, later, turned)
    batches = [propose(settings, presence, [first, *kind]) for kind in kinds]
    assert batches[0] == batches[1]
    assert batches[2] != batches[0] != batches[3]


def test_places_of_pruned_trials() -> None:
    ends = [("pruned", 5.0, 3), ("complete", 9.0, 0), ("pruned", 2.0, 3), ("pruned", 9.0, 6)]
    trials = [Trial({}).ended(state, value, step) for state, value, step in ends]  # type: ignore[arg-type]
    assert _places(settings_of(objectives=SEVERAL), trials) == {3: 1, 2: 2, 0: 3}
    most = settings_of(direction="maximize", objectives={"a": "maximize", "b": "minimize"})
    assert _places(most, trials) == {3: 1, 0: 2, 2: 3}
    assert _places(settings_of(), trials) == {}


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_evidence_of_other_sweeps_changes_the_first_batch(sampler: str) -> None:
    presence, settings = presence_of(SPACE), settings_of(sampler=sampler)
    evidence = searched("random", 12)
    assert propose(settings, presence, (), evidence) != propose(settings, presence, ())


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "qmc", "nsga2"])
def test_first_guesses_come_first_and_the_rest_of_their_keys_is_proposed(sampler: str) -> None:
    start = [{"rate": "0.001", "kind": "b", "n": "3", "r": "5"}, {"r": "7"}]
    trials = propose(settings_of(sampler=sampler, start=start), presence_of(SPACE), ())
    assert trials[0].values == start[0]
    assert trials[1].values["r"] == "7"
    assert trials[1].values.keys() == trials[2].values.keys() == start[0].keys()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_small_space_is_tried_whole_and_nothing_twice(sampler: str) -> None:
    presence, settings = presence_of(space_of("a=1,2,3", "b=x,y")), settings_of(sampler=sampler)
    trials: list[Trial] = []
    while batch := propose(settings, presence, trials):
        trials += [t.ended("complete", float(len(trials))) for t in batch]
    assert len(trials) == len({t.cell for t in trials}) == 6
    if sampler == "grid":
        assert [t.values["a"] for t in trials] == ["1", "1", "2", "2", "3", "3"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_key_that_an_option_lacks_is_in_none_of_its_trials(sampler: str) -> None:
    space = space_of("peft.r=4,8", "peft=lora,ia3", groups=["peft"])
    presence = presence_of(space, {"lora": {"peft": {"r": 1}}, "ia3": {"peft": {}}})
    settings = settings_of(sampler=sampler, batch=2)
    first = [t.ended("complete", 1.0) for t in propose(settings, presence, ())]
    trials = [*first, *propose(settings, presence, first)]
    cells = {tuple(t.values.values()) for t in trials}
    assert cells == {("4", "lora"), ("8", "lora"), ("ia3",)}


def test_nothing_imports_torch() -> None:
    code = (
        "import sys\n"
        "from lora_exp.search import cells, evidence, journal, page, sizes\n"
        "from lora_exp.search.study import propose\n"
        "from tests.search.spaces import *\n"
        "for sampler in ('tpe', 'gp'):\n"
        "    settings, space = settings_of(sampler=sampler), space_of('a=interval(1,2)')\n"
        "    assert len(propose(settings, presence_of(space), ())) == settings.batch\n"
        "assert 'optuna' in sys.modules and not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
