"""GET /openapi.json: the API described for programs, from the same table that checks requests."""

from collections.abc import Collection
from typing import Any

from nanogpt import __version__
from nanogpt.base.sample_config import SAMPLE_CHOICES, ServerConfig
from nanogpt.serve.completions import FIELDS, LIMITS, MAX_LABEL_CHARS, MAX_STOP_CHARS, MAX_STOPS, NEUTRAL, STREAM_OPTIONS, UNSET
from nanogpt.write.control import KINDS

ERRORS = {
    "400": "A field is wrong", "401": "The token is missing or wrong", "403": "Another origin, or a host name that is not this machine's",
    "404": "No such model, or nothing at this address", "405": "The method is not allowed", "408": "The body came too slowly",
    "413": "The body is too large",
    "415": "Not application/json", "431": "The head is too long", "500": "The server failed", "503": "Too busy; Retry-After says when to come back",
    "504": "The time limit was reached",
}
ERROR = {
    "type": "object", "required": ["error"], "properties": {"error": {
        "type": "object", "required": ["message", "type", "param", "code"], "properties": {
            "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]}, "code": {"type": "string"},
        },
    }},
}
COUNT = {"type": "integer", "minimum": 0}
USAGE = {"type": "object", "properties": {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT}}
NATS = {"type": "number", "maximum": 0}
LOGPROBS = {
    "type": ["object", "null"], "required": ["tokens", "token_logprobs", "top_logprobs", "text_offset"], "properties": {
        "tokens": {"type": "array", "items": {"type": "string"}}, "token_logprobs": {"type": "array", "items": {**NATS, "type": ["number", "null"]}},
        "top_logprobs": {"type": "array", "items": {"type": ["object", "null"], "additionalProperties": NATS}},
        "text_offset": {"type": "array", "items": COUNT},
    },
}
CHOICE = {
    "type": "object", "required": ["index", "text", "finish_reason"], "properties": {
        "index": COUNT, "text": {"type": "string"}, "logprobs": LOGPROBS, "finish_reason": {"enum": ["stop", "length", None]},
    },
}
COMPLETION = {
    "type": "object", "required": ["id", "object", "created", "model", "choices"], "properties": {
        "id": {"type": "string"}, "object": {"const": "text_completion"}, "created": COUNT, "model": {"type": "string"},
        "choices": {"type": "array", "items": CHOICE}, "usage": USAGE,
    },
}


def request_schema(
    limits: ServerConfig, *, fields: Collection[str] = tuple(FIELDS), empty_prompts: bool = False, vocab_size: int | None = None,
) -> dict:
    """The body of POST /v1/completions with these of FIELDS; null is the same as leaving a field out."""
    def text(longest: int, shortest: int = 1) -> dict:
        return {"type": "string", "minLength": shortest, "maxLength": longest}

    properties = {}
    for name, (kind, low, high) in FIELDS.items():
        schema = {"type": [kind, "null"]}
        if low is not None:
            schema["minimum"] = UNSET.get(name, low)
        if (high := getattr(limits, LIMITS[name]) if name in LIMITS else high) is not None:
            schema["maximum"] = high
        properties[name] = schema
    # 字段表说不清的几个，单独写；拿这份文档做模糊测试的程序靠它
    prompt, stop = text(limits.max_prompt_chars, 0 if empty_prompts else 1), text(MAX_STOP_CHARS)
    token = {"type": "integer", "minimum": 0, **({} if vocab_size is None else {"maximum": vocab_size - 1})}
    ids = {"type": "array", "items": token, "minItems": prompt["minLength"], "maxItems": limits.max_prompt_chars}
    several = {"type": "array", "minItems": 1, "maxItems": limits.max_texts}
    properties["prompt"] = {"anyOf": [prompt, {**several, "items": prompt}, {**ids, "minItems": 1}, {**several, "items": ids}]}
    properties["stop"] = {"anyOf": [stop, {"type": "array", "items": stop, "maxItems": MAX_STOPS}, {"type": "null"}]}
    properties["unknown"] = {"enum": [None, *SAMPLE_CHOICES["unknown"]]}
    for name in KINDS:
        properties[name] = {"type": ["string", "null"], "maxLength": MAX_LABEL_CHARS, "pattern": r"^[^\n]*$"}
    properties["stream_options"] = {
        "type": ["object", "null"], "properties": {name: {"type": "boolean"} for name in STREAM_OPTIONS}, "additionalProperties": False,
    }
    properties |= {name: {"enum": [None, *allowed]} for name, allowed in NEUTRAL.items()}
    properties = {name: schema for name, schema in properties.items() if name in fields or name in NEUTRAL}
    return {"type": "object", "required": ["prompt"], "properties": properties, "additionalProperties": False}


def document(limits: ServerConfig, **about: Any) -> dict:
    """OpenAPI 3.1; `about` says what request_schema must know of this server."""
    body = request_schema(limits, **about)

    def answers(description: str, content: dict) -> dict:
        failures = {status: {"description": words, "content": {"application/json": {"schema": ERROR}}} for status, words in ERRORS.items()}
        return {"200": {"description": description, "content": content}, **failures}

    def get(summary: str, **more) -> dict:
        return {"get": {"summary": summary, "responses": answers("OK", {"application/json": {"schema": {"type": "object"}}}), **more}}

    # 一个事件一份 JSON，末尾是 [DONE]：3.1 的 schema 说不了一串事件
    written = {"application/json": {"schema": COMPLETION}, "text/event-stream": {}}
    return {
        "openapi": "3.1.0", "info": {"title": "nanogpt", "version": __version__}, "security": [{"token": []}] if limits.token else [],
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "paths": {
            # 这一个不问口令：看护程序也要能问
            "/health": get("Whether it can write, and how much it has to do", security=[]), "/v1/models": get("The model that is loaded"),
            "/v1/models/{model}": get("One model", parameters=[{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]),
            "/v1/completions": {"post": {
                "summary": "Write behind a prompt", "responses": answers("What was written", written),
                "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
            }},
        },
    }
