"""Questions and answers in the columns of well-known data sets, such as Alpaca and Dolly."""

from __future__ import annotations

from dataclasses import dataclass

from lora_exp.data.turns import FieldError, Row, text_in


@dataclass(frozen=True)
class Names:
    """The columns of a question, of the texts that belong to it, and of its answer."""

    question: str
    contexts: tuple[str, ...]
    answer: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Return all of them."""
        return self.question, *self.contexts, self.answer


QUESTIONS = (
    Names("instruction", ("input", "context"), "output"),
    Names("instruction", ("input", "context"), "response"),
    Names("question", ("context",), "answer"),
    Names("question", ("context",), "response"),
    Names("query", (), "response"),
    Names("input", (), "output"),
)
ANSWERED = [{names.question, names.answer} for names in QUESTIONS]


def names_in(row: Row) -> Names:
    """Return the columns of a row's question and answer; those of Alpaca, if it has neither."""
    with_both = (names for names in QUESTIONS if names.question in row and names.answer in row)
    return next(with_both, QUESTIONS[0])


def question_in(row: Row, names: Names) -> Row:
    """Return a user's turn: a question, and the texts that belong to it.

    Raises:
        FieldError: a column is not text.
    """
    contexts = (text_in(row, name) for name in names.contexts if row.get(name))
    return {"role": "user", "content": "\n\n".join([text_in(row, names.question), *contexts])}


def asked_in(row: Row) -> list[Row] | None:
    """Return the question of a row without an answer, as a chat; None: it has no question.

    Raises:
        FieldError: a column is not text.
    """
    names = next((names for names in QUESTIONS if row.get(names.question)), None)
    return None if names is None else [question_in(row, names)]


def history_in(row: Row) -> list[Row]:
    """Return the earlier turns of a row: pairs of question and answer in the column `history`.

    Raises:
        FieldError: it is something else.
    """
    history = row.get("history") or []
    texts = [text for pair in history for text in pair] if isinstance(history, list) else [None]
    if len(texts) != 2 * len(history) or not all(isinstance(text, str) for text in texts):
        raise FieldError("field 'history' is not a list of pairs [question, answer]")
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
