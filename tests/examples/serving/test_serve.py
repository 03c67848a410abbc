"""The HTTP server of the examples, and its load test: one server with two replicas of two small models, and what is sent to it."""

import asyncio
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from places import BENCHMARKS
from small_models import build_model
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from modeling_flm.trainers import train_tokenizer
from modeling_flm.trainers.batches import example_seed
from modeling_flm.trainers.evaluation.samples import SAMPLES_STREAM


grpc = pytest.importorskip("grpc")
pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")
sys.path.insert(0, str(BENCHMARKS))
import serve  # noqa: E402
import serving  # noqa: E402
from ray.exceptions import RayActorError  # noqa: E402
from ray.serve.exceptions import BackPressureError  # noqa: E402
from starlette.requests import Request  # noqa: E402


pytestmark = pytest.mark.slow

LENGTH = 16
MANY_STEPS = 1500  # which take a second or more
MAX_BATCH_SIZE, MAX_QUEUE, REPLICAS = 4, 12, 2
CAPACITY = REPLICAS * 2 * MAX_BATCH_SIZE + MAX_QUEUE
FLAGS = ["--replicas", REPLICAS, "--max_batch_size", MAX_BATCH_SIZE, "--max_queue", MAX_QUEUE, "--max_wait_ms", 20]
FLAGS += ["--max_texts", 16, "--max_num_steps", MANY_STEPS, "--max_body_bytes", 100_000, "--timeout", 100]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A flow map and a GPT-2 with random weights, the same tokenizer, and their folders."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["the cat sat on a mat and saw dogs run far away by day or night"], "word", 40)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    fmlm = build_model("fmlm", vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **ends)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=LENGTH, **sizes, **ends)).eval()
    for name, model in {"fmlm": fmlm, "gpt2": gpt2}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {"fmlm": fmlm, "gpt2": gpt2, "tokenizer": tokenizer, "folder": folder}


