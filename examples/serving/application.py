# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Processes of the server, run by Ray Serve: replicas of models, and an ingress that answers HTTP requests."""

import argparse
import asyncio
import logging
import os
import secrets
import threading
import time
import uuid


# Ray reads these when it is imported. It shall send no usage statistics, leave the environment of replicas without a GPU as it is, and
# require a token on its own ports, which other machines can reach and which execute any code.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")

import ray
import torch
from batching import Batcher
from completions import CompletionRequest, RequestError
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from generators import SampleRequest, load_generator, split_sample
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers.utils import logging as transformers_logging

from modeling_flm.tokenization_flm import count_unknown_tokens
from modeling_flm.trainers.commands.command_line import terminated_as_interrupted
from modeling_flm.trainers.evaluation.samples import sample_generators


logger = logging.getLogger("ray.serve")

# How often a request is passed to another replica when its replica dies
_MAX_RETRIES = 2

# Bodies up to this many times the limit are read to their end and discarded, so that clients receive the 413.
_DRAINED = 32


@serve.deployment
class Model:
    """
    Replica of a model.

    Args:
        path (`str`): Name or folder of the model.
        num_threads (`int`): Number of torch threads on the CPU.
        args (`argparse.Namespace`): Flags of the server.
    """

    def __init__(self, path: str, num_threads: int, args: argparse.Namespace):
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        logging.getLogger("modeling_flm.pipeline_flm").setLevel(logging.ERROR)  # its warnings contain prompts
        torch.set_num_threads(num_threads)
        self.timeout = args.timeout
        self.generator = load_generator(path, args.device, args.dtype)
        self.batcher = Batcher(self.generator, args.max_batch_size, args.max_wait_ms / 1000)

    async def complete(self, request: CompletionRequest) -> dict:
        """
        Generates the samples of a request with a seed. Errors are returned, because Ray wraps and logs exceptions.

        Returns:
            `dict`: `choices`, `usage` and `warnings` of the response, and `batch_sizes` (of each batch whose first sample belongs
            to this request); or `error`, the arguments of a [`RequestError`].
        """
        for name in ("num_steps", "gamma"):
            if getattr(request, name) is not None and not self.generator.has_steps:
                message = f"`{name}`: this model generates token by token; leave it out."
                return {"error": (400, message, name, "invalid_value")}
        try:
            prompts = await asyncio.to_thread(lambda: [self._encode(prompt) for prompt in request.prompt])
        except ValueError as error:  # text or tokens that the tokenizer does not know
            return {"error": (400, str(error), "prompt", "invalid_value")}
        longest, max_length = max(map(len, prompts)), self.generator.max_length
        if longest >= max_length:
            message = (
                f"`prompt` has {longest} tokens, but this model has at most {max_length} tokens, with the prompt."
            )
            return {"error": (400, message, "prompt", "context_length_exceeded")}
        samples = []
        for index, generator in enumerate(sample_generators(request.seed, range(len(prompts) * request.n))):
            prompt = prompts[index // request.n]
            length = max_length if request.max_tokens is None else min(len(prompt) + request.max_tokens, max_length)
            options = request.num_steps, request.temperature, request.gamma
            samples.append(SampleRequest(prompt, length, generator, *options))
        # The ingress stops waiting earlier; this timeout cancels the samples if the ingress has died.
        results = await asyncio.wait_for(asyncio.gather(*map(self.batcher.generate, samples)), self.timeout)
        rows = [tokens for tokens, _ in results]
        if None in rows:
            return {"error": (500, "The model failed to generate. See the server log.", None, "model_failed")}
        num_prompt_tokens, num_new_tokens = sum(map(len, prompts)), sum(map(len, rows))
        return {
            "choices": [self._choice(index, *pair, request.echo) for index, pair in enumerate(zip(samples, rows))],
            "usage": {
                "prompt_tokens": num_prompt_tokens,
                "completion_tokens": num_new_tokens,
                "total_tokens": num_prompt_tokens + num_new_tokens,
            },
            "batch_sizes": [size for _, size in results if size is not None],
            "warnings": self._warnings(prompts),
        }

    def _encode(self, prompt: str | list[int]) -> list[int]:
        """Returns the tokens of a prompt. A prompt of tokens is taken as it is."""
        if isinstance(prompt, str):
            return self.generator.encode(prompt)
        vocab_size = self.generator.model.config.vocab_size
        if unknown := [token for token in prompt if not 0 <= token < vocab_size]:
            raise ValueError(f"`prompt` has the token {unknown[0]}, but this model has tokens 0 to {vocab_size - 1}.")
        return prompt

    def _warnings(self, prompts: list[list[int]]) -> list[str]:
        """Returns and logs a warning for each prompt with unknown words. Logs do not contain prompts."""
        tokenizer, warnings = self.generator.tokenizer, []
        for index, tokens in enumerate(prompts):
            if count := count_unknown_tokens(tokenizer, [tokens]):
                unknown = f"{count} of {len(tokens)} tokens are {tokenizer.unk_token}, in place of unknown text"
                warnings.append(f"`prompt`, number {index}: {unknown}.")
                logger.warning("Prompt %d of a request: %s.", index, unknown)
        return warnings

    def _choice(self, index: int, sample: SampleRequest, tokens: list[int], echo: bool) -> dict:
        prompt, text = split_sample(self.generator.tokenizer, sample.prompt_ids, tokens)
        is_finished = tokens[-1] in self.generator.eos_token_ids
        return {
            "index": index,
            "text": prompt + text if echo else text,
            "logprobs": None,
            "finish_reason": "stop" if is_finished else "length",
        }


class Metrics:
    """Metrics of all processes, counted in the ingress from the responses of the replicas."""

    def __init__(self):
        disable_created_metrics()  # the start times of the series
        self.registry = CollectorRegistry()
        options = {"namespace": "flm", "registry": self.registry}
        model = ["model"]
        self.requests = Counter("requests", "Answered requests", [*model, "status"], **options)
        self.retries = Counter("retries", "Requests passed to another replica after theirs died", model, **options)
        self.texts = Counter("texts", "Generated samples", model, **options)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", model, **options)
        self.completion_tokens = Counter("completion_tokens", "Generated tokens", model, **options)
        self.in_progress = Gauge("requests_in_progress", "Requests waiting or being generated", model, **options)
        seconds = [0.005 * 2**power for power in range(15)]
        sizes = [2**power for power in range(11)]
        self.seconds = Histogram("request_seconds", "Time to the response", model, buckets=seconds, **options)
        self.batch_size = Histogram("batch_size", "Samples in a batch", model, buckets=sizes, **options)

    def show(self) -> Response:
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4; charset=utf-8")


@serve.deployment
@serve.ingress()
class Ingress:
    """
    HTTP application: checks requests, passes them to the models, and turns failures into errors in OpenAI's format.

    Args:
        args (`argparse.Namespace`): Flags of the server.
        models (`dict[str, DeploymentHandle]`): Models by name.
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
        async def http_error(request: Request, error: HTTPException) -> JSONResponse:
            message = f"{request.method} {request.url.path[:100]}: {error.detail}."
            return RequestError(error.status_code, message).response()

        @app.exception_handler(Exception)
        async def internal_error(request: Request, error: Exception) -> JSONResponse:  # Ray logs the error
            return RequestError(500, "Internal server error. See the server log.").response()

        return app

    async def complete(self, request: Request) -> Response:
        start, model, status = time.perf_counter(), "", 499  # the status if the client disconnects
        try:
            completion = await self._parse(request)
            model = completion.model
            answer = await self._answer(completion)
            status = 200
            return JSONResponse(answer)
        except RequestError as error:
            status = error.status
            return error.response()
        except ClientDisconnect:
            return Response(status_code=status)
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
        except Exception as error:  # Ray has several for a client that disconnects
            raise ClientDisconnect from error
        try:
            completion = CompletionRequest.model_validate_json(body)
        except ValidationError as error:
            raise RequestError.from_validation(error) from None
        if completion.model not in self.models:
            message = f"Model {completion.model[:100]!r} does not exist. Available models: {', '.join(self.models)}."
            raise RequestError(404, message, "model", "model_not_found")
        return completion

    async def _read(self, request: Request) -> bytes:
        """Reads the body, and keeps no more of it than is allowed."""
        limit, size, chunks = self.args.max_body_bytes, 0, []
        error = RequestError(413, f"The body is larger than {limit:,} bytes.", code="request_too_large")
        if int(request.headers.get("content-length", 0)) > _DRAINED * limit:
            raise error
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limit:
                chunks.append(chunk)
            elif size > _DRAINED * limit:
                break
        if size > limit:
            raise error
        return b"".join(chunks)

    def _check_limits(self, completion: CompletionRequest):
        num_samples, max_samples = len(completion.prompt) * completion.n, self.args.max_texts
        if num_samples > max_samples:
            message = (
                f"`n`: the request asks for {num_samples:,} samples in all, but at most {max_samples} are allowed."
            )
            raise RequestError(400, message, "n", "invalid_value")
        if completion.num_steps is not None and completion.num_steps > self.args.max_num_steps:
            message = f"`num_steps` must be at most {self.args.max_num_steps}, got {completion.num_steps}."
            raise RequestError(400, message, "num_steps", "invalid_value")

    async def _answer(self, completion: CompletionRequest) -> dict:
        self._check_limits(completion)
        metrics, model = self.metrics, completion.model
        seconds = min(completion.timeout or self.args.timeout, self.args.timeout)
        with metrics.in_progress.labels(model).track_inprogress():
            try:
                result = await asyncio.wait_for(self._call_model(completion), seconds)
            except asyncio.TimeoutError:
                message = f"The samples were not generated within {seconds:g} seconds."
                raise RequestError(504, message, code="timeout") from None
        if "error" in result:
            raise RequestError(*result["error"])
        choices, usage = result["choices"], result["usage"]
        metrics.texts.labels(model).inc(len(choices))
        metrics.prompt_tokens.labels(model).inc(usage["prompt_tokens"])
        metrics.completion_tokens.labels(model).inc(usage["completion_tokens"])
        for size in result["batch_sizes"]:
            metrics.batch_size.labels(model).observe(size)
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "choices": choices,
            "usage": usage,
            "warnings": result["warnings"],
        }

    async def _call_model(self, completion: CompletionRequest) -> dict:
        """Passes a request to a replica, and to another one if that dies: with the same seed, hence for the same samples."""
        if completion.seed is None:
            completion = completion.model_copy(update={"seed": secrets.randbelow(2**63)})
        for attempt in range(_MAX_RETRIES + 1):
            if attempt:
                self.metrics.retries.labels(completion.model).inc()
                await asyncio.sleep(0.05 * 2**attempt)
            response = self.models[completion.model].complete.remote(completion)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except BackPressureError:
                message = f"Too many requests are waiting for model {completion.model}. Try again later."
                raise RequestError(429, message, code="queue_full") from None
            except (RayActorError, ReplicaUnavailableError):
                continue
            except DeploymentUnavailableError:
                break
        message = f"Model {completion.model} is unavailable. Try again later."
        raise RequestError(503, message, code="model_unavailable")

    async def list_models(self) -> dict:
        model = {"object": "model", "created": self.created, "owned_by": "modeling-flm"}
        return {"object": "list", "data": [{"id": name, **model} for name in self.models]}

    async def health(self) -> JSONResponse:
        """Reports how many replicas of each model are running."""
        status = await asyncio.to_thread(serve.status)  # which waits for another process
        deployments = status.applications[serve.get_replica_context().app_name].deployments
        states = {name: deployments[handle.deployment_name].replica_states for name, handle in self.models.items()}
        running = {name: states[name].get("RUNNING", 0) for name in states}
        is_ready = all(running.values())
        content = {"status": "ok" if is_ready else "unavailable", "replicas": running}
        return JSONResponse(content, 200 if is_ready else 503)


def build(args: argparse.Namespace, models: dict[str, str]) -> serve.Application:
    """Builds the application: a deployment for each model, and the ingress."""
    num_replicas = args.replicas * len(models)
    resources = {"num_cpus": 0}
    if args.device == "cuda":  # replicas share GPUs if there are too few
        resources["num_gpus"] = 1 / max(1, -(-num_replicas // torch.cuda.device_count()))
    num_threads = max(1, (os.cpu_count() or 1) // num_replicas)
    handles = {
        name: Model.options(
            name="model-" + name.replace("/", "--").replace("#", "--"),  # Ray refuses these characters
            num_replicas=args.replicas,
            max_ongoing_requests=2 * args.max_batch_size,  # the batch being generated, and the next one
            max_queued_requests=args.max_queue,
            health_check_period_s=1,  # soon replaces replicas that die
            ray_actor_options=resources,
        ).bind(path, num_threads, args)
        for name, path in models.items()
    }
    # Queues are limited at the models, so the ingress takes all requests.
    options = {"max_ongoing_requests": 100_000, "health_check_period_s": 1, "ray_actor_options": {"num_cpus": 0}}
    return Ingress.options(**options).bind(args, handles)


def run(args: argparse.Namespace, models: dict[str, str]):
    """Runs the server until it is interrupted."""
    logger.setLevel(logging.WARNING)
    # A cluster of its own, whatever else runs on this machine
    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    with terminated_as_interrupted():
        try:
            serve.start(http_options={"host": args.host, "port": args.port}, logging_config=quiet)
            try:
                serve.run(build(args, models), logging_config=quiet)
            except RuntimeError as error:  # the last lines of the replicas' tracebacks have the reasons
                deployments = serve.status().applications["default"].deployments.values()
                reasons = {each.message.splitlines()[-1] for each in deployments if each.status == "DEPLOY_FAILED"}
                raise SystemExit(f"error: {' '.join(sorted(reasons)) or error}") from None
            host = f"[{args.host}]" if ":" in args.host else args.host
            print(f"{', '.join(models)}: http://{host}:{args.port}/v1/completions (Ctrl-C to stop)", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            ray.shutdown()
