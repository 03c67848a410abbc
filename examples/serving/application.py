# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""The processes of the server, which Ray Serve runs: replicas of models, and the one that answers HTTP."""

import argparse
import asyncio
import logging
import os
import secrets
import threading
import time
import uuid


# Read where Ray is imported: nothing is reported to its makers, a replica without a GPU keeps its environment, and Ray's ports, which
# are open to other machines and would run any code, ask for a token.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")

import ray
import torch
from batching import Batcher
from completions import CompletionRequest, RequestError
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from generators import Text, load_writer
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

from modeling_flm.trainers.batches import example_seed
from modeling_flm.trainers.commands.command_line import terminated_as_interrupted
from modeling_flm.trainers.evaluation.samples import SAMPLES_STREAM


logger = logging.getLogger("ray.serve")


# How often a request is given to another replica if the one that has it ends.
_MAX_RETRIES = 2

# A body up to this many times the limit is read and dropped first, so that the client sees the 413.
_DRAINED = 32


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


def run(args: argparse.Namespace, models: dict[str, str]):
    """Starts the processes, and answers until it is interrupted."""
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
