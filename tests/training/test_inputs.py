"""Jobs of a pack that learn from the same rows read and tokenise them once."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf, read_write

from lora_exp import compose
from lora_exp.lockstep.pack import Pack
from lora_exp.lockstep.seat import Seat
from lora_exp.lockstep.table import Row
from lora_exp.model.loading import Base
from lora_exp.training.inputs import Inputs
from lora_exp.training.place import Alone

DAY = "2026-11-29"


def seats(count: int) -> list[Seat]:
    pack = Pack("exact", count, 0)
    return [Seat(pack, n, Row(n, "")) for n in range(count)]


def config(*overrides: str) -> DictConfig:
    return compose("tracking=none", "data.max_rows=8", "data.max_eval_rows=4", *overrides)


def test_equal_data_is_read_once_for_as_long_as_a_job_needs_it() -> None:
    first, second, third = seats(3)
    rows, shaped = Inputs(config(), first, DAY).rows()
    again = Inputs(config("peft.r=4", "train.learning_rate=1e-3"), second, DAY).rows()
    assert again[0] is rows
    assert again[1] is shaped
    assert len(Inputs(config("data.max_rows=5"), third, DAY).rows()[1].train) == 5
    first.leave()
    assert Inputs(config(), third, DAY).rows()[0] is rows
    second.leave()
    third.leave()
    assert not first.pack.shared


def test_rows_of_a_target_that_the_user_trusts_are_read_by_each_job() -> None:
    first, second = seats(2)
    cfg = config()
    with read_write(cfg):
        cfg.trusted_targets = OmegaConf.create(["mine.rows"])
    assert Inputs(cfg, first, DAY).rows()[0] is not Inputs(cfg, second, DAY).rows()[0]


def test_tokens_and_questions_are_shared_but_for_the_data_set_object(base: Base) -> None:
    first, second = seats(2)
    alone = Inputs(config(), Alone(), DAY)
    rows, shaped = alone.rows()
    expected, _ = alone.tokens(shaped, base, base.model)
    inputs = [Inputs(config("train.learning_rate=1e-3"), seat, DAY) for seat in (first, second)]
    tokens = [own.tokens(shaped, base, base.model)[0] for own in inputs]
    assert tokens[0].dataset is not tokens[1].dataset
    assert [t.dataset[:] for t in tokens] == [expected.dataset[:]] * 2
    assert {t.counts for t in tokens} == {expected.counts}
    assert tokens[0].dataset.data is tokens[1].dataset.data
    asked = [own.held_out(rows, base).questions for own in inputs]
    assert asked[0] is asked[1]
    assert asked[0] == alone.held_out(rows, base).questions
    other = Inputs(config("samples.rows=2"), second, DAY).held_out(rows, base)
    assert len(other.questions) == 2


def test_tokens_are_shared_only_where_length_and_day_are_equal(base: Base) -> None:
    first, second, third = seats(3)
    _, shaped = Inputs(config(), first, DAY).rows()
    lengths = []
    for seat, cut, day in ((first, "256", DAY), (second, "48", DAY), (third, "256", "2026-11-30")):
        own = Inputs(config(f"algorithm.args.max_length={cut}"), seat, day)
        tokens, _ = own.tokens(shaped, base, base.model)
        lengths.append(max(map(len, tokens.dataset["input_ids"])))
    assert lengths[0] == lengths[2] > 48 >= lengths[1]
    assert sum(key.startswith("[") and '"tokens"' in key for key in first.pack.shared) == 3
