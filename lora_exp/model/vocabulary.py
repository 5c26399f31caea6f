"""Whether a model has an embedding for each token that its tokenizer writes."""

from __future__ import annotations

from typing import Any


def missing_embeddings(model: Any, tokenizer: Any) -> str | None:
    """Say which tokens have no embedding; None: each has one.

    Tokens that were added to a tokenizer alone end in an index error at their first use.

    Args:
        model: with or without an adapter.
        tokenizer: the one that it is used with.
    """
    rows = len(model.get_input_embeddings().weight)
    lost = sorted((at, token) for token, at in tokenizer.get_vocab().items() if at >= rows)
    if not lost:
        return None
    names = ", ".join(repr(token) for _, token in lost[:3]) + (", ..." if lost[3:] else "")
    return f"the tokenizer has tokens without an embedding ({names}): {len(lost)} beyond {rows}"
