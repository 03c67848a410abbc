# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Texts over HTTP, in the shape of OpenAI's completions: flow-based models, and any causal language model beside them.

    python examples/serve.py examples/models/words_fmlm
    python examples/serve.py outputs/quickstart/fmlm gpt2 --replicas 2 --max_batch_size 64 --port 8080

    curl http://127.0.0.1:8000/v1/completions -d '{"model": "words_fmlm", "n": 4, "num_steps": 1, "seed": 0}'

Ray Serve runs the processes: one that answers HTTP, and `--replicas` of each model, which write the texts of concurrent requests
together. A model goes by the name of its folder, or on the Hub. docs/serving.md says more.
"""

import argparse
import asyncio
import logging
import os
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# Read where Ray is imported: nothing is reported to its makers, a replica without a GPU keeps its environment, and Ray's ports, which
# are open to other machines and would run any code, ask for a token.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")

import ray  # noqa: E402
import torch  # noqa: E402
from fastapi import FastAPI, Request  # noqa: E402
from fastapi.responses import JSONResponse, Response  # noqa: E402
from prometheus_client import (  # noqa: E402
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator  # noqa: E402
from ray import serve  # noqa: E402
from ray.exceptions import RayActorError  # noqa: E402
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError  # noqa: E402
from ray.serve.handle import DeploymentHandle  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402
from starlette.requests import ClientDisconnect  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging  # noqa: E402

from modeling_flm.configuration_flm import FLOW_MODEL_TYPES  # noqa: E402
from modeling_flm.pipeline_flm import encode_prompts  # noqa: E402
from modeling_flm.trainers.batches import example_seed  # noqa: E402
from modeling_flm.trainers.evaluation.samples import SAMPLES_STREAM  # noqa: E402
from modeling_flm.trainers.scripts import check_device, check_model, explained, terminated_as_interrupted  # noqa: E402


logger = logging.getLogger("ray.serve")

# Fields of OpenAI's that mean nothing here, and what says the same.
_ELSEWHERE = {
    "best_of": "pass `n`, and choose among the texts",
    "frequency_penalty": "leave it out: texts are not written token by token",
    "logit_bias": "leave it out",
    "logprobs": "leave it out: a flow map has no probability of each token",
    "max_completion_tokens": "pass `max_tokens`",
    "messages": "pass `prompt`: chats are not supported",
    "presence_penalty": "leave it out: texts are not written token by token",
    "stop": "leave it out: texts end with the model's end-of-sequence token, or after `max_tokens`",
    "stream": "leave it out: texts are written whole",
    "suffix": "leave it out: `prompt` is how texts begin",
    "top_p": "pass `temperature`",
    "user": "leave it out",
}

# How often a request is given to another replica if the one that has it ends.
_MAX_RETRIES = 2

# A body up to this many times the limit is read and dropped first, so that the client sees the 413.
_DRAINED = 32


class CompletionRequest(BaseModel):
    """The body of a request to `/v1/completions`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    prompt: list[str] = [""]
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    num_steps: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0.01, le=2)
    echo: bool = False
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False)

    @field_validator("prompt", mode="before")
    @classmethod
    def _as_list(cls, prompt: Any) -> list[str]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(each, str) for each in prompts):
            raise ValueError("must be a text, or a list of texts")
        return prompts


class RequestError(Exception):
    """
    What a request is answered with if it is not answered with texts.

    Args:
        status (`int`): The status of HTTP.
        message (`str`): What is wrong, and what to do.
        param (`str`, *optional*): The field that it is about.
        code (`str`, *optional*): What programs know it by.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        kind = {429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.error = {"message": message, "type": kind, "param": param, "code": code}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse({"error": self.error}, self.status, headers)

    @classmethod
    def from_validation(cls, error: ValidationError) -> "RequestError":
        """The first of the errors that pydantic found, in OpenAI's shape."""
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            return cls(400, f"The body is not JSON in UTF-8: {first['msg']}.", code="invalid_json")
        if not first["loc"]:
            return cls(400, "The body must be a JSON object.", code="invalid_json")
        param = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            known = ", ".join(f"`{name}`" for name in CompletionRequest.model_fields)
            hint = _ELSEWHERE.get(param, f"the fields are {known}")
            return cls(400, f"Unknown field `{param[:100]}`: {hint}.", param[:100], "unknown_field")
        return cls(400, f"`{param}`: {first['msg'].removeprefix('Value error, ')}.", param, "invalid_value")


