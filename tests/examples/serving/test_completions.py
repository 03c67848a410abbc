"""Bodies of requests, as clients send them."""

import json

import pytest


pytest.importorskip("fastapi")
from completions import CompletionRequest, RequestError  # noqa: E402
from pydantic import ValidationError  # noqa: E402


# The default values of OpenAI's completions
OPENAI_DEFAULTS = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "logit_bias": None,
    "logprobs": None,
    "max_tokens": 16,
    "n": 1,
    "presence_penalty": 0,
    "seed": None,
    "stop": None,
    "stream": False,
    "stream_options": None,
    "suffix": None,
    "temperature": 1,
    "top_p": 1,
    "user": "user-1",
}


def parse(**fields) -> CompletionRequest:
    return CompletionRequest.model_validate_json(json.dumps({"model": "fmlm", **fields}))


def test_defaults_of_openai_are_accepted():
    used = {"best_of": 1, "max_tokens": 16, "temperature": 1.0, "user": "user-1"}
    assert parse(**OPENAI_DEFAULTS).model_dump(exclude_defaults=True) == {"model": "fmlm", **used}
    nulls = dict.fromkeys([*OPENAI_DEFAULTS, "prompt", "num_steps", "timeout"])
    assert parse(**nulls) == parse()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frequency_penalty", 0.0),
        ("logit_bias", {}),
        ("logprobs", False),
        ("stop", []),
        ("suffix", ""),
        ("top_p", 1.0),
    ],
)
def test_equal_defaults_are_accepted(name, value):
    assert parse(**{name: value}) == parse()


@pytest.mark.parametrize(
    ("name", "value", "supported"),
    [
        ("frequency_penalty", 0.5, "null or 0"),
        ("logit_bias", {"5": 1}, "null or {}"),
        ("logprobs", 0, "null or false"),
        ("presence_penalty", False, "null or 0"),
        ("stop", "\n", "null or []"),
        ("stream", True, "null or false"),
        ("stream_options", {"include_usage": True}, "null"),
        ("suffix", " end", 'null or ""'),
        ("top_p", 0.9, "null or 1"),
    ],
)
def test_values_that_change_samples_are_refused(name, value, supported):
    with pytest.raises(ValidationError) as error:
        parse(**{name: value})
    answer = RequestError.from_validation(error.value).error
    assert answer["message"] == f"`{name}`: this server supports only {supported}. Remove the field."
    assert (answer["param"], answer["code"]) == (name, "unsupported_value")


def test_best_of_is_n():
    assert parse(n=3, best_of=3).n == 3 and parse(best_of=None) == parse()
    with pytest.raises(ValidationError) as error:
        parse(n=3, best_of=4)
    answer = RequestError.from_validation(error.value).error
    assert "only null or `n` is supported" in answer["message"] and answer["param"] == "best_of"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", ""], ["a", ""]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (["a", [7]], ["a", [7]]),
    ],
)
def test_prompts_are_texts_or_tokens(prompt, prompts):
    assert parse(prompt=prompt).prompt == prompts


@pytest.mark.parametrize("prompt", [[], [[]], 5, [5, "a"], [True], [[5, True]], [[5.0]], {"a": 1}])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValidationError) as error:
        parse(prompt=prompt)
    assert RequestError.from_validation(error.value).error["param"] == "prompt"


@pytest.mark.parametrize("name", ["num_step", "messages", "top_k"])
def test_unknown_fields_are_refused_even_if_null(name):
    with pytest.raises(ValidationError) as error:
        parse(**{name: None})
    answer = RequestError.from_validation(error.value).error
    assert (answer["param"], answer["code"]) == (name, "unknown_field")
    assert "`num_steps`" in answer["message"] and "`top_p`" not in answer["message"]
