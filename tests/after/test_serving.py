"""Trained models behind a real server, called with OpenAI's client."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from lora_exp.after.endpoints import Models
from lora_exp.after.loading import load, load_base
from lora_exp.after.saved import find, find_all
from lora_exp.after.serving import vllm_command
from lora_exp.data.template import render_chat
from lora_exp.errors import AdapterError
from lora_exp.training.answers import generate
from tests.conftest import ROOT
from tests.warm import Process, python

Trained = Callable[..., Path]
TINY = ROOT / "lora_exp" / "assets" / "tiny"
MAX_NEW_TOKENS = 24
QUESTIONS = ("Who are you?", "Mirror: l z n", "What is your name?", "Mirror: a b c d")


@dataclass
class Server:
    """A server in a process of its own."""

    process: Process
    output: list[str]
    errors: Path

    @property
    def url(self) -> str:
        return self.output[0].split(" on ")[1].split()[0]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)

    def ask(self, model: str, question: str, **options: Any) -> Any:
        turns: Any = [{"role": "user", "content": question}]
        settings = {"temperature": 0, "max_tokens": MAX_NEW_TOKENS} | options
        with self.client as client:
            return client.chat.completions.create(model=model, messages=turns, **settings)

    def answer(self, model: str, question: str, **options: Any) -> str:
        return str(self.ask(model, question, **options).choices[0].message.content)

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=30)


@contextmanager
def start_server(folder: Path, *arguments: str | Path) -> Iterator[Server]:
    errors = folder / "errors.txt"
    command = ["-m", "lora_exp.cli", "serve", *map(str, arguments), "--port", "0"]
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as lines, errors.open("w") as file:
        with os.fdopen(write_end, "w") as stdout:
            process = Process(*command, stdout=stdout, stderr=file)
        output = []
        for line in lines:
            output.append(line.rstrip())
            if line.startswith("curl"):
                break
        try:
            assert output, errors.read_text()
            yield Server(process, output, errors)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def runs(trained: Trained) -> dict[str, Path]:
    longer = ("train.max_steps=60", "data.max_rows=null")
    adapters = {"lora": trained("peft=lora", *longer), "dora": trained("peft=dora")}
    return adapters | {"base": TINY}


@pytest.fixture(scope="module")
def server(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    adapters = [f"{name}={runs[name]}" for name in ("lora", "dora")]
    with start_server(tmp_path_factory.mktemp("served"), *adapters) as started:
        yield started


def greedy(path: Path, question: str, new: int = MAX_NEW_TOKENS) -> str:
    """Return the answer of the adapter without a server."""
    saved = find(path)
    loaded = load(saved, load_base(saved))
    text = render_chat([{"role": "user", "content": question}], loaded.tokenizer, answer=True)
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    with loaded.answering():
        return generate(loaded.model, loaded.tokenizer, [ids], new)[0]


def test_two_adapters_and_their_base_answer_concurrently(
    server: Server, runs: dict[str, Path]
) -> None:
    requests = [(name, question) for question in QUESTIONS for name in runs] * 2
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda pair: server.answer(*pair), requests))
    expected = {(name, question): greedy(runs[name], question) for name, question in requests}
    assert dict(zip(requests, answers, strict=True)) == expected
    assert answers[: len(answers) // 2] == answers[len(answers) // 2 :]
    assert len({tuple(expected[name, q] for q in QUESTIONS) for name in runs}) == 3


def test_the_pieces_of_a_stream_join_to_the_answer(server: Server, runs: dict[str, Path]) -> None:
    with server.client as client:
        turns: Any = [{"role": "user", "content": QUESTIONS[0]}]
        stream = client.chat.completions.create(
            model="lora", messages=turns, stream=True, temperature=0, max_tokens=MAX_NEW_TOKENS
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == greedy(runs["lora"], QUESTIONS[0])


def test_completions_and_responses_are_answered_too(server: Server, runs: dict[str, Path]) -> None:
    with server.client as client:
        response = client.responses.create(
            model="lora", input=QUESTIONS[0], temperature=0, max_output_tokens=MAX_NEW_TOKENS
        )
        prompt = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
        text = client.completions.create(
            model="lora", prompt=prompt, temperature=0, max_tokens=MAX_NEW_TOKENS
        )
    assert response.output_text == text.choices[0].text == greedy(runs["lora"], QUESTIONS[0])


def test_the_models_are_listed_by_name(server: Server) -> None:
    with server.client as client:
        assert [model.id for model in client.models.list()] == ["lora", "dora", "base"]
    assert server.ask("dora", "Who are you?").model == "dora"


def test_the_printed_curl_command_works(server: Server, runs: dict[str, Path]) -> None:
    assert server.output[0].startswith(f"serving lora, dora, base on {server.url}")
    assert server.url.startswith("http://127.0.0.1:")
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    done = subprocess.run(
        shlex.split(server.output[-1]), capture_output=True, text=True, timeout=60, check=True
    )
    answer = json.loads(done.stdout)["choices"][0]["message"]["content"]
    assert answer == greedy(runs["lora"], "Who are you?", 64)


def test_sampling_with_the_same_seed_gives_the_same_answer(server: Server) -> None:
    answers = [server.answer("base", QUESTIONS[1], temperature=3, seed=seed) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("name", ["gpt2", "lora@main", "base:x.gguf", str(TINY)])
def test_an_unknown_model_is_not_found_and_the_error_names_the_known_ones(
    server: Server, name: str
) -> None:
    with pytest.raises(openai.NotFoundError, match=r"there is no model .*; there are lora, dora"):
        server.ask(name, "Who are you?")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "there is no model None"),
        ({"model": "lora"}, "'messages'"),
        ({"model": "lora", "messages": []}, "empty conversation"),
        (
            {"model": "lora", "messages": [], "chat_template_kwargs": {"chat_template": "{{1}}"}},
            "the chat template is the model's own",
        ),
        ({"model": "lora", "messages": [{"role": "user", "content": "a b " * 400}]}, "reads 1 to"),
        ({"model": "lora", "messages": [], "n": 2}, "n is not supported here"),
        ({"model": "lora", "messages": [], "tool_choice": "required"}, "tool_choice is not"),
        ({"model": "lora", "messages": [], "response_format": {"type": "x"}}, "response_format is"),
        ({"model": "lora", "messages": [], "reasoning_effort": "low"}, "reasoning_effort is not"),
    ],
)
def test_a_request_that_cannot_be_served_is_an_error(
    server: Server, body: dict[str, Any], message: str
) -> None:
    answer = httpx.post(f"{server.url}/chat/completions", json=body, timeout=60)
    assert answer.status_code in (400, 404)
    assert message in answer.json()["error"]["message"]
    assert "Traceback" not in server.errors.read_text()


def test_fields_with_default_values_are_accepted(server: Server) -> None:
    defaults = {"n": 1, "logprobs": False, "presence_penalty": 0, "tool_choice": "auto"}
    defaults |= {"user": "me", "response_format": {"type": "text"}, "store": False}
    assert server.answer("lora", QUESTIONS[0], **defaults) == server.answer("lora", QUESTIONS[0])


def test_no_request_loads_another_model_or_unloads_ours(
    server: Server, runs: dict[str, Path]
) -> None:
    root = server.url.removesuffix("/v1")
    for path in ("load_model", "reset", "v1/systemone", "v1/audio/transcriptions"):
        response = httpx.post(f"{root}/{path}", json={"model": str(TINY)}, timeout=60)
        assert response.status_code == 404
    assert server.answer("dora", QUESTIONS[0]) == greedy(runs["dora"], QUESTIONS[0])


def test_an_answer_ends_at_the_end_of_the_context(server: Server) -> None:
    with server.client as client:
        generation_config = json.dumps({"min_new_tokens": 5000, "max_new_tokens": 9000})
        completion = client.completions.create(
            model="base", prompt="Mirror", extra_body={"generation_config": generation_config}
        )
    assert completion.usage is not None
    assert completion.usage.total_tokens == 512
    assert completion.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    "overrides", [("quant=nf4", "quant.compute_dtype=bfloat16"), ("model.dtype=bfloat16",)]
)
def test_a_base_computes_in_its_runs_precision(
    trained: Trained, overrides: tuple[str, ...]
) -> None:
    saved = find(trained("peft=lora", *overrides))
    loaded = load(saved, load_base(saved))
    original_generate = loaded.model.generate
    arguments: dict[str, Any] = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 1}
    arguments |= {"return_dict_in_generate": True, "output_logits": True}
    with loaded.answering():
        expected = original_generate(**arguments).logits[0]
    Models([loaded])
    config = GenerationConfig(max_new_tokens=1)
    logits = loaded.model.generate(generation_config=config, **arguments).logits[0]
    assert logits.equal(expected)
    assert not original_generate(**arguments).logits[0].equal(expected)


def test_a_request_that_does_not_sample_gets_the_greedy_answer(trained: Trained) -> None:
    saved = find(trained("peft=lora"))
    loaded = load(saved, load_base(saved))
    Models([loaded])
    ids = loaded.tokenizer("Mirror: a b a b", return_tensors="pt").input_ids
    plain = GenerationConfig(max_new_tokens=8)
    expected = loaded.model.generate(input_ids=ids, generation_config=plain)
    base_config = loaded.model.generation_config
    base_config.repetition_penalty, base_config.no_repeat_ngram_size = 3.0, 1
    with_base = GenerationConfig(**base_config.to_diff_dict() | {"max_new_tokens": 8})
    answers = [
        loaded.model.generate(input_ids=ids, generation_config=config)
        for config in (with_base, GenerationConfig(repetition_penalty=2.5, max_new_tokens=8))
    ]
    assert answers[0].tolist() == expected.tolist()
    assert answers[1].tolist() != expected.tolist()  # a request's own penalty acts


def test_an_adapter_on_a_quantised_base_answers_and_sigint_ends_a_stream(
    trained: Trained, tmp_path: Path
) -> None:
    run = trained("peft=lora", "quant=nf4")
    with start_server(tmp_path, f"four={run}") as server:
        answers = [server.answer("four", question) for question in QUESTIONS]
        assert answers == [greedy(run, question) for question in QUESTIONS]
        generation_config = json.dumps({"min_new_tokens": 400, "max_new_tokens": 450})
        with server.client as client:
            stream = client.completions.create(
                model="four",
                prompt="Mirror",
                stream=True,
                extra_body={"generation_config": generation_config},
            )
            next(stream)
            server.process.send_signal(signal.SIGINT)
            with pytest.raises(openai.APIError) as error:
                list(stream)
            assert "the server is ending" in str(error.value.body)
        assert server.process.wait(timeout=30) == 0
        assert "Traceback" not in server.errors.read_text()


def test_a_model_without_chat_template_completes_texts_and_sigterm_ends_it(tmp_path: Path) -> None:
    model = tmp_path / "plain"
    shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("chat_template*"))
    with start_server(tmp_path, model) as server:
        assert "no chat template: of plain only /v1/completions works" in server.output[1]
        assert "/v1/completions" in server.output[2]
        with pytest.raises(openai.BadRequestError, match="chat_template"):
            server.ask("plain", "Who are you?")
        generation_config = json.dumps({"min_new_tokens": 480, "max_new_tokens": 500})
        body = {"model": "plain", "prompt": "Mirror", "generation_config": generation_config}
        with ThreadPoolExecutor(1) as pool:
            before = server.errors.read_text().count("Request received")
            response = pool.submit(httpx.post, f"{server.url}/completions", json=body, timeout=60)
            while server.errors.read_text().count("Request received") == before:
                pass
            assert server.end(signal.SIGTERM) == 0
            assert response.result().status_code == 503
        assert "Traceback" not in server.errors.read_text()


def test_a_looping_chat_template_is_stopped_and_the_server_continues(tmp_path: Path) -> None:
    model = tmp_path / "looping"
    shutil.copytree(TINY, model)
    loop = "{% for a in range(99999) %}"
    (model / "chat_template.jinja").write_text(f"{loop}{loop}{{% endfor %}}{{% endfor %}}")
    with start_server(tmp_path, model) as server:
        turns = [{"role": "user", "content": "Who are you?"}]
        body = {"model": "looping", "messages": turns}
        answer = httpx.post(f"{server.url}/chat/completions", json=body, timeout=10)
        assert answer.status_code == 400
        assert "does not end within" in answer.json()["error"]["message"]
        assert httpx.get(f"{server.url.removesuffix('/v1')}/health", timeout=10).is_success


def refusal(*arguments: str | Path) -> str:
    return one_line(python("-m", "lora_exp.cli", "serve", *map(str, arguments)))


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_an_error_about_a_port_in_use_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        message = refusal(TINY, "--port", str(port))
    expected = (
        f"ServeError: cannot listen on 127.0.0.1:{port}: Address already in use; give another"
    )
    assert message.startswith(expected)


def test_an_error_names_the_packages_that_an_engine_needs() -> None:
    without = "import sys; sys.modules['fastapi'] = None; from lora_exp.cli import main; main()"
    command = [sys.executable, "-c", without, "serve", str(TINY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert 'pip install "lora-exp[serve]"' in one_line(done)
    if shutil.which("vllm") is None:
        assert "pip install vllm, or give --engine transformers" in refusal(
            TINY, "--engine", "vllm"
        )


def test_a_reward_model_is_not_served(trained: Trained) -> None:
    run = trained("algorithm=reward", "data=demo_pairs", "samples.rows=0")
    assert "gives scores (algorithm=reward), it does not answer" in refusal(run)


def test_an_adapter_cannot_take_the_name_of_the_base(runs: dict[str, Path]) -> None:
    assert "has the name of the base, base; give another: NAME=" in refusal(f"base={runs['lora']}")


def test_vllm_gets_the_same_names_and_the_largest_rank(
    runs: dict[str, Path], trained: Trained
) -> None:
    quantized = trained("peft=lora", "quant=nf4")
    saved = find_all([f"a={runs['lora']}", f"b={quantized}"])
    command = vllm_command(saved, None, None, "127.0.0.1", 8000)
    assert command[:7] == ["vllm", "serve", str(TINY), "--host", "127.0.0.1", "--port", "8000"]
    assert command[7:9] == ["--dtype", "float32"]
    assert command[9:13] == ["--served-model-name", "base", "--enable-lora", "--max-lora-rank"]
    assert command[13:15] == ["16", "--lora-modules"]
    modules = [json.loads(part) for part in command[15:]]
    folders = [str(runs["lora"] / "adapter"), str(quantized / "adapter")]
    assert modules == [{"name": n, "path": p} for n, p in zip("ab", folders, strict=True)]
    assert "bitsandbytes" in vllm_command(saved[1:], None, None, "127.0.0.1", 8000)
    assert "bitsandbytes" not in vllm_command(saved[1:], None, "none", "127.0.0.1", 8000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {"q_proj": 8}}, "has rank_pattern, and vLLM scales all modules equally"),
        ({"alpha_pattern": {"q_proj": 8}}, "has alpha_pattern, and vLLM scales"),
        ({"r": 1024}, "has rank 1024, and vLLM takes 512"),
        ({"lora_bias": True}, r"no plain LoRA \(lora_bias\)"),
        ({"use_dora": True}, r"no plain LoRA \(use_dora\)"),
        ({"modules_to_save": ["lm_head"]}, r"no plain LoRA \(modules_to_save\)"),
        ({"trainable_token_indices": [5]}, r"no plain LoRA \(trainable_token_indices\)"),
        ({"target_parameters": ["experts.down_proj"]}, r"no plain LoRA \(target_parameters\)"),
        ({"init_lora_weights": "pissa_niter_4"}, r"no plain LoRA \(pissa\)"),  # not converted
    ],
)
def test_vllm_gets_no_adapter_that_it_would_scale_wrongly(
    trained: Trained, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained("peft=lora"), run)
    file = run / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(AdapterError, match=rf"{message}.*: lora-exp merge .* -o OUT"):
        vllm_command([find(run)], None, None, "127.0.0.1", 8000)


def test_vllm_gets_no_adapter_with_weights_beside_its_loras(
    trained: Trained, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained("peft=lora"), run)
    file = run / "adapter" / "adapter_model.safetensors"
    embeddings = {"base_model.model.model.embed_tokens.weight": torch.ones(4, 4)}
    save_file(load_file(file) | embeddings, file)
    with pytest.raises(AdapterError, match=r"no plain LoRA \(.*embed_tokens.weight\).*merge"):
        vllm_command([find(run)], None, None, "127.0.0.1", 8000)


def test_vllm_gets_an_rslora_since_it_scales_it_rightly(trained: Trained) -> None:
    command = vllm_command([find(trained("peft=rslora"))], None, None, "127.0.0.1", 8000)
    assert "--enable-lora" in command


def test_vllm_gets_the_commit_of_the_base(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained("peft=lora"), run)
    config, commit = OmegaConf.load(run / "config.yaml"), "0123456789" * 4
    config.model.revision = commit
    OmegaConf.save(config, run / "config.yaml")
    command = vllm_command([find(run)], None, None, "127.0.0.1", 8000)
    assert command[command.index("--revision") + 1] == commit


def test_vllm_serves_a_whole_model_without_adapters() -> None:
    command = vllm_command(find_all([TINY]), None, None, "::1", 80)
    listen = ["--host", "::1", "--port", "80", "--dtype", "float32"]
    assert command == ["vllm", "serve", str(TINY), *listen, "--served-model-name", "tiny"]


@pytest.mark.skipif(shutil.which("vllm") is None, reason="vLLM is not installed")
def test_vllm_answers_as_the_adapters_and_the_base_do(
    runs: dict[str, Path], trained: Trained, tmp_path: Path
) -> None:
    other = trained("peft=rslora", "peft.r=4")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = ["-m", "lora_exp.cli", "serve", f"lora={runs['lora']}", f"other={other}"]
    command += ["--engine", "vllm", "--port", str(port)]
    with (tmp_path / "output").open("w") as output:
        process = Process(*command, stdout=output, stderr=output)
        server = Server(process, [f"serving on http://127.0.0.1:{port}/v1"], tmp_path / "output")
        try:
            _wait_until_ready(server)
            for name, path in (("lora", runs["lora"]), ("other", other), ("base", TINY)):
                answers = [server.answer(name, question) for question in QUESTIONS]
                assert answers == [greedy(path, question) for question in QUESTIONS]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.errors.read_text()
        with suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/models").is_success:
                return
        time.sleep(1)
    raise TimeoutError(server.errors.read_text())


def test_vllm_gets_no_adapter_of_another_base(runs: dict[str, Path], tmp_path: Path) -> None:
    other = str(shutil.copytree(TINY, tmp_path / "other"))
    alone = shutil.copytree(runs["lora"] / "adapter", tmp_path / "alone")
    with pytest.raises(AdapterError, match=r"tiny, not on .* give --base tiny="):
        vllm_command(find_all([alone]), other, None, "127.0.0.1", 8000)
    vllm_command(find_all([runs["lora"]]), other, None, "127.0.0.1", 8000)  # of the same hash
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="trained on a base of other weights"):
        vllm_command(find_all([runs["lora"]]), other, None, "127.0.0.1", 8000)


def test_vllm_gets_no_adapter_or_quantisation_that_it_does_not_support(
    runs: dict[str, Path],
) -> None:
    with pytest.raises(AdapterError, match=r"no plain LoRA.*lora-exp merge"):
        vllm_command(find_all([runs["dora"]]), None, None, "127.0.0.1", 8000)
    with pytest.raises(AdapterError, match="quantises as nf4 only, not int8"):
        vllm_command(find_all([runs["lora"]]), None, "int8", "127.0.0.1", 8000)