@dataclass
class Text:
    """
    A text that is to be written.

    Args:
        prompt_ids (`list[int]`): The tokens that it begins with.
        length (`int`): The most tokens that it may have, with its prompt.
        seed (`int`): The seed of its noise, or of what is drawn for it.
        num_steps (`int`, *optional*): The number of steps of a flow-based model.
        temperature (`float`, *optional*): Divides the logits.
        is_abandoned (`bool`, *optional*, defaults to `False`): Whether nobody waits for it any more.
    """

    prompt_ids: list[int]
    length: int
    seed: int
    num_steps: int | None = None
    temperature: float | None = None
    is_abandoned: bool = False


class Abandoned(Exception):
    """Nobody waits for any text of a batch, which is therefore not written to its end."""


def check_wanted(texts: list[Text]):
    """Raises [`Abandoned`] if nobody waits for any of the texts."""
    if all(text.is_abandoned for text in texts):
        raise Abandoned


def stack_prompts(texts: list[Text], side: str, device: torch.device) -> dict[str, torch.LongTensor]:
    """The `input_ids` and the `attention_mask` of how texts begin, with the padding on one side."""
    rows = [torch.tensor(text.prompt_ids, dtype=torch.long, device=device) for text in texts]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_side=side),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side),
    }


class FlowWriter:
    """
    Writes texts with a flow-based model.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
    """

    takes_steps = True

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        config = model.generation_config
        self.max_length = config.length or model.config.max_position_embeddings
        self.bos_token_id, self.eos_token_id = config.bos_token_id, config.eos_token_id

    def encode(self, prompt: str) -> list[int]:
        if prompt == "":
            return []
        return encode_prompts(self.tokenizer, [prompt], self.bos_token_id)["input_ids"][0].tolist()

    def group(self, text: Text) -> tuple:
        """Texts for which this is the same can be written together."""
        own = self.model.generation_config
        # With the model's own values for what is left out, so that these texts go with those that ask for the same
        num_steps = own.num_steps if text.num_steps is None and own.timesteps is None else text.num_steps
        temperature = own.temperature if text.temperature is None else text.temperature
        return text.length, num_steps, 1 if temperature is None else temperature

    def write(self, texts: list[Text]) -> list[list[int]]:
        """The tokens of each text after its prompt. All are of one group."""
        first = texts[0]
        tokens = self.model.generate(
            num_samples=len(texts),
            num_steps=first.num_steps,
            batch_size=len(texts),
            length=first.length,
            # Of the CPU, on which every device draws the same; one for each text, which then does not depend on the others
            generator=[torch.Generator().manual_seed(text.seed) for text in texts],
            callback=lambda *progress: check_wanted(texts),
            **({} if first.temperature is None else {"temperature": first.temperature}),
            **(stack_prompts(texts, "right", self.model.device) if any(text.prompt_ids for text in texts) else {}),
        )
        return [row[len(text.prompt_ids) :] for row, text in zip(tokens.tolist(), texts)]


class DrawTokens(LogitsProcessor):
    """
    Leaves one token of each text, which is drawn, with one uniform variable from the text's own generator.

    Args:
        texts (`list[Text]`): The texts of the batch.
    """

    def __init__(self, texts: list[Text]):
        self.generators = [torch.Generator().manual_seed(text.seed) for text in texts]
        self.temperatures = torch.tensor([[text.temperature or 1.0] for text in texts])

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        uniforms = torch.stack([torch.rand(1, generator=generator) for generator in self.generators])
        cumulative = (scores.float() / self.temperatures.to(scores.device)).softmax(dim=-1).cumsum(dim=-1)
        tokens = torch.searchsorted(cumulative, uniforms.to(scores.device) * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.clamp(max=scores.shape[1] - 1), 0.0)


