"""A row's text, the spans of its answers, and its prompt."""

from __future__ import annotations

import copy
import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import trl
from jinja2 import TemplateError

from lora_exp.data.encoding import IGNORED, encode
from lora_exp.data.rendered import Prompt, prompt_of, rendered
from lora_exp.data.template import render_chat, to_form
from lora_exp.errors import DataError
from tests.data.test_encoding import chat

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOKEN = r"<[\[|\uff5c][^<>]{1,30}[\]|\uff5c]>|<(?:start|end)_of_turn>|<turn\|>|</?s>|\[/?INST\]"
CALL = {"name": "add", "arguments": {"a": 2, "b": 3}}
CALL_TURN = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "id": "call_1234", "function": CALL}]}  # fmt: skip
RESULT_TURN = {"role": "tool", "content": "5", "name": "add", "tool_call_id": "call_1234"}
TOOLS = [
    *chat("2+3?")["messages"],
    CALL_TURN,
    RESULT_TURN,
    *chat("ok?", "It is 5.")["messages"][1:],
]
CHATS = {
    "one": chat("q1", "one")["messages"],
    "several": chat("q1", "one", "q2", "two words", "q3", "three")["messages"],
    "system": [{"role": "system", "content": "be brief"}, *chat("q", "one", "q", "2")["messages"]],
    "thoughts": chat("q", "<think>\nhm\n</think>\n\none", "r", "<think>\nso\n</think>\n\ntwo")[
        "messages"
    ],
    "tools": [*TOOLS, *chat("thanks", "welcome")["messages"]],
}


def with_template(base: Any, template: str) -> Any:
    tokenizer = copy.deepcopy(base.tokenizer)
    tokens = sorted({*re.findall(TOKEN, template)})
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = template
    return tokenizer


def test_spans_are_the_answers_with_their_end_tokens(base: Any) -> None:
    text, spans = rendered(chat("one", "two", "three", "four"), base.tokenizer)
    assert [text[start:end] for start, end in spans] == ["two<|im_end|>\n", "four<|im_end|>\n"]
    text, spans = rendered({"prompt": "Q: a", "completion": " b"}, base.tokenizer)
    assert [text[start:end] for start, end in spans] == [" b" + base.tokenizer.eos_token]
    text, spans = rendered({"text": "whole"}, base.tokenizer)
    assert spans == [(0, len(text))]


def test_a_prompt_ends_where_the_answer_begins_and_text_has_none(base: Any) -> None:
    text = "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of(chat("Hi!", "Yes."), base.tokenizer) == Prompt(text, "Yes.\n", chat=True)
    row = {"prompt": "p", "completion": "c"}
    assert prompt_of(row, base.tokenizer) == Prompt("p", "c", chat=False)
    assert prompt_of({"text": "t"}, base.tokenizer) is None


# their training templates omit the space after an end token, count the end of a tool's result
# (DeepSeek-V3), or omit the turn that answers it (Gemma)
DIFFERENT_MASKS = {"llava_next", "deepseekv3", "diffusion_gemma"}
NAMES = sorted(path.name.removesuffix("_training.jinja") for path in TEMPLATES.glob("*_training*"))


@pytest.mark.parametrize("name", sorted({*NAMES} - DIFFERENT_MASKS))
def test_masks_equal_those_of_trls_training_templates(base: Any, name: str) -> None:
    """Except for the text of the generation prompt, which the model never writes."""
    tokenizer = with_template(base, (TEMPLATES / f"{name}_training.jinja").read_text())
    compared = 0
    for turns in CHATS.values():
        try:
            trl_rows = tokenizer.apply_chat_template(
                to_form(turns, tokenizer), return_dict=True, return_assistant_tokens_mask=True
            )
        except (TemplateError, TypeError):  # the template does not support such turns
            continue
        (encoded_row,) = encode([{"messages": turns}], tokenizer, completion_only=True)
        if isinstance(encoded_row, DataError):
            assert "does not show assistant turn" in str(encoded_row)
            continue
        ids, labels = encoded_row
        assert ids == trl_rows["input_ids"]
        counted = [label != IGNORED for label in labels]
        prompt = render_chat(turns[:-1], tokenizer)
        generation_prompt = render_chat(turns[:-1], tokenizer, answer=True).removeprefix(prompt)
        pairs = zip(ids, counted, trl_rows["assistant_masks"], strict=True)
        for (our_label, trl_label), run in groupby(pairs, lambda pair: (pair[1], bool(pair[2]))):
            text = tokenizer.decode([pair[0] for pair in run])
            assert our_label == trl_label or (trl_label and text in generation_prompt), text
        compared += 1
    assert compared > 1


