# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Requests and errors of the HTTP API, in the format of OpenAI's completions."""

import json
from typing import Annotated, Any

from fastapi.responses import JSONResponse
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError


def _default_only(*defaults: Any) -> Any:
    """Returns the type of a field that must be null or one of the default values that clients send."""

    def check(value: Any) -> None:
        # In Python 0 equals False.
        if any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in defaults):
            return None
        supported = " or ".join(map(json.dumps, [None, *defaults]))
        raise PydanticCustomError("unsupported_value", f"this server supports only {supported}. Remove the field")

    return Annotated[None, BeforeValidator(check)]


class OpenAIDefaults(BaseModel):
    """Fields of OpenAI's completions that the server does not support, with the default values that it accepts."""

    model_config = ConfigDict(extra="forbid", strict=True)

    frequency_penalty: _default_only(0) = None
    logit_bias: _default_only({}) = None
    logprobs: _default_only(False) = None
    presence_penalty: _default_only(0) = None
    stop: _default_only([]) = None
    stream: _default_only(False) = None
    stream_options: _default_only() = None
    suffix: _default_only("") = None
    top_p: _default_only(1) = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        """Leaves out fields that are null: their default values, as for OpenAI."""
        if not isinstance(body, dict):
            return body
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in body.items() if value is not None or name not in optional}


def _as_list(prompt: Any) -> Any:
    """Returns a list of prompts from one prompt: a text, or its tokens."""
    is_tokens = isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)
    return [prompt] if isinstance(prompt, str) or is_tokens else prompt


class CompletionRequest(OpenAIDefaults):
    """Body of a request to `/v1/completions`."""

    model: str
    prompt: Annotated[list[str | Annotated[list[int], Field(min_length=1)]], BeforeValidator(_as_list)] = Field(
        [""], min_length=1
    )
    n: int = Field(1, ge=1)
    best_of: int | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    num_steps: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0.01, le=2)
    gamma: float | None = Field(None, ge=0, le=1)
    echo: bool = False
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False)

    @field_validator("best_of")
    @classmethod
    def _is_n(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        """Accepts what asks for all samples, as clients do that send `best_of` with `n`."""
        n = info.data.get("n")
        if n is not None and best_of not in (None, n):
            raise PydanticCustomError(
                "unsupported_value",
                "this server returns all samples, so only null or `n` is supported. Remove the field",
            )
        return best_of


class RequestError(Exception):
    """
    Error that a request is answered with.

    Args:
        status (`int`): HTTP status.
        message (`str`): Description of the error and its remedy.
        param (`str`, *optional*): Field of the request that caused the error.
        code (`str`, *optional*): Machine-readable name of the error.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        error_type = {429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.error = {"message": message, "type": error_type, "param": param, "code": code}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse({"error": self.error}, self.status, headers)

    @classmethod
    def from_validation(cls, error: ValidationError) -> "RequestError":
        """Returns the first of the errors that pydantic found."""
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            return cls(400, f"The body is not JSON in UTF-8: {first['msg']}.", code="invalid_json")
        if not first["loc"]:
            return cls(400, "The body must be a JSON object.", code="invalid_json")
        param = str(first["loc"][0])[:100]
        if first["type"] == "extra_forbidden":
            supported = ", ".join(f"`{name}`" for name in CompletionRequest.__annotations__)
            message = f"`{param}` is not supported: remove it. The supported fields are {supported}."
            return cls(400, message, param, "unknown_field")
        code = "unsupported_value" if first["type"] == "unsupported_value" else "invalid_value"
        return cls(400, f"`{param}`: {first['msg']}.", param, code)
