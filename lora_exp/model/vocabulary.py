"""Whether a model has an embedding for each token of its tokenizer."""

from __future__ import annotations

from typing import Any


def missing_embeddings(model: Any, tokenizer: Any) -> str | None:
    """Return a text that names the tokens without an embedding; None: each has one.

    A token that was added only to the tokenizer causes an index error when it is first used.

    Args:
        model: with or without an adapter.
        tokenizer: the one that is used with it.
    """
    rows = len(model.get_input_embeddings().weight)
    vocabulary = tokenizer.get_vocab()
    missing = sorted((index, token) for token, index in vocabulary.items() if index >= rows)
    if not missing:
        return None
    names = ", ".join(repr(token) for _, token in missing[:3]) + (", ..." if missing[3:] else "")
    return f"the tokenizer has tokens without an embedding ({names}): {len(missing)} beyond {rows}"