class StopAbandoned(StoppingCriteria):
    """Ends a batch of which nobody waits for any text."""

    def __init__(self, texts: list[Text]):
        self.texts = texts

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        check_wanted(self.texts)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class CausalWriter:
    """
    Writes texts with a causal language model and its KV cache. Takes the same arguments as [`FlowWriter`].
    """

    takes_steps = False

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        own = model.generation_config
        self.max_length = getattr(model.config, "max_position_embeddings", None) or 1024
        self.eos_token_id = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
        candidates = (tokenizer.bos_token_id, own.bos_token_id, tokenizer.eos_token_id, 0)
        self.bos_token_id = next(token for token in candidates if token is not None)

    def encode(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt)["input_ids"] or [self.bos_token_id]

    def group(self, text: Text) -> tuple:
        # Rows of one batch go on until the last one ends, beyond the model's length if their prompts are longer.
        return (text.length - len(text.prompt_ids),)

    def write(self, texts: list[Text]) -> list[list[int]]:
        prompts = stack_prompts(texts, "left", self.model.device)
        tokens = self.model.generate(
            **prompts,
            max_new_tokens=texts[0].length - len(texts[0].prompt_ids),
            do_sample=False,  # as `DrawTokens` has drawn
            num_beams=1,
            logits_processor=LogitsProcessorList([DrawTokens(texts)]),
            stopping_criteria=StoppingCriteriaList([StopAbandoned(texts)]),
            pad_token_id=self.bos_token_id,
        )
        return tokens[:, prompts["input_ids"].shape[1] :].tolist()


def load_writer(path: str, device: str, dtype: str) -> FlowWriter | CausalWriter:
    """The model with this name, or in this folder, and its tokenizer."""
    is_flow = AutoConfig.from_pretrained(path).model_type in FLOW_MODEL_TYPES
    model_class = AutoModel if is_flow else AutoModelForCausalLM
    model = model_class.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()
    return (FlowWriter if is_flow else CausalWriter)(model, AutoTokenizer.from_pretrained(path))


class Batcher:
    """
    Writes texts in batches: while one is written texts are collected, and the next one has all that go together with the text
    that has waited longest.

    Args:
        writer ([`FlowWriter`] or [`CausalWriter`]): What writes a batch.
        max_batch_size (`int`): The most texts of a batch.
        max_wait (`float`): The seconds that a text waits for others if nothing is being written.
    """

    def __init__(self, writer: FlowWriter | CausalWriter, max_batch_size: int, max_wait: float):
        self.writer, self.max_batch_size, self.max_wait = writer, max_batch_size, max_wait
        self.waiting: list[tuple[Text, asyncio.Future, float]] = []
        self.arrived = asyncio.Event()
        self.task: asyncio.Task | None = None

    async def write(self, text: Text) -> tuple[list[int] | None, int | None]:
        """The tokens of a text after its prompt, or `None` if that failed; and for the first one of a batch its size."""
        if self.task is None:
            self.task = asyncio.create_task(self._run())
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((text, future, time.monotonic()))
        self.arrived.set()
        try:
            return await future
        except asyncio.CancelledError:
            text.is_abandoned = True
            raise

    async def _run(self):
        while True:
            await self.arrived.wait()
            if len(self.waiting) < self.max_batch_size:
                await asyncio.sleep(self.waiting[0][2] + self.max_wait - time.monotonic())
            batch = self._next_batch()
            if not self.waiting:
                self.arrived.clear()
            if not batch:
                continue
            texts = [text for text, _ in batch]
            # In a thread, so that this one takes what comes meanwhile
            rows = await asyncio.to_thread(self._write, texts)
            sizes = [None if rows is None else len(texts)] + [None] * (len(texts) - 1)
            for (_, future), row, size in zip(batch, rows or [None] * len(texts), sizes):
                if not future.done():
                    future.set_result((row, size))

    def _next_batch(self) -> list[tuple[Text, asyncio.Future]]:
        """Takes it from what is waiting."""
        waiting = [row for row in self.waiting if not row[0].is_abandoned]
        batch, self.waiting = [], []
        for text, future, since in waiting:
            if len(batch) < self.max_batch_size and self.writer.group(text) == self.writer.group(waiting[0][0]):
                batch.append((text, future))
            else:
                self.waiting.append((text, future, since))
        return batch

    def _write(self, texts: list[Text]) -> list[list[int]] | None:
        try:
            return self.writer.write(texts)
        except Abandoned:
            return None
        except Exception:  # of these texts alone, such as memory that ran out
            logger.exception("A batch of %d texts failed.", len(texts))
            return None


