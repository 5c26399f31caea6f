"""The endpoints: transformers' own server, with models that are already loaded.

Importing this needs fastapi, uvicorn and openai.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from lora_exp.after.loading import Loaded
from lora_exp.data.template import in_time
from lora_exp.model.special_tokens import end_tokens
from lora_exp.training.answers import GREEDY, room

# transformers' other endpoints load models, unload them, or transcribe audio
PATHS = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/health")
# transformers silently ignores many fields: these may be ignored, others only with a value that
# changes nothing
HARMLESS = {"user", "metadata", "store", "service_tier", "stream_options", "parallel_tool_calls"}
NEUTRAL = {
    "n": 1, "best_of": 1, "echo": False, "logprobs": False, "top_logprobs": 0,
    "presence_penalty": 0, "response_format": {"type": "text"}, "tool_choice": "auto",
    "text": {"format": {"type": "text"}}, "truncation": "disabled", "background": False,
    "modalities": ["text"],
}  # fmt: skip
# errors that the fields of a request cause, or its turns in the chat template
REQUEST_ERRORS = (ValueError, TypeError, LookupError, AttributeError, TemplateError)


class Models(ModelManager):  # type: ignore[misc]
    """The loaded models, by name; a request cannot load another one."""

    def __init__(self, models: Sequence[Loaded]) -> None:
        super().__init__()
        self.loaded = {loaded.name: loaded for loaded in models}
        self.created = int(time.time())
        self.ending = False
        for loaded in models:
            loaded.model.generation_config.eos_token_id = end_tokens(loaded.model, loaded.tokenizer)
            loaded.model.generate = self._generate(loaded)
            # templates run on the event loop, so an endless one would block all requests
            loaded.tokenizer.apply_chat_template = in_time()(loaded.tokenizer.apply_chat_template)

    def load_model_and_processor(self, name: Any, **_: Any) -> tuple[Any, Any]:
        """Return a model and its tokenizer.

        Raises:
            HTTPException: 404, there is no model of that name.
        """
        if name not in self.loaded:
            names = ", ".join(self.loaded)
            raise HTTPException(404, f"there is no model {name!r}; there are {names}")
        return self.loaded[name].model, self.loaded[name].tokenizer

    def get_gen_models(self) -> list[dict[str, Any]]:
        """Return what GET /v1/models lists."""
        shared = {"object": "model", "created": self.created, "owned_by": "lora-exp"}
        return [{"id": name, **shared} for name in self.loaded]

    def _generate(self, loaded: Loaded) -> Callable[..., Any]:
        """Return a model's generate that keeps to its context, and ends when the server does."""
        generate, stopping = loaded.model.generate, StoppingCriteriaList([_ServerEnds(self)])
        context = room(loaded.model, 0)

        def answer(input_ids: Tensor, generation_config: Any, **options: Any) -> Any:
            tokens = input_ids.shape[1]
            if not 0 < tokens < context:
                text = f"the prompt has {tokens} tokens; {loaded.name} reads 1 to {context - 1}"
                raise HTTPException(400, text)
            max_new_tokens = generation_config.max_new_tokens or context
            generation_config.max_new_tokens = min(max_new_tokens, context - tokens)
            if not generation_config.do_sample:
                _make_greedy(generation_config, loaded.model.generation_config)
            options |= {"input_ids": input_ids, "generation_config": generation_config}
            with loaded.answering():
                return generate(**options, stopping_criteria=stopping)

        return answer


def _make_greedy(config: Any, base_config: Any) -> None:
    """Undo the base's penalties, beams and bans; those that a request asks for stay."""
    for key, neutral in GREEDY.items():
        if getattr(config, key, None) == getattr(base_config, key, None):
            setattr(config, key, neutral)


class _ServerEnds(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, models: Models) -> None:
        self.models = models

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor, **_: Any) -> Tensor:
        if self.models.ending:
            raise HTTPException(503, "the server is ending")
        return torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)


class _Handler:
    """The differences between our endpoints and those of transformers."""

    model_manager: Models
    _unused_fields: set[str]

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        if "chat_template" in (body.get("chat_template_kwargs") or {}):
            raise HTTPException(400, "the chat template is the model's own")
        for key in sorted(body.keys() & self._unused_fields - HARMLESS):
            if body[key] not in (None, [], NEUTRAL.get(key)):
                raise HTTPException(400, f"{key} is not supported here; leave it out")
        body.setdefault("stream", False)  # transformers streams responses by default
        name = body.get("model")
        return str(name), *self.model_manager.load_model_and_processor(name)

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = super()._build_generation_config(body, *args, **kwargs)  # type: ignore[misc]
        temperature = body.get("temperature")
        if temperature:  # transformers ignores it for models that do not sample
            config.do_sample = True
        elif temperature is not None:
            config.temperature = config.top_p = config.top_k = None  # or it warns about them
        return config


class _Chat(_Handler, ChatCompletionHandler):  # type: ignore[misc]
    pass


class _Completion(_Handler, CompletionHandler):  # type: ignore[misc]
    pass


class _Response(_Handler, ResponseHandler):  # type: ignore[misc]
    pass


def app(models: Models) -> FastAPI:
    """Return transformers' app, with our models and endpoints."""
    state = GenerationState()  # a thread for each model
    handlers = [handler(models, state) for handler in (_Chat, _Completion, _Response)]
    server: FastAPI = build_server(models, *handlers, None, None, state)
    routes = [r for r in server.routes if isinstance(r, APIRoute) and r.path in PATHS]
    server.router.routes[:] = routes
    for error_type in (HTTPException, *REQUEST_ERRORS):
        server.add_exception_handler(error_type, _error_response)
    return server


def _error_response(_: Request, error: Exception) -> JSONResponse:
    """Return an error in OpenAI's format."""
    if isinstance(error, HTTPException):
        code, text = error.status_code, error.detail
    else:
        code, text = 400, f"{type(error).__name__}: {error}"
    return JSONResponse({"error": {"message": text, "code": code}}, code)


class Server(uvicorn.Server):
    """Serves models until SIGINT or SIGTERM, and reports when it listens."""

    def __init__(self, models: Models, ready: Callable[[], None]) -> None:
        super().__init__(uvicorn.Config(app(models), log_config=None, log_level="warning"))
        self.models, self.ready = models, ready

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and report it."""
        await super().startup(sockets)
        self.ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End at a signal; uvicorn would raise it again after it has shut down."""
        signals = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop at a signal, without waiting for the answers in progress."""
        self.models.ending = True
        super().handle_exit(sig, frame)
