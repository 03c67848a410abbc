"""The HTTP server of the examples: one server with two replicas of two small models, and requests to it."""

import itertools
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modeling_flm.trainers.batches import example_seed
from modeling_flm.trainers.evaluation.samples import SAMPLES_STREAM


grpc = pytest.importorskip("grpc")
pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")
import application  # noqa: E402
import serve  # noqa: E402
import serving  # noqa: E402


pytestmark = pytest.mark.slow

LENGTH = 16
MANY_STEPS = 1500  # take a second or more
MAX_BATCH_SIZE, MAX_QUEUE, REPLICAS = 4, 12, 2
CAPACITY = REPLICAS * 2 * MAX_BATCH_SIZE + MAX_QUEUE
FLAGS = ["--replicas", REPLICAS, "--max_batch_size", MAX_BATCH_SIZE, "--max_queue", MAX_QUEUE, "--max_wait_ms", 20]
FLAGS += ["--max_texts", 16, "--max_num_steps", MANY_STEPS, "--max_body_bytes", 100_000, "--timeout", 300]


class Server(serving.Server):
    """A running server, and requests to it."""

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
        """Returns the processes of the server whose command lines contain `name`."""
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
    assert left == []


def generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(example_seed(seed, SAMPLES_STREAM, index))


def flow_text(models, prompt: str, seed: int, index: int, num_steps: int) -> str:
    """Returns a sample that the flow map generates alone in this process, with its prompt."""
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
    """Returns a sample of GPT-2 without a cache: each token is where the cumulative probability exceeds a uniform variable."""
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
        assert usage["prompt_tokens"] == 3  # with the BOS token
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
    def test_samples_equal_generate(self, num_steps, server, models):
        prompts = ["the cat", "", "dogs run far away"]
        texts = server.texts(prompt=prompts, n=2, seed=7, num_steps=num_steps, echo=True)
        expected = [flow_text(models, prompts[index // 2], 7, index, num_steps) for index in range(6)]
        assert texts == expected and len(set(texts)) == 6
        without = server.texts(prompt=prompts, n=2, seed=7, num_steps=num_steps)
        assert [prompts[index // 2] + text for index, text in enumerate(without)] == texts

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_samples_of_gpt2(self, temperature, server, models):
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


# Body, status, field that the error names, and a part of its message
BAD_BODIES = {
    "broken JSON": (b'{"model": "fmlm", "n": ', 400, None, "JSON"),
    "not JSON": (b"hello", 400, None, "JSON"),
    "an empty body": (b"", 400, None, "JSON"),
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
    "n of 0": ({"n": 0}, 400, "n", "greater than or equal to 1"),
    "n as a string": ({"n": "2"}, 400, "n", "integer"),
    "fractional n": ({"n": 1.5}, 400, "n", "integer"),
    "huge n": ({"n": 10**9}, 400, "n", "16"),
    "too many digits": (b'{"model": "fmlm", "n": ' + b"9" * 5000 + b"}", 400, None, "JSON"),
    "too many prompts": ({"prompt": ["the"] * 17}, 400, "n", "16"),
    "no prompts": ({"prompt": []}, 400, "prompt", "at least 1 item"),
    "texts and numbers": ({"prompt": ["the", 5]}, 400, "prompt", "string"),
    "unknown tokens": ({"prompt": [5, 10**6]}, 400, "prompt", "this model has tokens 0 to"),
    "a long prompt of tokens": ({"prompt": [5] * 20}, 400, "prompt", "at most 16 tokens"),
    "a long prompt": ({"prompt": "the cat " * 20}, 400, "prompt", "at most 16 tokens"),
    "a long prompt for GPT-2": ({"model": "gpt2", "prompt": "the cat " * 20}, 400, "prompt", "at most 16 tokens"),
    "negative seed": ({"seed": -1}, 400, "seed", "greater than or equal to 0"),
    "huge seed": ({"seed": 2**70}, 400, "seed", ""),
    "too many steps": ({"num_steps": MANY_STEPS + 1}, 400, "num_steps", str(MANY_STEPS)),
    "steps for GPT-2": ({"model": "gpt2", "num_steps": 4}, 400, "num_steps", "leave it out"),
    "gamma for GPT-2": ({"model": "gpt2", "gamma": 1}, 400, "gamma", "leave it out"),
    "gamma above 1": ({"gamma": 1.5}, 400, "gamma", "less than or equal to 1"),
    "max_tokens of 0": ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    "temperature 0": ({"temperature": 0}, 400, "temperature", "greater than or equal to"),
    "infinite temperature": (b'{"model": "fmlm", "temperature": Infinity}', 400, None, ""),
    "negative timeout": ({"timeout": -1}, 400, "timeout", "greater than 0"),
    "unknown field": ({"num_step": 4}, 400, "num_step", "`num_steps`"),
    "an unsupported field of OpenAI": ({"stream": True}, 400, "stream", "Remove the field"),
    "a chat": ({"messages": []}, 400, "messages", "`prompt`"),
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

    def test_invalid_http(self, server):
        for lines in (b"hello\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
                connection.sendall(lines)
                assert connection.recv(1000).startswith(b"HTTP/1.1 400")
        assert len(server.texts(num_steps=1)) == 1

    def test_disconnected_client(self, server):
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


class TestStart:
    def test_ports_of_ray_require_a_token(self, server):
        ports = {
            connection.laddr.port
            for process in server.replicas()
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
        codes = set()
        for port in ports:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                # Ray would unpickle the body, and so execute it.
                call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
                with pytest.raises(grpc.RpcError) as error:
                    call(b"", timeout=60)
                codes.add(error.value.code())
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert codes == {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}

    def test_address_is_printed(self, server):
        assert server.line.startswith("fmlm, gpt2: http://127.0.0.1:") and server.process.poll() is None

    def test_names_with_special_characters(self, models, tmp_path):
        folder = tmp_path / "a #1"
        folder.symlink_to(models["folder"] / "fmlm")
        args = serve.make_parser().parse_args([str(folder), "--device", "cpu"])
        application.build(args, {"a #1": str(folder), "owner/name": str(folder)})

    def test_wrong_arguments(self, models, tmp_path):
        (tmp_path / "fmlm").symlink_to(models["folder"] / "gpt2")
        fmlm = str(models["folder"] / "fmlm")
        shutil.copytree(fmlm, tmp_path / "damaged")
        (tmp_path / "damaged" / "model.safetensors").write_bytes(b"")
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            for arguments, message in (
                (["./nowhere"], "there is no folder ./nowhere"),
                ([fmlm, fmlm], "both called fmlm"),
                ([str(tmp_path)], str(tmp_path)),
                ([str(tmp_path / "damaged")], "damaged/model.safetensors is empty: download or copy the file again"),
                ([fmlm, "--port", port], "--port: cannot listen on"),
            ):
                with pytest.raises(SystemExit) as error:
                    serve.main(serve.make_parser().parse_args(arguments))
                assert message in str(error.value)