@serve.deployment
class Model:
    """
    A replica of a model.

    Args:
        path (`str`): The name or folder of the model.
        num_threads (`int`): For torch, on the CPU.
        args (`argparse.Namespace`): The flags of the server.
    """

    def __init__(self, path: str, num_threads: int, args: argparse.Namespace):
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        logging.getLogger("modeling_flm.pipeline_flm").setLevel(logging.ERROR)  # which warns with the text of prompts
        torch.set_num_threads(num_threads)
        self.timeout = args.timeout
        self.writer = load_writer(path, args.device, args.dtype)
        self.batcher = Batcher(self.writer, args.max_batch_size, args.max_wait_ms / 1000)
        eos = self.writer.eos_token_id
        self.ends = set(eos if isinstance(eos, list) else [] if eos is None else [eos])

    async def complete(
        self,
        prompts: list[str],
        n: int,
        seed: int,
        num_steps: int | None,
        max_tokens: int | None,
        temperature: float | None,
    ) -> dict:
        """
        The texts of a request, `n` for each prompt. Errors are returned, since what is raised here reaches the caller as one of
        Ray's.

        Returns:
            `dict`: `choices`, `prompt_tokens`, `completion_tokens`, and the `batch_sizes` of the batches whose first text is one
            of these; or `error`, the arguments of a [`RequestError`].
        """
        if num_steps is not None and not self.writer.takes_steps:
            message = "`num_steps`: this model writes token by token; leave it out."
            return {"error": (400, message, "num_steps", "invalid_value")}
        max_length = self.writer.max_length
        encoded = await asyncio.to_thread(lambda: [self.writer.encode(prompt) for prompt in prompts])
        longest = max(map(len, encoded))
        if longest >= max_length:
            message = f"`prompt`: texts of this model have at most {max_length} tokens, and the prompt has {longest}."
            return {"error": (400, message, "prompt", "context_length_exceeded")}
        texts = []
        for prompt_ids in (ids for ids in encoded for _ in range(n)):
            length = max_length if max_tokens is None else min(len(prompt_ids) + max_tokens, max_length)
            # The noise of a text is that of `flm-generate`, by its number and the seed.
            own_seed = example_seed(seed, SAMPLES_STREAM, len(texts))
            texts.append(Text(prompt_ids, length, own_seed, num_steps, temperature))
        # Who asks gives up before, but may have ended, and then nobody else says that these are not wanted any more.
        written = await asyncio.wait_for(asyncio.gather(*map(self.batcher.write, texts)), self.timeout)
        if any(tokens is None for tokens, _ in written):
            return {"error": (500, "The model could not write this; the server's log says why.", None, "model_failed")}
        choices = [self._choice(text, tokens) for text, (tokens, _) in zip(texts, written)]
        return {
            "choices": choices,
            "prompt_tokens": sum(map(len, encoded)),
            "completion_tokens": sum(choice["num_tokens"] for choice in choices),
            "batch_sizes": [size for _, size in written if size is not None],
        }

    def _choice(self, text: Text, tokens: list[int]) -> dict:
        """What comes after the prompt, up to the end of the text."""
        # The BOS token that a text begins with does not end it where it is the EOS token, too, as in `generate`.
        first = int(not text.prompt_ids and self.writer.bos_token_id in self.ends)
        end = next((place for place in range(first, len(tokens)) if tokens[place] in self.ends), None)
        tokens = tokens if end is None else tokens[: end + 1]
        decode, options = self.writer.tokenizer.decode, {"skip_special_tokens": True}
        # Together, as a word's space may be lost where decoding begins with it
        prompt, whole = decode(text.prompt_ids, **options), decode(text.prompt_ids + tokens, **options)
        written = whole[len(prompt) :] if whole.startswith(prompt) else decode(tokens, **options)
        return {"text": written, "finish_reason": "length" if end is None else "stop", "num_tokens": len(tokens)}


