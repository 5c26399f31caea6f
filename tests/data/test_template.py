"""Chat templates are untrusted code: their time is limited, their output and form are fixed."""

from __future__ import annotations

import copy
import signal
import time
from datetime import date
from typing import Any

import pytest

from lora_exp.data.examples import prompts
from lora_exp.data.template import (
    Form,
    form_of,
    in_time,
    prepare,
    render_chat,
    template_file,
    turn_end,
)
from lora_exp.data.tokens import tokenise
from lora_exp.errors import ConfigError, DataError
from tests.data.test_encoding import chat, trained_text
from tests.model.test_special_tokens import plain_tokenizer


def test_a_template_that_does_not_end_is_stopped(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_exp.data.template.SECONDS", 0.5)
    tokenizer = copy.deepcopy(base.tokenizer)
    loop = "{% for i in range(99999) %}"
    tokenizer.chat_template = 3 * loop + "{{ i }}" + 3 * "{% endfor %}"
    start, handler = time.process_time(), signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(ConfigError, match=r"the chat template does not end within 0\.5 s"):
        trained_text(chat("q", "a"), tokenizer)
    rows = [{"prompt": chat("q")["messages"], "answer": "a"}]
    with pytest.raises(ConfigError, match=r"the chat template does not end within 0\.5 s"):
        prompts(rows, tokenizer, 99, "train")  # for trainers that render rows themselves
    assert time.process_time() - start < 4
    assert signal.getsignal(signal.SIGVTALRM) == handler
    assert trained_text(chat("q", "a"), base.tokenizer)  # and others are rendered again


def test_a_template_that_waits_for_the_processor_is_not_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lora_exp.data.template.SECONDS", 0.05)
    with in_time():
        time.sleep(0.3)
    with pytest.raises(ConfigError, match=r"within 0.05 s"), in_time():
        all(i >= 0 for i in range(10**10))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_alarm_whose_error_is_lost_is_followed_by_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Slow:
        def __del__(self) -> None:  # Python ignores errors in here
            while True:
                pass

    monkeypatch.setattr("lora_exp.data.template.SECONDS", 0.1)
    end = time.monotonic() + 30

    @in_time()
    def render() -> None:
        Slow()
        while time.monotonic() < end:
            pass

    with pytest.raises(ConfigError, match="does not end within"):
        render()
    assert time.monotonic() < end


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "03 Feb 2025"),
        ('{% set d = strftime_now( "%Y-%m-%d" ) %}<{{ d }}>', "<2025-02-03>"),
        ("{% if strftime_now is defined %}{{ strftime_now('%b') }}{% endif %}", "Feb"),
    ],
)
def test_a_template_that_prints_the_date_gets_the_date_of_the_run(
    base: Any, template: str, text: str
) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    prepare(tokenizer, template, date(2025, 2, 3))
    assert render_chat(chat("q")["messages"], tokenizer) == text
    assert tokenizer.chat_template == template  # the template to save is unchanged


@pytest.mark.parametrize("end", ["<|im_end|>", "</s>"])
def test_the_shipped_chatml_ends_an_answer_with_one_token(base: Any, end: str) -> None:
    tokenizer = copy.deepcopy(base.tokenizer) if end == "<|im_end|>" else plain_tokenizer([])
    tokenizer.eos_token, tokenizer.chat_template = end, None
    with pytest.raises(DataError, match=r"no chat template; give data\.chat_template=chatml or"):
        prompts([{"prompt": chat("q")["messages"], "answer": "a"}], tokenizer, 99, "train")
    prepare(tokenizer, template_file("chatml").read_text(), date(2025, 2, 3))
    turns = [*chat("q", "a")["messages"], {"role": "user", "content": "r"}]
    start = "<|im_start|>"
    assert render_chat(turns, tokenizer, answer=True) == (
        f"{start}user\nq{end}\n{start}assistant\na{end}\n{start}user\nr{end}\n{start}assistant\n"
    )
    assert turn_end(tokenizer) == end


def test_another_date_is_another_cache_entry(base: Any) -> None:
    rows, body = [chat("q", "on what day?")], "{% for m in messages %}{{ m.content }}{% endfor %}"
    cached = []
    for day in (3, 3, 4):
        tokenizer = copy.deepcopy(base.tokenizer)
        prepare(tokenizer, "{{ strftime_now('%d') }}" + body, date(2025, 2, day))
        tokens = tokenise(rows, tokenizer, max_length=64, completion_only=False, what="train")
        cached.append(tokens.cached)
    assert cached == [False, True, False]


def test_a_date_that_cannot_be_fixed_is_refused(base: Any) -> None:
    template = "{% set form = '%Y' %}{{ strftime_now(form) }}"
    with pytest.raises(ConfigError, match="writes today's date in a form that it computes"):
        prepare(copy.deepcopy(base.tokenizer), template, date(2025, 2, 3))


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ messages[0].content }}", Form()),
        ("{% for p in messages[0].content %}{{ p.text }}{% endfor %}", Form(parts=True)),
        ("{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
         "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}", Form()),
        ("{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
         "{{ '' + c.function.arguments }}{% endfor %}{% endfor %}", Form(arguments_as_text=True)),
        ("{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
         "{{ c.function.arguments }}{% endfor %}{% endfor %}", Form(arguments_as_text=True)),
    ],
)  # fmt: skip
def test_turns_are_given_in_the_form_that_the_template_takes(
    base: Any, template: str, form: Form
) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = template
    assert form_of(tokenizer) == form


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (None, "<|im_end|>"),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}", None),
        ("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}", "<|im_start|>"),
    ],
)
def test_the_token_that_ends_a_turn_is_derived_from_the_template(
    base: Any, template: str | None, end: str | None
) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = template or tokenizer.chat_template
    assert turn_end(tokenizer) == end


def test_an_error_of_a_template_is_an_error_of_the_row(base: Any) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = "{{ messages[0].content | int / 0 }}"
    with pytest.raises(DataError, match=r"the chat template refuses it: .*division"):
        render_chat(chat("1")["messages"], tokenizer)
