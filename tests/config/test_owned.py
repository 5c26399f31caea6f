"""What a run sets itself is refused by name, with what to say instead."""

from __future__ import annotations

import pytest

from tests.config.test_validation import faults


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("+train.run_name=x", "name=<name>"),
        ("+train.project=x", "tracking.project"),
        ("+train.output_dir=x", "hydra.run.dir"),
        ("+tracking.run_id=x", "belongs to the run"),
        ("+tracking.job_type=x", "belongs to the run"),
    ],
)
def test_what_belongs_to_the_run_is_refused(override: str, said: str) -> None:
    key = override.lstrip("+").partition("=")[0]
    assert said in faults(override)[key]