class Metrics:
    """What `/metrics` shows. All of it is counted where HTTP is answered, from what the replicas answer."""

    def __init__(self):
        disable_created_metrics()  # when each series began
        self.registry = CollectorRegistry()
        options = {"namespace": "flm", "registry": self.registry}
        model = ["model"]
        self.requests = Counter("requests", "Answered requests", [*model, "status"], **options)
        self.retries = Counter("retries", "Requests that were given again as a replica had ended", model, **options)
        self.texts = Counter("texts", "Texts that were written", model, **options)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", model, **options)
        self.completion_tokens = Counter("completion_tokens", "Tokens that were written", model, **options)
        self.in_progress = Gauge("requests_in_progress", "Requests that wait or are written", model, **options)
        seconds = [0.005 * 2**power for power in range(15)]
        sizes = [2**power for power in range(11)]
        self.seconds = Histogram("request_seconds", "From request to answer", model, buckets=seconds, **options)
        self.batch_size = Histogram("batch_size", "Texts written together", model, buckets=sizes, **options)

    def show(self) -> Response:
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4; charset=utf-8")


@serve.deployment
@serve.ingress()
class Ingress:
    """
    Answers HTTP: checks requests, hands them to the models, and turns what goes wrong into errors in OpenAI's shape.

    Args:
        args (`argparse.Namespace`): The flags of the server.
        models (`dict[str, DeploymentHandle]`): The models by their names.
    """

    def __init__(self, args: argparse.Namespace, models: dict[str, DeploymentHandle]):
        self.args, self.models, self.metrics, self.created = args, models, Metrics(), int(time.time())

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI(openapi_url=None)
        app.post("/v1/completions")(self.complete)
        app.get("/v1/models")(self.list_models)
        app.get("/health")(self.health)
        app.get("/metrics")(self.metrics.show)

        @app.exception_handler(HTTPException)
        async def no_such_page(request: Request, error: HTTPException) -> JSONResponse:
            message = f"{request.method} {request.url.path[:100]}: {error.detail}."
            return RequestError(error.status_code, message).response()

        @app.exception_handler(Exception)
        async def unexpected(request: Request, error: Exception) -> JSONResponse:  # which Ray logs
            return RequestError(500, "The server made a mistake, which its log describes.").response()

        return app

    async def complete(self, request: Request) -> JSONResponse:
        start, model, status = time.perf_counter(), "", 499  # the status of who leaves before the answer
        try:
            asked = await self._parse(request)
            model = asked.model
            answer = await self._answer(asked)
            status = 200
            return JSONResponse(answer)
        except RequestError as error:
            status = error.status
            return error.response()
        except ClientDisconnect:
            return Response(status_code=status)  # which nobody reads
        except Exception:
            status = 500
            raise
        finally:
            self.metrics.requests.labels(model, status).inc()
            self.metrics.seconds.labels(model).observe(time.perf_counter() - start)

    async def _parse(self, request: Request) -> CompletionRequest:
        try:
            body = await asyncio.wait_for(self._read(request), self.args.timeout)
        except asyncio.TimeoutError:
            raise RequestError(408, f"The body did not arrive within {self.args.timeout:g} seconds.") from None
        except RequestError:
            raise
        except Exception as error:  # of Ray's, which says in several ways that who was sending has left
            raise ClientDisconnect from error
        try:
            asked = CompletionRequest.model_validate_json(body)
        except ValidationError as error:
            raise RequestError.from_validation(error) from None
        if asked.model not in self.models:
            message = f"There is no model {asked.model[:100]!r}, but {', '.join(self.models)}."
            raise RequestError(404, message, "model", "model_not_found")
        return asked

    async def _read(self, request: Request) -> bytes:
        """The body, of which no more is kept than is allowed."""
        limit, size, chunks = self.args.max_body_bytes, 0, []
        message = f"The body is larger than {limit:,} bytes."
        if int(request.headers.get("content-length", 0)) > _DRAINED * limit:
            raise RequestError(413, message, code="request_too_large")
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limit:
                chunks.append(chunk)
            elif size > _DRAINED * limit:
                break
        if size > limit:
            raise RequestError(413, message, code="request_too_large")
        return b"".join(chunks)

    def _check_limits(self, asked: CompletionRequest):
        num_texts, most = len(asked.prompt) * asked.n, self.args.max_texts
        if num_texts > most:
            message = f"`n`: {num_texts:,} texts are too many for a request, which may ask for {most}."
            raise RequestError(400, message, "n", "invalid_value")
        if asked.num_steps is not None and asked.num_steps > self.args.max_num_steps:
            message = f"`num_steps` may be at most {self.args.max_num_steps}, got {asked.num_steps}."
            raise RequestError(400, message, "num_steps", "invalid_value")

    async def _answer(self, asked: CompletionRequest) -> dict:
        self._check_limits(asked)
        metrics, model = self.metrics, asked.model
        seconds = min(asked.timeout or self.args.timeout, self.args.timeout)
        with metrics.in_progress.labels(model).track_inprogress():
            try:
                result = await asyncio.wait_for(self._ask(asked), seconds)
            except asyncio.TimeoutError:
                raise RequestError(
                    504, f"The texts were not written within {seconds:g} seconds.", code="timeout"
                ) from None
        if "error" in result:
            raise RequestError(*result["error"])
        num_prompt, num_written = result["prompt_tokens"], result["completion_tokens"]
        metrics.texts.labels(model).inc(len(result["choices"]))
        metrics.prompt_tokens.labels(model).inc(num_prompt)
        metrics.completion_tokens.labels(model).inc(num_written)
        for size in result["batch_sizes"]:
            metrics.batch_size.labels(model).observe(size)
        choices = []
        for index, choice in enumerate(result["choices"]):
            prompt = asked.prompt[index // asked.n] if asked.echo else ""
            text, reason = prompt + choice["text"], choice["finish_reason"]
            choices.append({"index": index, "text": text, "logprobs": None, "finish_reason": reason})
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "choices": choices,
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_written,
                "total_tokens": num_prompt + num_written,
            },
        }

    async def _ask(self, asked: CompletionRequest) -> dict:
        """What a replica answers. If it ends meanwhile another one is asked, for the same texts, as the seed is the same."""
        seed = secrets.randbelow(2**63) if asked.seed is None else asked.seed
        options = {name: getattr(asked, name) for name in ("n", "num_steps", "max_tokens", "temperature")}
        for attempt in range(_MAX_RETRIES + 1):
            if attempt:
                self.metrics.retries.labels(asked.model).inc()
                await asyncio.sleep(0.05 * 2**attempt)
            response = self.models[asked.model].complete.remote(asked.prompt, seed=seed, **options)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except BackPressureError:
                message = f"Too many requests wait for {asked.model}; try again later."
                raise RequestError(429, message, code="queue_full") from None
            except (RayActorError, ReplicaUnavailableError):
                continue
            except DeploymentUnavailableError:
                break
        raise RequestError(503, f"{asked.model} is not there now; try again later.", code="model_unavailable")

    async def list_models(self) -> dict:
        rows = [
            {"id": name, "object": "model", "created": self.created, "owned_by": "modeling-flm"}
            for name in self.models
        ]
        return {"object": "list", "data": rows}

    async def health(self) -> JSONResponse:
        """Whether each model has a replica that can write."""
        status = await asyncio.to_thread(serve.status)  # which waits for another process
        deployments = status.applications[serve.get_replica_context().app_name].deployments
        states = {name: deployments[handle.deployment_name].replica_states for name, handle in self.models.items()}
        running = {name: states[name].get("RUNNING", 0) for name in states}
        is_ready = all(running.values())
        return JSONResponse(
            {"status": "ok" if is_ready else "unavailable", "replicas": running}, 200 if is_ready else 503
        )