@pytest.mark.parametrize("name", ["glm4moe", "qwen3", "nemotron_3_nano", "deepseek_r1_distill"])
def test_answers_have_spans_although_a_template_drops_thoughts(base: Any, name: str) -> None:
    tokenizer = with_template(base, (TEMPLATES / f"{name}.jinja").read_text())
    text, spans = rendered({"messages": CHATS["thoughts"]}, tokenizer)
    answers = [text[a:b] for a, b in spans]
    assert ["one" in answers[0], "two" in answers[1]] == [True, True]
    assert not any(prompt in "".join(answers) for prompt in ("user\n", "q\n", "r\n"))


def test_a_turn_of_weight_0_does_not_count(base: Any) -> None:
    row = chat("one", "two", "three", "four")
    row["messages"][1]["weight"] = 0
    text, spans = rendered(row, base.tokenizer)
    assert [text[a:b] for a, b in spans] == ["four<|im_end|>\n"]
    assert "two<|im_end|>" in text


def test_without_an_end_token_the_next_turns_first_token_ends_an_answer(base: Any) -> None:
    tokenizer = with_template(base, (TEMPLATES / "glm4moe.jinja").read_text())
    text, spans = rendered(chat("one", "two", "three", "four"), tokenizer)
    assert [text[a:b][-8:] for a, b in spans] == ["<|user|>"] * 2
    assert text.endswith("four<|user|>")


def test_an_answer_has_its_span_although_the_system_prompt_moves(base: Any) -> None:
    mistral = (
        "{{ bos_token }}{% set ns = namespace(last=0) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{% if loop.index == ns.last and "
        "messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}{{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    tokenizer = with_template(base, mistral)
    text, spans = rendered({"messages": CHATS["system"]}, tokenizer)
    assert text == "<|endoftext|>[INST]q[/INST]one</s>[INST]be brief q[/INST]2</s>"
    assert [text[a:b] for a, b in spans] == ["one</s>", "2</s>"]


HERMES = (  # ends a tool's result otherwise if nothing follows it
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>tool\n<tool_response>\n"
    "{{ m.content }}\n</tool_response>{{ '' if loop.last else '\n' }}<|im_end|>"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_opening_of_a_turn_does_not_count_although_the_text_before_it_changes(
    base: Any,
) -> None:
    tokenizer = with_template(base, HERMES)
    text, spans = rendered({"messages": CHATS["tools"]}, tokenizer)
    call = f"<tool_call>{json.dumps(CALL)}</tool_call><|im_end|>\n"
    answers = [call, "It is 5.<|im_end|>\n", "welcome<|im_end|>\n"]
    assert [text[a:b] for a, b in spans] == answers
    assert "</tool_response>\n<|im_end|><|im_start|>assistant\nIt is 5." in text


@pytest.mark.parametrize(
    ("shown", "turn"),
    [
        ("m.tool_calls[:1]", {"content": "", "tool_calls": [{"function": CALL}] * 2}),
        ("[]", {"content": "I add 2 and 3", "tool_calls": [{"function": CALL}]}),
        ("m.tool_calls", {"content": "add", "tool_calls": [{"function": CALL}]}),
    ],
    ids=["the first call", "the text", "the calls"],
)
def test_a_part_of_a_turn_that_another_part_seems_to_show_is_an_error(
    base: Any, shown: str, turn: dict[str, Any]
) -> None:
    text = "" if shown == "m.tool_calls" else "{{ m.content }}"
    tokenizer = with_template(
        base,
        f"{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{% if m.tool_calls %}}{text}"
        f"{{% for c in {shown} %}}{{{{ c.function | tojson }}}}{{% endfor %}}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    turns = [*chat("2+3?")["messages"], {"role": "assistant"} | turn]
    with pytest.raises(DataError, match="does not show assistant turn 1"):
        rendered({"messages": turns}, tokenizer)


def test_a_call_that_the_template_does_not_show_is_an_error(base: Any) -> None:
    tokenizer = with_template(base, (TEMPLATES / "llama3.jinja").read_text())
    with pytest.raises(DataError, match=r"does not show assistant turn 1: .*call_1234"):
        rendered({"messages": CHATS["tools"]}, tokenizer)
