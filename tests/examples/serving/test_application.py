"""Replicas of models and the ingress, in this process."""

import asyncio
import json
import logging
import threading
import time
from pathlib import Path

import pytest
import torch
from batching import Cancelled
from completions import CompletionRequest
from small_models import build_model

from modeling_flm.trainers import train_tokenizer
from modeling_flm.trainers.batches import example_seed
from modeling_flm.trainers.evaluation.samples import SAMPLES_STREAM


pytest.importorskip("ray")
import application  # noqa: E402
import serve  # noqa: E402
from ray.exceptions import RayActorError  # noqa: E402
from ray.serve.exceptions import BackPressureError  # noqa: E402
from starlette.requests import Request  # noqa: E402


pytestmark = pytest.mark.slow

LENGTH = 16


@pytest.fixture
def make_replica():
    """Makes replicas in this process, and restores loggers and threads after the test."""
    num_threads = torch.get_num_threads()
    library = logging.getLogger("modeling_flm.pipeline_flm")
    level = library.level

    def make(folder: Path, *flags: str) -> application.Model:
        args = serve.make_parser().parse_args([str(folder), "--device", "cpu", "--max_wait_ms", "50", *flags])
        return application.Model.func_or_class(str(folder), num_threads, args)

    yield make
    torch.set_num_threads(num_threads)
    library.setLevel(level)


class TestReplica:
    def complete(self, replica: application.Model, *requests: dict) -> list[dict]:
        """Returns the answers to requests that arrive together."""

        async def send():
            bodies = [CompletionRequest(**{"model": "fmlm", "seed": 0, **request}) for request in requests]
            return await asyncio.gather(*map(replica.complete, bodies))

        return asyncio.run(send())

    def test_one_token_as_bos_and_eos(self, models, make_replica, tmp_path):
        tokenizer = models["tokenizer"]
        token = tokenizer.bos_token_id
        ends = {"bos_token_id": token, "eos_token_id": token}
        model = build_model("fmlm", vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **ends)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        (answer,) = self.complete(make_replica(tmp_path), {"n": 128, "num_steps": 1})
        generators = [torch.Generator().manual_seed(example_seed(0, SAMPLES_STREAM, index)) for index in range(128)]
        tokens = model.generate(num_samples=128, num_steps=1, generator=generators, pad_after_eos=True)
        assert (tokens[:, 0] == token).any()
        assert [choice["text"] for choice in answer["choices"]] == tokenizer.batch_decode(
            tokens, skip_special_tokens=True
        )

    def test_defaults_of_the_model_share_a_batch_with_equal_values(self, models, make_replica, tmp_path):
        model = build_model("fmlm", vocab_size=len(models["tokenizer"]), max_position_embeddings=LENGTH)
        model.generation_config.num_steps, model.generation_config.temperature = 2, 0.5
        model.save_pretrained(tmp_path)
        models["tokenizer"].save_pretrained(tmp_path)
        same = [{}, {"num_steps": 2}, {"temperature": 0.5}, {"num_steps": 2, "temperature": 0.5}]
        others = [{"num_steps": 3}, {"temperature": 1.0}]
        answers = self.complete(make_replica(tmp_path), *same, *others)
        assert [answer["batch_sizes"] for answer in answers] == [[4], [], [], [], [1], [1]]
        assert len({answer["choices"][0]["text"] for answer in answers[:4]}) == 1

    def test_prompts_of_tokens(self, models, make_replica):
        replica, tokenizer = make_replica(models["folder"] / "fmlm"), models["tokenizer"]
        tokens = replica.generator.encode("the cat")
        by_text, by_tokens, unknown = self.complete(
            replica, {"prompt": ["the cat"]}, {"prompt": [tokens]}, {"prompt": [[len(tokenizer) + 5]]}
        )
        assert by_text["choices"] == by_tokens["choices"] and by_text["usage"] == by_tokens["usage"]
        status, message, param, _ = unknown["error"]
        assert (status, param) == (400, "prompt") and f"this model has tokens 0 to {len(tokenizer) - 1}" in message

    def test_gamma_is_the_model_s_or_the_request_s(self, models, make_replica, tmp_path):
        model = build_model("fmlm", vocab_size=len(models["tokenizer"]), max_position_embeddings=LENGTH)
        model.generation_config.num_steps, model.generation_config.gamma = 4, 0.5
        model.save_pretrained(tmp_path)
        models["tokenizer"].save_pretrained(tmp_path)
        answers = self.complete(make_replica(tmp_path), {}, {"gamma": 0.5}, {"gamma": 1.0}, {"gamma": 0})
        assert [answer["batch_sizes"] for answer in answers] == [[2], [], [1], [1]]
        for answer, gamma in zip(answers, (0.5, 0.5, 1.0, 0.0)):
            generator = torch.Generator().manual_seed(example_seed(0, SAMPLES_STREAM, 0))
            tokens = model.generate(gamma=gamma, generator=generator)
            assert answer["choices"][0]["text"] == models["tokenizer"].decode(tokens[0], skip_special_tokens=True)

    def test_timestep_grid_of_the_model_is_not_a_number_of_steps(self, models, make_replica, tmp_path):
        model = build_model("fmlm", vocab_size=len(models["tokenizer"]), max_position_embeddings=LENGTH)
        model.generation_config.timestep_grid = [0.0, 0.9, 1.0]
        model.save_pretrained(tmp_path)
        models["tokenizer"].save_pretrained(tmp_path)
        answers = self.complete(make_replica(tmp_path), {}, {"num_steps": 2})
        assert [answer["batch_sizes"] for answer in answers] == [[1], [1]]

    def test_failure(self, models, make_replica, monkeypatch):
        replica = make_replica(models["folder"] / "fmlm")

        def fail(samples, callback):
            raise torch.OutOfMemoryError

        monkeypatch.setattr(replica.generator, "generate", fail)
        (answer,) = self.complete(replica, {"prompt": "the cat", "n": 2})
        assert answer["error"][0] == 500 and answer["error"][3] == "model_failed"

    def test_prompts_without_tokens(self, models, make_replica, monkeypatch):
        replica = make_replica(models["folder"] / "fmlm")
        monkeypatch.setattr(replica.generator, "tokenizer", train_tokenizer([], "text8", 27))
        (answer,) = self.complete(replica, {"prompt": ["the cat", "Hello"]})
        status, message, *names = answer["error"]
        assert (status, names) == (400, ["prompt", "invalid_value"]) and "does not know 'H'" in message

    def test_timeout_without_an_ingress(self, models, make_replica, monkeypatch):
        replica = make_replica(models["folder"] / "fmlm", "--timeout", "0.1")
        is_over = threading.Event()

        def generate(samples, callback):
            try:
                for _ in range(1000):
                    time.sleep(0.01)
                    callback()
            except Cancelled:
                is_over.set()
                raise

        monkeypatch.setattr(replica.generator, "generate", generate)
        with pytest.raises(asyncio.TimeoutError):
            self.complete(replica, {"prompt": "the cat", "n": 2})
        assert is_over.wait(60)

    def test_unknown_words_are_reported_and_prompts_not_logged(self, models, make_replica, caplog):
        replica = make_replica(models["folder"] / "fmlm")
        prompts = ["the cat", "a secret", "sat"]
        (answer,) = self.complete(replica, {"prompt": prompts, "echo": True})
        texts = [choice["text"] for choice in answer["choices"]]
        assert [text.startswith(start) for text, start in zip(texts, ["the cat", "a [UNK]", "sat"])] == [True] * 3
        assert answer["warnings"] == ["`prompt`, number 1: 1 of 3 tokens are [UNK], in place of unknown text."]
        assert "1 of 3 tokens" in caplog.text and "secret" not in caplog.text