class Server(serving.Server):
    """A server, and what is asked of it."""

    def complete(self, **fields) -> tuple[int, dict]:
        status, text, _ = self.send("POST", "/v1/completions", json.dumps({"model": "fmlm", **fields}))
        return status, json.loads(text)

    def texts(self, **fields) -> list[str]:
        status, answer = self.complete(**fields)
        assert status == 200, answer
        return [choice["text"] for choice in answer["choices"]]

    def metric(self, name: str, labels: str = 'model="fmlm"') -> float:
        return super().metric(name, labels)

    def processes(self, name: str = "") -> list[psutil.Process]:
        """Its processes with this in their command lines."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in processes if name in " ".join(process.cmdline())]

    def replicas(self) -> list[psutil.Process]:
        return self.processes("ServeReplica:default:model-fmlm")


def wait_for(condition: Callable[[], bool]):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def server(models):
    with Server([models["folder"] / "fmlm", models["folder"] / "gpt2", *FLAGS]) as server:
        yield server
        processes = server.processes()
    left = psutil.wait_procs(processes, timeout=20)[1]
    for process in left:
        process.kill()
    assert left == []  # when the server has ended


def generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(example_seed(seed, SAMPLES_STREAM, index))


def flow_text(models, prompt: str, seed: int, index: int, num_steps: int) -> str:
    """What the flow map writes by itself in this process, with its prompt."""
    tokenizer, model = models["tokenizer"], models["fmlm"]
    known = {}
    if prompt:
        known["input_ids"] = torch.tensor([tokenizer.encode(tokenizer.bos_token + prompt, add_special_tokens=False)])
    tokens = model.generate(
        num_samples=1, num_steps=num_steps, generator=generator(seed, index), pad_after_eos=True, **known
    )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


@torch.no_grad()
def causal_text(models, prompt: str, seed: int, index: int, temperature: float = 1.0) -> str:
    """What GPT-2 writes, token by token and without a cache: the token at which the probabilities add up to a uniform variable."""
    tokenizer, model, source = models["tokenizer"], models["gpt2"], generator(seed, index)
    tokens = tokenizer.encode(prompt) or [tokenizer.bos_token_id]
    while len(tokens) < LENGTH and (tokens[-1] != tokenizer.eos_token_id):
        probabilities = (model(torch.tensor([tokens])).logits[0, -1] / temperature).softmax(dim=-1)
        uniform = torch.rand(1, generator=source).item()
        sums = itertools.accumulate(probabilities.tolist())
        tokens.append(next(token for token, total in enumerate(sums) if total > uniform))
    return tokenizer.decode(tokens, skip_special_tokens=True)


class TestAnswers:
    def test_shape(self, server):
        status, answer = server.complete(prompt="the cat", n=2, seed=0, num_steps=2, max_tokens=5)
        assert status == 200
        assert answer["object"] == "text_completion" and answer["model"] == "fmlm" and answer["id"].startswith("cmpl-")
        assert abs(answer["created"] - time.time()) < 60
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        for choice in answer["choices"]:
            assert choice.keys() == {"index", "text", "logprobs", "finish_reason"}
            assert choice["finish_reason"] in ("stop", "length") and choice["logprobs"] is None
            assert len(choice["text"].split()) <= 5
        usage = answer["usage"]
        assert usage["prompt_tokens"] == 3  # with what begins texts
        assert 2 <= usage["completion_tokens"] <= 10
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]

    def test_finish_reason(self, server):
        for model in ("fmlm", "gpt2"):
            _, answer = server.complete(model=model, n=16, seed=1, **({"num_steps": 1} if model == "fmlm" else {}))
            reasons = {choice["finish_reason"] for choice in answer["choices"]}
            assert reasons == {"stop", "length"}
            _, short = server.complete(model=model, n=16, seed=1, max_tokens=1)
            assert short["usage"]["completion_tokens"] == 16

    @pytest.mark.parametrize("num_steps", [1, 4])
    def test_texts_are_those_of_generate(self, num_steps, server, models):
        prompts = ["the cat", "", "dogs run far away"]
        texts = server.texts(prompt=prompts, n=2, seed=7, num_steps=num_steps, echo=True)
        expected = [flow_text(models, prompts[index // 2], 7, index, num_steps) for index in range(6)]
        assert texts == expected and len(set(texts)) == 6
        without = server.texts(prompt=prompts, n=2, seed=7, num_steps=num_steps)
        assert [prompts[index // 2] + text for index, text in enumerate(without)] == texts

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_texts_of_gpt2(self, temperature, server, models):
        prompts = ["the cat", "dogs run far away", "mat"]
        texts = server.texts(model="gpt2", prompt=prompts, n=2, seed=7, temperature=temperature, echo=True)
        assert texts == [causal_text(models, prompts[index // 2], 7, index, temperature) for index in range(6)]

    def test_seed_is_random_by_default(self, server):
        assert server.texts(n=4) != server.texts(n=4)

    def test_same_seed_same_text_under_load(self, server):
        requests = []
        for index in range(20):
            prompt = ["", "the cat", "dogs run far away", "a mat"][index % 4]
            request = {"prompt": prompt, "seed": index, "n": 1 + index % 3}
            if index % 2:
                requests.append({**request, "model": "gpt2", "temperature": 0.5 + index / 20})
            else:
                requests.append({**request, "num_steps": 1 + index % 3, "max_tokens": 8 + index % 5})
        alone = [server.texts(**request) for request in requests]
        with ThreadPoolExecutor(20) as pool:
            for _ in range(3):
                assert list(pool.map(lambda request: server.texts(**request), requests)) == alone

    def test_batches_form(self, server):
        def count():
            return server.metric("batch_size_sum"), server.metric("batch_size_count")

        with ThreadPoolExecutor(16) as pool:
            texts, batches = count()
            list(pool.map(lambda seed: server.texts(seed=seed, num_steps=20), range(48)))
            more_texts, more_batches = count()
        assert more_texts - texts == 48
        assert 48 / MAX_BATCH_SIZE <= more_batches - batches < 24


class TestPages:
    def test_health(self, server):
        status, text, _ = server.send("GET", "/health")
        assert (status, json.loads(text)) == (200, {"status": "ok", "replicas": {"fmlm": REPLICAS, "gpt2": REPLICAS}})

    def test_models(self, server):
        status, text, _ = server.send("GET", "/v1/models")
        answer = json.loads(text)
        assert status == 200 and answer["object"] == "list"
        assert [(row["id"], row["object"]) for row in answer["data"]] == [("fmlm", "model"), ("gpt2", "model")]

    def test_metrics(self, server):
        names = ["requests_total", "texts_total", "prompt_tokens_total", "completion_tokens_total"]
        names += ["request_seconds_count", "batch_size_sum"]

        def read() -> dict[str, float]:
            return {name: server.metric(name, 'model="fmlm".*') for name in names}

        server.texts()
        before = read()
        _, answer = server.complete(prompt="the cat", n=3)
        after = read()
        tokens = answer["usage"]
        assert [after[name] - before[name] for name in names] == [1, 3, 3, tokens["completion_tokens"], 1, 3]
        status, text, headers = server.send("GET", "/metrics")
        assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
        assert 'flm_requests_in_progress{model="fmlm"} 0.0' in text


# What is wrong, the status, the field that the error is about, and what its message says
BAD_BODIES = {
    "broken JSON": (b'{"model": "fmlm", "n": ', 400, None, "JSON"),
    "no JSON at all": (b"hello", 400, None, "JSON"),
    "nothing": (b"", 400, None, "JSON"),
    "a list": (b"[1, 2]", 400, None, "object"),
    "invalid UTF-8": (b'{"model": "fmlm", "prompt": "\xff\xfe"}', 400, None, "UTF-8"),
    "half a surrogate pair": (b'{"model": "fmlm", "prompt": "\\ud800"}', 400, None, "JSON"),
    "deep nesting": (b'{"model": ' + b"[" * 50_000, 400, None, "JSON"),
    "200 KB": (b'{"model": "fmlm", "prompt": "' + b"a " * 100_000 + b'"}', 413, None, "100,000 bytes"),
    "10 MB": (b'{"model": "fmlm", "prompt": "' + b"a " * 5_000_000 + b'"}', 413, None, "100,000 bytes"),
    "no model": ({"model": None}, 400, "model", "string"),
    "unknown model": ({"model": "fmlm-large"}, 404, "model", "fmlm, gpt2"),
    "a model that is a path": ({"model": "../../etc/passwd"}, 404, "model", "fmlm, gpt2"),
    "negative n": ({"n": -1}, 400, "n", "greater than or equal to 1"),
    "no texts": ({"n": 0}, 400, "n", "greater than or equal to 1"),
    "n as a text": ({"n": "2"}, 400, "n", "integer"),
    "n that is half a text": ({"n": 1.5}, 400, "n", "integer"),
    "huge n": ({"n": 10**9}, 400, "n", "16"),
    "more digits than numbers have": (b'{"model": "fmlm", "n": ' + b"9" * 5000 + b"}", 400, None, "JSON"),
    "too many prompts": ({"prompt": ["the"] * 17}, 400, "n", "16"),
    "no prompts": ({"prompt": []}, 400, "prompt", "list of texts"),
    "a prompt of tokens": ({"prompt": [1, 2]}, 400, "prompt", "list of texts"),
    "a long prompt": ({"prompt": "the cat " * 20}, 400, "prompt", "at most 16 tokens"),
    "a long prompt for GPT-2": ({"model": "gpt2", "prompt": "the cat " * 20}, 400, "prompt", "at most 16 tokens"),
    "negative seed": ({"seed": -1}, 400, "seed", "greater than or equal to 0"),
    "huge seed": ({"seed": 2**70}, 400, "seed", ""),
    "too many steps": ({"num_steps": MANY_STEPS + 1}, 400, "num_steps", str(MANY_STEPS)),
    "steps for GPT-2": ({"model": "gpt2", "num_steps": 4}, 400, "num_steps", "leave it out"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    "temperature 0": ({"temperature": 0}, 400, "temperature", "greater than or equal to"),
    "infinite temperature": (b'{"model": "fmlm", "temperature": Infinity}', 400, None, ""),
    "timeout that is over": ({"timeout": -1}, 400, "timeout", "greater than 0"),
    "unknown field": ({"num_step": 4}, 400, "num_step", "`num_steps`"),
    "a field of OpenAI's": ({"stream": True}, 400, "stream", "written whole"),
    "a field of chats": ({"messages": []}, 400, "messages", "`prompt`"),
}


class TestBadInput:
    @pytest.mark.parametrize("name", BAD_BODIES)
    def test_body(self, name, server):
        body, status, param, message = BAD_BODIES[name]
        body = body if isinstance(body, bytes) else json.dumps({"model": "fmlm", **body})
        got, text, _ = server.send("POST", "/v1/completions", body)
        error = json.loads(text)["error"]
        assert got == status, error
        assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        if param is not None:
            assert error["param"] == param
        assert message in error["message"] and "Traceback" not in text and len(text) < 1000
        assert len(server.texts(num_steps=1)) == 1

    @pytest.mark.parametrize("method, path, status", [("GET", "/v1/completions", 405), ("POST", "/v1/chat", 404)])
    def test_page(self, method, path, status, server):
        got, text, _ = server.send(method, path, "{}")
        assert got == status and json.loads(text)["error"]["type"] == "invalid_request_error"

    def test_no_http(self, server):
        for lines in (b"hello\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
                connection.sendall(lines)
                assert connection.recv(1000).startswith(b"HTTP/1.1 400")
        assert len(server.texts(num_steps=1)) == 1

    def test_client_that_leaves(self, server):
        body = json.dumps({"model": "fmlm", "num_steps": MANY_STEPS}).encode()
        header = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % len(body)
        for part in (header, header + body[:10], header + body):
            with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
                connection.sendall(part)
                time.sleep(0.2)
        wait_for(lambda: server.metric("requests_in_progress") == 0)
        assert len(server.texts(num_steps=1)) == 1
        assert 'status="500"' not in server.send("GET", "/metrics")[1]
        assert server.metric("requests_total", 'model="fmlm",status="499"') >= 1


class TestLoad:
    def test_full_queue(self, server):
        count = 2 * CAPACITY
        with ThreadPoolExecutor(count) as pool:
            answers = list(pool.map(lambda seed: server.complete(seed=seed, num_steps=300), range(count)))
        statuses = [status for status, _ in answers]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= CAPACITY / 2
        error = next(answer["error"] for status, answer in answers if status == 429)
        assert error["type"] == "rate_limit_error" and error["code"] == "queue_full"
        assert server.metric("requests_total", 'model="fmlm",status="429"') >= statuses.count(429)
        assert len(server.texts(num_steps=1)) == 1

    def test_timeout(self, server):
        status, answer = server.complete(num_steps=MANY_STEPS, timeout=0.3)
        assert (
            status == 504 and answer["error"]["type"] == "server_error" and "0.3 seconds" in answer["error"]["message"]
        )
        assert len(server.texts(num_steps=1)) == 1

    def test_killed_replica(self, server):
        requests = [{"seed": seed, "num_steps": MANY_STEPS} for seed in range(2 * MAX_BATCH_SIZE)]
        expected = server.texts(**requests[0])
        retries = server.metric("retries_total")
        victims = server.replicas()
        assert len(victims) == REPLICAS
        with ThreadPoolExecutor(len(requests) + 4) as pool:
            others = [pool.submit(server.complete, model="gpt2", seed=seed) for seed in range(4)]
            answers = [pool.submit(server.complete, **request) for request in requests]
            wait_for(lambda: server.metric("requests_in_progress") == len(requests))
            time.sleep(0.2)
            victims[0].kill()
            assert [answer.result()[0] for answer in answers] == [200] * len(requests)
            assert [answer.result()[0] for answer in others] == [200] * 4
        assert [choice["text"] for choice in answers[0].result()[1]["choices"]] == expected
        assert server.metric("retries_total") > retries
        assert len(server.texts(num_steps=1)) == 1
        wait_for(lambda: len(server.replicas()) == REPLICAS)

    def test_killed_ingress(self, server):
        body = json.dumps({"model": "fmlm", "num_steps": MANY_STEPS})
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.send, "POST", "/v1/completions", body)
            wait_for(lambda: server.metric("requests_in_progress") == 1)
            server.processes("ServeReplica:default:Ingress")[0].kill()
            assert answer.result()[0] == 500
        assert len(server.texts(num_steps=1)) == 1


class TestWriters:
    """In this process."""

    def test_draws_have_the_probabilities_of_the_model(self):
        scores = torch.tensor([0.0, 1.0, -torch.inf, 2.0])
        texts = [serve.Text([0], 4, seed=seed, temperature=1.5) for seed in range(4000)]
        drawn = serve.DrawTokens(texts)(None, scores.repeat(4000, 1)).argmax(dim=1)
        share = torch.bincount(drawn, minlength=4) / 4000
        torch.testing.assert_close(share, (scores / 1.5).softmax(dim=0), atol=0.025, rtol=0)

    @pytest.mark.parametrize("name", ["fmlm", "gpt2"])
    def test_nobody_waits(self, name, models):
        writer = (serve.FlowWriter if name == "fmlm" else serve.CausalWriter)(models[name], models["tokenizer"])
        texts = [serve.Text(writer.encode("the cat"), LENGTH, seed) for seed in range(2)]
        texts[0].is_abandoned = True
        assert len(writer.write(texts)) == 2
        texts[1].is_abandoned = True
        with pytest.raises(serve.Abandoned):
            writer.write(texts)


@pytest.fixture
def make_replica():
    """Makes replicas in this process, whose loggers and threads are as before after the test."""
    verbosity, num_threads = transformers_logging.get_verbosity(), torch.get_num_threads()
    library = logging.getLogger("modeling_flm.pipeline_flm")
    level = library.level

    def make(folder: Path, *flags: str) -> serve.Model:
        args = serve.make_parser().parse_args([str(folder), "--device", "cpu", "--max_wait_ms", "50", *flags])
        return serve.Model.func_or_class(str(folder), num_threads, args)

    yield make
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()
    torch.set_num_threads(num_threads)
    library.setLevel(level)


class TestReplica:
    """In this process."""

    OPTIONS = {"n": 1, "seed": 0, "num_steps": None, "max_tokens": None, "temperature": None}

    def complete(self, replica: serve.Model, *requests: dict) -> list[dict]:
        """What it answers to requests that come together."""

        async def send():
            return await asyncio.gather(*(replica.complete(**{**self.OPTIONS, **request}) for request in requests))

        return asyncio.run(send())

    def test_one_token_begins_and_ends_texts(self, models, make_replica, tmp_path):
        tokenizer = models["tokenizer"]
        token = tokenizer.bos_token_id
        ends = {"bos_token_id": token, "eos_token_id": token}
        model = build_model("fmlm", vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **ends)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        (answer,) = self.complete(make_replica(tmp_path), {"prompts": [""], "n": 128, "num_steps": 1})
        generators = [generator(0, index) for index in range(128)]
        tokens = model.generate(num_samples=128, num_steps=1, generator=generators, pad_after_eos=True)
        assert (tokens[:, 0] == token).any()
        assert [choice["text"] for choice in answer["choices"]] == tokenizer.batch_decode(
            tokens, skip_special_tokens=True
        )

    def test_values_of_the_model_are_those_asked_for(self, models, make_replica, tmp_path):
        model = build_model("fmlm", vocab_size=len(models["tokenizer"]), max_position_embeddings=LENGTH)
        model.generation_config.num_steps, model.generation_config.temperature = 2, 0.5
        model.save_pretrained(tmp_path)
        models["tokenizer"].save_pretrained(tmp_path)
        same = [{}, {"num_steps": 2}, {"temperature": 0.5}, {"num_steps": 2, "temperature": 0.5}]
        others = [{"num_steps": 3}, {"temperature": 1.0}]
        answers = self.complete(make_replica(tmp_path), *({"prompts": [""], **fields} for fields in same + others))
        assert [answer["batch_sizes"] for answer in answers] == [[4], [], [], [], [1], [1]]
        assert len({answer["choices"][0]["text"] for answer in answers[:4]}) == 1

    def test_times_of_the_model_are_not_a_number_of_steps(self, models, make_replica, tmp_path):
        model = build_model("fmlm", vocab_size=len(models["tokenizer"]), max_position_embeddings=LENGTH)
        model.generation_config.timesteps = [0.0, 0.9, 1.0]
        model.save_pretrained(tmp_path)
        models["tokenizer"].save_pretrained(tmp_path)
        answers = self.complete(make_replica(tmp_path), {"prompts": [""]}, {"prompts": [""], "num_steps": 2})
        assert [answer["batch_sizes"] for answer in answers] == [[1], [1]]

    def test_failure(self, models, make_replica, monkeypatch):
        replica = make_replica(models["folder"] / "fmlm")

        def fail(texts):
            raise torch.OutOfMemoryError

        monkeypatch.setattr(replica.writer, "write", fail)
        (answer,) = self.complete(replica, {"prompts": ["the cat"], "n": 2})
        assert answer["error"][0] == 500 and answer["error"][3] == "model_failed"

    def test_work_that_nobody_cancels(self, models, make_replica, monkeypatch):
        replica = make_replica(models["folder"] / "fmlm", "--timeout", "0.1")
        is_over = threading.Event()

        def write(texts):
            for _ in range(1000):
                if all(text.is_abandoned for text in texts):
                    is_over.set()
                    raise serve.Abandoned
                time.sleep(0.01)

        monkeypatch.setattr(replica.writer, "write", write)
        with pytest.raises(asyncio.TimeoutError):
            self.complete(replica, {"prompts": ["the cat"], "n": 2})
        assert is_over.wait(60)

    def test_prompts_are_not_logged(self, models, make_replica, caplog):
        replica = make_replica(models["folder"] / "fmlm")
        (answer,) = self.complete(replica, {"prompts": ["a secret"]})
        assert len(answer["choices"]) == 1
        assert "secret" not in caplog.text


class FailingHandle:
    """A model whose replicas fail with each request."""

    def __init__(self, error: Exception):
        self.error, self.count, self.complete = error, 0, self

    async def remote(self, prompts: list[str], **options):
        self.count += 1
        raise self.error


class TestIngress:
    """In this process."""

    def send(self, body: bytes | None, error: Exception, *flags: str):
        """The answer to a body, or to one that never arrives, with the model and the ingress."""
        handle = FailingHandle(error)
        ingress = serve.Ingress.func_or_class.__base__(
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

    def test_replicas_that_end(self):
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


class LettersWriter:
    """Texts of which the first token says which ones go together, and takes its time."""

    def __init__(self):
        self.batches = []

    def group(self, text: serve.Text) -> int:
        return text.prompt_ids[0]

    def write(self, texts: list[serve.Text]) -> list[list[int]]:
        self.batches.append([text.seed for text in texts])
        if texts[0].seed == 99:
            raise ValueError("a text that cannot be written")
        time.sleep(0.1)
        return [[text.seed] for text in texts]


class TestBatcher:
    def run(self, groups: str, seeds: Sequence[int], max_batch_size: int = 3, leaves: tuple[int, ...] = ()):
        """The batches and the results of texts that come one after the other, of which some are not waited for."""
        writer = LettersWriter()

        async def send():
            batcher = serve.Batcher(writer, max_batch_size, 0.02)
            texts = [serve.Text([ord(group)], 4, seed) for group, seed in zip(groups, seeds)]
            tasks = [asyncio.create_task(batcher.write(text)) for text in texts]
            await asyncio.sleep(0.05)  # the first batch is being written
            for index in leaves:
                tasks[index].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

        return writer.batches, asyncio.run(send())

    def test_what_goes_together_is_written_together(self):
        batches, results = self.run("abaabbac", range(8))
        assert batches == [[0, 2, 3], [1, 4, 5], [6], [7]]
        assert results == [([0], 3), ([1], 3), ([2], None), ([3], None), ([4], None), ([5], None), ([6], 1), ([7], 1)]

    def test_what_comes_meanwhile_is_the_next_batch(self):
        writer = LettersWriter()

        async def send():
            batcher = serve.Batcher(writer, 8, 0.0)
            tasks = []
            for seed in range(6):
                tasks.append(asyncio.create_task(batcher.write(serve.Text([0], 4, seed))))
                await asyncio.sleep(0.015)
            await asyncio.gather(*tasks)

        asyncio.run(send())
        assert writer.batches == [[0], [1, 2, 3, 4, 5]]

    def test_nobody_waits(self):
        batches, results = self.run("aaaa", range(4), max_batch_size=1, leaves=(1, 2))
        assert batches == [[0], [3]]
        assert results[0] == ([0], 1) and results[3] == ([3], 1)
        assert all(isinstance(result, asyncio.CancelledError) for result in results[1:3])

    def test_a_failure_is_of_its_batch_alone(self):
        batches, results = self.run("aab", [99, 1, 2])
        assert batches == [[99, 1], [2]]
        assert results == [(None, None), (None, None), ([2], 1)]


class TestStart:
    def test_other_ports_ask_for_a_token(self, server):
        ports = {
            connection.laddr.port
            for process in server.replicas()
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
        codes = set()
        for port in ports:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                # With what Ray would unpickle, and so run
                call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
                with pytest.raises(grpc.RpcError) as error:
                    call(b"", timeout=60)
                codes.add(error.value.code())
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert codes == {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}

    def test_line(self, server):
        assert server.line.startswith("fmlm, gpt2: http://127.0.0.1:") and server.process.poll() is None

    def test_names(self, models, tmp_path):
        folder = tmp_path / "a #1"
        folder.symlink_to(models["folder"] / "fmlm")
        args = serve.make_parser().parse_args([str(folder), "--device", "cpu"])
        serve.build(args, {"a #1": str(folder), "owner/name": str(folder)})

    def test_mistakes(self, models, tmp_path):
        (tmp_path / "fmlm").symlink_to(models["folder"] / "gpt2")
        fmlm = str(models["folder"] / "fmlm")
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            for arguments, message in (
                (["./nowhere"], "there is no folder ./nowhere"),
                ([fmlm, fmlm], "both called fmlm"),
                ([str(tmp_path)], str(tmp_path)),
                ([fmlm, "--port", port], "--port: cannot listen on"),
            ):
                with pytest.raises(SystemExit) as error:
                    serve.main(serve.make_parser().parse_args(arguments))
                assert message in str(error.value)


class TestLoadTest:
    @pytest.mark.parametrize("line, is_deaf", [("hello", False), ("hello", True), ("http://127.0.0.1:1/", True)])
    def test_no_server_is_left(self, line, is_deaf, tmp_path, monkeypatch):
        script = tmp_path / "script.py"
        lines = ["import signal, time", *["signal.signal(signal.SIGTERM, signal.SIG_IGN)"] * is_deaf]
        script.write_text("\n".join([*lines, f"print({line!r})", "time.sleep(600)"]))
        processes, files = [], []

        class Process(subprocess.Popen):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                processes.append(self)
                files.append(kwargs["stderr"])

            def wait(self, timeout=None):
                if is_deaf and timeout is not None:
                    raise subprocess.TimeoutExpired(self.args, timeout)
                return super().wait(timeout)

        monkeypatch.setattr(serving, "SCRIPT", script)
        monkeypatch.setattr(serving.subprocess, "Popen", Process)
        with pytest.raises(subprocess.TimeoutExpired if is_deaf else RuntimeError):
            with serving.Server([]):
                pass
        assert processes[0].poll() is not None
        assert files[0].closed and processes[0].stdout.closed


def test_load_test(capsys):
    serving.main(serving.make_parser().parse_args(["--quick", "--num_steps", "1", "2", "--device", "cpu"]))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[:2] for row in rows[1:]] == [
        [f"| {clients}", model]
        for clients in (1, 4)
        for model in ("FMLM, 1 step", "FMLM, 2 steps", "GPT-2 with KV cache")
    ]
    for row in rows[1:]:
        texts, tokens, median, most, size = (float(value.strip(" |").replace(",", "")) for value in row[2:])
        assert tokens == pytest.approx(8 * texts, rel=0.02)  # all texts have their full length
        assert 0 < median <= most
        assert 1 <= size <= 4
