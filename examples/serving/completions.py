# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""The shape of OpenAI's completions: what a request may ask for, and errors."""

from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator


# Fields of OpenAI's that mean nothing here, and what says the same.
_RENAMED_PARAMETERS = {
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
            hint = _RENAMED_PARAMETERS.get(param, f"the fields are {known}")
            return cls(400, f"Unknown field `{param[:100]}`: {hint}.", param[:100], "unknown_field")
        return cls(400, f"`{param}`: {first['msg'].removeprefix('Value error, ')}.", param, "invalid_value")