class FailingHandle:
    """Handle of a model whose replicas fail with each request."""

    def __init__(self, error: Exception):
        self.error, self.count, self.complete = error, 0, self

    async def remote(self, request: CompletionRequest):
        self.count += 1
        raise self.error


class TestIngress:
    def send(self, body: bytes | None, error: Exception, *flags: str):
        """Sends a body, or `None` for one that never arrives; returns the response, its error, the handle and the ingress."""
        handle = FailingHandle(error)
        ingress = application.Ingress.func_or_class.__base__(
            serve.make_parser().parse_args(["fmlm", *flags]), {"fmlm": handle}
        )

        async def receive():
            if body is None:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": body, "more_body": False}

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        response = asyncio.run(ingress.complete(Request(scope, receive)))
        return response, json.loads(response.body)["error"], handle, ingress

    def test_slow_body(self):
        response, error, handle, _ = self.send(None, RayActorError(), "--timeout", "0.1")
        assert response.status_code == 408 and error["type"] == "invalid_request_error"
        assert "0.1 seconds" in error["message"] and handle.count == 0

    def test_replicas_that_die(self):
        response, error, handle, ingress = self.send(b'{"model": "fmlm"}', RayActorError())
        assert response.status_code == 503 and response.headers["Retry-After"] == "1"
        assert error["type"] == "server_error" and error["code"] == "model_unavailable"
        assert handle.count == 3
        assert b'flm_retries_total{model="fmlm"} 2.0' in ingress.metrics.show().body

    def test_full_queue(self):
        busy = BackPressureError(num_queued_requests=1, max_queued_requests=1)
        response, error, handle, _ = self.send(b'{"model": "fmlm"}', busy)
        assert response.status_code == 429 and response.headers["Retry-After"] == "1"
        assert error["code"] == "queue_full" and handle.count == 1
