"""What answers requests: transformers' own server, over models that are loaded already.

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
from lora_exp.training.answers import room

# of transformers' own the others load models, throw them away, or read sound
KEPT = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/health")
# transformers passes over many fields without a word: these may be, others if they ask for nothing
HARMLESS = {"user", "metadata", "store", "service_tier", "stream_options", "parallel_tool_calls"}
NOTHING = {
    "n": 1, "best_of": 1, "echo": False, "logprobs": False, "top_logprobs": 0,
    "presence_penalty": 0, "response_format": {"type": "text"}, "tool_choice": "auto",
    "text": {"format": {"type": "text"}}, "truncation": "disabled", "background": False,
    "modalities": ["text"],
}  # fmt: skip
# what a request makes of its own fields, or a chat template of its turns
UNUSABLE = (ValueError, TypeError, LookupError, AttributeError, TemplateError)


class Models(ModelManager):  # type: ignore[misc]
    """The models that were loaded, by name; no request loads another."""

    def __init__(self, served: Sequence[Loaded]) -> None:
        super().__init__()
        self.served = {loaded.name: loaded for loaded in served}
        self.since = int(time.time())
        self.ending = False
        for loaded in served:
            loaded.model.generation_config.eos_token_id = end_tokens(loaded.model, loaded.tokenizer)
            loaded.model.generate = self._generate(loaded)
            # on the event loop, which is the main thread: a template that loops would hold all
            loaded.tokenizer.apply_chat_template = in_time()(loaded.tokenizer.apply_chat_template)

    def load_model_and_processor(self, name: Any, **_: Any) -> tuple[Any, Any]:
        """Return a model and its tokenizer.

        Raises:
            HTTPException: 404, there is none of that name.
        """
        if name not in self.served:
            known = ", ".join(self.served)
            raise HTTPException(404, f"there is no model {name!r}; there are {known}")
        return self.served[name].model, self.served[name].tokenizer

    def get_gen_models(self) -> list[dict[str, Any]]:
        """Return what GET /v1/models lists."""
        told = {"object": "model", "created": self.since, "owned_by": "lora-exp"}
        return [{"id": name, **told} for name in self.served]

    def _generate(self, loaded: Loaded) -> Callable[..., Any]:
        """Return a model's generate, as its run computed, within its context and our lifetime."""
        generate, until = loaded.model.generate, StoppingCriteriaList([_Ending(self)])
        context = room(loaded.model, 0)

        def answer(input_ids: Tensor, generation_config: Any, **asked: Any) -> Any:
            tokens = input_ids.shape[1]
            if not 0 < tokens < context:
                text = f"the prompt has {tokens} tokens; {loaded.name} reads 1 to {context - 1}"
                raise HTTPException(400, text)
            new = generation_config.max_new_tokens or context
            generation_config.max_new_tokens = min(new, context - tokens)
            asked |= {"input_ids": input_ids, "generation_config": generation_config}
            with loaded.answering():
                return generate(**asked, stopping_criteria=until)

        return answer


class _Ending(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, models: Models) -> None:
        self.models = models

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor, **_: Any) -> Tensor:
        if self.models.ending:
            raise HTTPException(503, "the server is ending")
        return torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)


class _Handler:
    """What our endpoints do otherwise than transformers'."""

    model_manager: Models
    _unused_fields: set[str]

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        if "chat_template" in (body.get("chat_template_kwargs") or {}):
            raise HTTPException(400, "the chat template is the model's own")
        for key in sorted(body.keys() & self._unused_fields - HARMLESS):
            if body[key] not in (None, [], NOTHING.get(key)):
                raise HTTPException(400, f"{key} is not supported here; leave it out")
        body.setdefault("stream", False)  # transformers streams responses that nobody asked it to
        name = body.get("model")
        return str(name), *self.model_manager.load_model_and_processor(name)

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = super()._build_generation_config(body, *args, **kwargs)  # type: ignore[misc]
        temperature = body.get("temperature")
        if temperature:  # transformers heeds it only for models that sample anyway
            config.do_sample = True
        elif temperature is not None:
            config.temperature = config.top_p = config.top_k = None  # it would warn of them
        return config


class _Chat(_Handler, ChatCompletionHandler):  # type: ignore[misc]
    pass


class _Completion(_Handler, CompletionHandler):  # type: ignore[misc]
    pass


class _Response(_Handler, ResponseHandler):  # type: ignore[misc]
    pass


def app(models: Models) -> FastAPI:
    """Return transformers' app with our models behind it."""
    state = GenerationState()  # a thread for each model
    handlers = [kind(models, state) for kind in (_Chat, _Completion, _Response)]
    made: FastAPI = build_server(models, *handlers, None, None, state)
    made.router.routes[:] = [r for r in made.routes if isinstance(r, APIRoute) and r.path in KEPT]
    for kind in (HTTPException, *UNUSABLE):
        made.add_exception_handler(kind, _refusal)
    return made


def _refusal(_: Request, error: Exception) -> JSONResponse:
    """Tell an error in OpenAI's words."""
    if isinstance(error, HTTPException):
        code, text = error.status_code, error.detail
    else:
        code, text = 400, f"{type(error).__name__}: {error}"
    return JSONResponse({"error": {"message": text, "code": code}}, code)


class Server(uvicorn.Server):
    """Serves models until SIGINT or SIGTERM, and says when it listens."""

    def __init__(self, models: Models, ready: Callable[[], None]) -> None:
        super().__init__(uvicorn.Config(app(models), log_config=None, log_level="warning"))
        self.models, self.ready = models, ready

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self.ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End at a signal; uvicorn's own would send it again once all has ended well."""
        heard = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop at a signal: answers under way are refused, not waited for."""
        self.models.ending = True
        super().handle_exit(sig, frame)
