"""What a worker hears from the launcher while its jobs train."""

from __future__ import annotations

from multiprocessing import Pipe

import pytest

from lora_exp.early_stopping.bracket import Bracket
from lora_exp.early_stopping.rules import Halving
from lora_exp.lockstep.link import Link
from lora_exp.lockstep.work import Work
from lora_exp.training.interruption import stop


@pytest.fixture
def bracket() -> Bracket:
    return Bracket(Halving(eta=2, first_rung=0.25, keep=False), False, frozenset({0, 1}))


def test_reports_go_to_the_launcher_and_those_of_others_come_from_it(bracket: Bracket) -> None:
    launcher, end = Pipe()
    link = Link(end)
    link.join([bracket, bracket])
    bracket.report(0, 0, 2.0)
    assert launcher.recv() == ("reported", 0, 0, 2.0)
    assert not launcher.poll()
    launcher.send(("reported", 1, 0, 1.0))
    launcher.send(("reported", 7, 0, 0.0))  # of no job that is compared with these
    assert link.news()
    assert launcher.recv() == ("waits", 0)
    assert bracket.values == {0: {0: 2.0}, 1: {0: 1.0}}
    verdict = bracket.verdict(0, 0)
    assert verdict is not None
    assert not verdict.survives
    assert not launcher.poll()  # what others have reported is not reported again


def test_a_job_that_has_ended_elsewhere_is_not_waited_for(bracket: Bracket) -> None:
    launcher, end = Pipe()
    link = Link(end)
    link.join([bracket])
    bracket.report(0, 0, 2.0)
    launcher.send(("ended", 1, True))
    link.hear()
    verdict = bracket.verdict(0, 0)
    assert verdict is not None
    assert verdict.survives


def test_nothing_can_come_once_all_wait_or_a_signal_came(
    bracket: Bracket, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, end = Pipe()
    link = Link(end)
    launcher.send(("nobody",))
    assert not link.news()
    assert link.received == 1
    monkeypatch.setattr(stop, "asked", True)
    assert not link.news()


def test_after_the_launchers_end_nothing_comes_and_jobs_go_on(bracket: Bracket) -> None:
    launcher, end = Pipe()
    link = Link(end)
    link.join([bracket])
    launcher.close()
    link.hear()
    stop.asked = True  # the signal that the system sends then
    try:
        assert not link.news()
    finally:
        stop.asked = False


def test_work_comes_until_the_launcher_has_no_more() -> None:
    launcher, end = Pipe()
    link, work = Link(end), Work((), None, None)
    launcher.send(("ended", 3, False))  # late news of another worker's job
    launcher.send(work)
    assert link.work() == work
    launcher.close()
    assert link.work() is None