def find_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises a `ValueError` if it cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"`port`: cannot listen on {host}:{port} ({error}). Pass another one, or 0 for a free one."
            ) from error
        return listener.getsockname()[1]


def name_models(paths: list[str]) -> dict[str, str]:
    """The models' folders or names on the Hub, by the names that requests know them by."""
    named = {}
    for path in paths:
        check_model("`models`", path)
        name = Path(path).resolve().name if Path(path).is_dir() else path
        if name in named:
            raise ValueError(f"`models`: {named[name]} and {path} are both called {name}; rename a folder.")
        named[name] = path
        # What is wrong with a name is said here, before any process starts.
        AutoConfig.from_pretrained(path)
        AutoTokenizer.from_pretrained(path)
    return named


def build(args: argparse.Namespace, models: dict[str, str]) -> serve.Application:
    """The application: a deployment for each model, and the one that answers HTTP."""
    num_replicas = args.replicas * len(models)
    resources = {"num_cpus": 0}
    if args.device == "cuda":  # replicas share GPUs if there are not enough
        resources["num_gpus"] = 1 / max(1, -(-num_replicas // torch.cuda.device_count()))
    num_threads = max(1, (os.cpu_count() or 1) // num_replicas)
    handles = {
        name: Model.options(
            name="model-" + name.replace("/", "--").replace("#", "--"),  # which Ray does not take
            num_replicas=args.replicas,
            # Where each asks for one text, a batch that is written, and the next one
            max_ongoing_requests=2 * args.max_batch_size,
            max_queued_requests=args.max_queue,
            health_check_period_s=1,  # what has ended is soon noticed, and started again
            ray_actor_options=resources,
        ).bind(path, num_threads, args)
        for name, path in models.items()
    }
    # What waits is limited at the models, not here.
    options = {"max_ongoing_requests": 100_000, "health_check_period_s": 1, "ray_actor_options": {"num_cpus": 0}}
    return Ingress.options(**options).bind(args, handles)


def at_least(least: float, kind: Callable = int) -> Callable:
    """A type of flags: numbers that are not below the least one."""

    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a number of at least {least}, got {text}")
        return value

    return parse


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="names or folders of models")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="the port, or 0 for a free one")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--replicas", type=at_least(1), default=1, help="of each model")
    parser.add_argument("--max_batch_size", type=at_least(1), default=32, help="texts that are written together")
    parser.add_argument(
        "--max_wait_ms", type=at_least(0, float), default=5.0, help="how long a text waits for others to join it"
    )
    parser.add_argument(
        "--max_queue", type=at_least(1), default=256, help="requests that wait for a model; more get a 429"
    )
    parser.add_argument("--timeout", type=at_least(0.1, float), default=60.0, help="seconds that a request may take")
    parser.add_argument(
        "--max_texts", type=at_least(1), default=128, help="texts of a request, all its prompts together"
    )
    parser.add_argument("--max_num_steps", type=at_least(1), default=1024)
    parser.add_argument("--max_body_bytes", type=at_least(1), default=2**20)
    return parser


def main(args: argparse.Namespace):
    with explained(flags=vars(args)):
        check_device("--device", args.device)
        models = name_models(args.models)
        args.port = find_port(args.host, args.port)
    logger.setLevel(logging.WARNING)
    # A cluster of its own, whatever else runs on this machine
    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    with terminated_as_interrupted():
        try:
            serve.start(http_options={"host": args.host, "port": args.port}, logging_config=quiet)
            try:
                serve.run(build(args, models), logging_config=quiet)
            except RuntimeError as error:  # whose reasons are the last lines of the replicas' tracebacks
                deployments = serve.status().applications["default"].deployments.values()
                reasons = {each.message.splitlines()[-1] for each in deployments if each.status == "DEPLOY_FAILED"}
                raise SystemExit(f"error: {' '.join(sorted(reasons)) or error}") from None
            host = f"[{args.host}]" if ":" in args.host else args.host
            print(f"{', '.join(models)}: http://{host}:{args.port}/v1/completions (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main(make_parser().parse_args())
