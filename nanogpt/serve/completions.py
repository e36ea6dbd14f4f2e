"""OpenAI's completions: the fields of a request, checked; the forms of answers and errors."""

import dataclasses
import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

from nanogpt.base.language import ConfigError, text_in
from nanogpt.base.sample_config import SAMPLE_CHOICES, ServerConfig
from nanogpt.core.sampling import SETTINGS
from nanogpt.core.scoring import Score
from nanogpt.data.tokenizer import Tokenizer, UnknownCharacters
from nanogpt.serve.worker import News
from nanogpt.write.control import GUIDANCE, KINDS, takes_forms
from nanogpt.write.engine import Request, Result
from nanogpt.write.loading import Settings

# 命令行不限的，网上来的要有上限
HIGHEST = {"top_k": 2**31, "no_repeat_ngram": 100}
# 每个位置最多报几个候选；OpenAI 为 5，有的评测程序要 10
MOST_LOGPROBS = 20
PROMPT = "string, array of strings, array of token ids, or array of arrays of token ids"
# 字段 -> (类型, 下限, 上限)；这几个与 conf/sampler 里的键同名
SAMPLER_FIELDS = {
    name: ("integer" if kind is int else "number", low, HIGHEST.get(name, high)) for name, (kind, low, high) in SETTINGS.items()
}
FIELDS = {
    "model": ("string", None, None), "prompt": (PROMPT, None, None), "max_tokens": ("integer", 0, None), "n": ("integer", 1, None),
    "best_of": ("integer", 1, None), "logprobs": ("integer", 0, MOST_LOGPROBS), "stop": ("string or array of strings", None, None),
    "seed": ("integer", 0, 2**62), "stream": ("boolean", None, None),
    "style": ("string", None, None), "emotion": ("string", None, None), "guidance": ("number", *GUIDANCE), "stream_options": ("object", None, None),
    "unknown": ("string", None, None), "echo": ("boolean", None, None), "user": ("string", None, None), **SAMPLER_FIELDS,
}
TYPES = {
    "string": str, "boolean": bool, "object": dict, "integer": int, "number": (int, float),
    "string or array of strings": (str, list), PROMPT: (str, list),
}
# 上限由 server: 的哪个键给出
LIMITS = {"max_tokens": "max_tokens", "n": "max_texts", "best_of": "max_texts"}
# 别的程序用它们表示“没有设”
UNSET = {"seed": -1, "top_k": -1}
# OpenAI 有而这里没有的字段：写着“不用”的值放行，别的值说清楚
NEUTRAL = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "suffix": ("",), "metadata": ({},),
}
STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")
MAX_STOPS, MAX_STOP_CHARS = 16, 200
MAX_LABEL_CHARS = 100
# 在 Writer 里才发现的错：HTTP 状态；其余都是 400
STATUS = {
    "sample_oom": 503, "api_busy": 503, "api_stopping": 503, "api_time_limit": 504, "api_unread": 408, "nonfinite_logits": 500, "api_internal": 500,
}
PARAMS = dict.fromkeys(("api_unknown_characters", "empty_prompt", "prompt_all_skipped", "prompt_over_context"), "prompt")
RETRY = {"Retry-After": "5"}


class ApiError(ConfigError):
    """What is wrong with a request, its HTTP status, the field, and headers that go with it."""

    def __init__(self, status: int, message: str, *, param: str | None = None, headers: dict[str, str] | None = None, **values):
        super().__init__(message, **values)
        self.status, self.param, self.headers = status, param, headers or {}


def as_api_error(error: ConfigError) -> ApiError:
    """An error of the Writer or of a sampler in the API's terms."""
    if isinstance(error, ApiError):
        return error
    # 怎样跳过，这里有这里的写法
    message = "api_unknown_characters" if isinstance(error, UnknownCharacters) else error.message
    status = STATUS.get(message, 400)
    return ApiError(status, message, param=PARAMS.get(message), headers=RETRY if status == 503 else None, **error.values)


def error_body(error: ApiError, language: str | None) -> dict:
    """OpenAI's form; `code` is the same in every language."""
    return {"error": {
        "message": text_in(language, error.message, **error.values), "type": "server_error" if error.status >= 500 else "invalid_request_error",
        "param": error.param, "code": error.message.removeprefix("api_"),
    }}


@dataclass(frozen=True)
class Completion:
    """A checked request; its texts are those of the first prompt, then those of the second, …"""

    prompts: list[str]
    n: int
    requests: list[Request]
    stream: bool
    echo: bool
    usage: bool
    """Whether a stream ends with the token counts."""
    running_usage: bool
    """Whether every event of a stream has them."""

    def prompt_of(self, index: int) -> str:
        """The prompt of the index-th text, if it is to be shown."""
        return self.prompts[index // self.n] if self.echo else ""


@dataclass
class Reader:
    """Turns bodies into Completions; what a body leaves out is taken from `base`."""

    model: str
    base: Settings
    limits: ServerConfig
    empty_prompts: bool = False
    """Whether the model can write behind nothing."""
    tokenizer: Tokenizer | None = None
    """What prompts of token ids mean."""

    @property
    def fields(self) -> list[str]:
        """The fields that a request may have here: what the sampler and the control do not have is left out."""
        left_out = {name for name in SAMPLER_FIELDS if name not in self.base.sampler}
        left_out |= set() if takes_forms(self.base.control) else set(KINDS)
        left_out |= set() if "guidance" in self.base.control else {"guidance"}
        return [name for name in FIELDS if name not in left_out]

    def read(self, body: bytes) -> Completion:
        """Check every field; ApiError names the first that is wrong."""
        given = self._fields(_json_object(body))
        prompts, n, echo = self._prompts(given.get("prompt")), given.get("n", 1), given.get("echo", False)
        if (texts := len(prompts) * n) > (limit := self.limits.max_texts):
            raise ApiError(400, "api_too_many_texts", param="n" if n > 1 else "prompt", got=texts, limit=limit)
        if given.get("best_of", n) != n:
            raise ApiError(400, "api_best_of", param="best_of", got=given["best_of"], n=n)
        if given.get("max_tokens") == 0 and not echo:
            wanted = f"1 … {self.limits.max_tokens} (0 with echo=true)"
            raise ApiError(400, "api_out_of_range", param="max_tokens", field="max_tokens", got=0, wanted=wanted)
        options = _stream_options(given.get("stream_options", {}))
        settings, logprobs = self._settings(given), given.get("logprobs")
        scored = {"logprobs": logprobs, "score_prompt": echo and logprobs is not None}
        requests = [
            dataclasses.replace(self._request(settings, prompt, number), **scored) for prompt in prompts for number in range(n)
        ]
        return Completion(
            [request.prompt for request in requests[::n]] if echo else [], n, requests, given.get("stream", False), echo,
            bool(options.get("include_usage")), bool(options.get("continuous_usage_stats")),
        )

    def _request(self, settings: Settings, prompt: str | tuple[int, ...], number: int) -> Request:
        if isinstance(prompt, str):
            return settings.request(prompt, number)
        return dataclasses.replace(settings.request("", number), prompt=self.tokenizer.decode(prompt), ids=prompt)

    def _fields(self, body: dict[str, Any]) -> dict[str, Any]:
        """The fields that are set, each of the right type and in its range."""
        given = {}
        for name, value in body.items():
            # null 与不写相同，官方客户端也这样用
            if value is None or (name in UNSET and value == UNSET[name]):
                continue
            if name in NEUTRAL:
                if isinstance(value, bool) or value not in NEUTRAL[name]:
                    raise ApiError(400, "api_unsupported", param=name, field=name)
                continue
            if name not in FIELDS:
                raise ApiError(400, "api_unknown_field", param=name[:100], field=name[:100], known=", ".join(self.fields))
            kind, low, high = FIELDS[name]
            if kind == "integer" and isinstance(value, float) and value.is_integer():
                # JSON 不分 1 与 1.0
                value = int(value)
            # Python 里 True 也是整数，JSON 里不是
            if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
                raise ApiError(400, "api_wrong_type", param=name, field=name, wanted=kind)
            key = LIMITS.get(name)
            high = getattr(self.limits, key) if key else high
            if low is not None and not (value >= low and (high is None or value <= high)):
                wanted = (f">= {low}" if high is None else f"{low} … {high}") + (f" (server.{key})" if key else "")
                raise ApiError(400, "api_out_of_range", param=name, field=name, got=str(value)[:40], wanted=wanted)
            given[name] = value
        return given

    def _prompts(self, prompt: str | list | None) -> list[str | tuple[int, ...]]:
        """The prompts, each a text or ids."""
        # 一列整数是一个开头，而不是许多个
        listed = [prompt] if isinstance(prompt, str) or _are_ids(prompt) else prompt or []
        if any(not isinstance(one, str) for one in listed):
            prompts = [self._ids(one) for one in listed]
        else:
            prompts = _strings("prompt", listed)
        if not prompts or (not self.empty_prompts and not all(map(len, prompts))):
            raise ApiError(400, "api_no_prompt", param="prompt")
        if (longest := max(map(len, prompts))) > self.limits.max_prompt_chars:
            raise ApiError(400, "api_prompt_too_long", param="prompt", got=longest, limit=self.limits.max_prompt_chars)
        return prompts

    def _ids(self, ids: Any) -> tuple[int, ...]:
        if not _are_ids(ids) and ids != []:
            raise ApiError(400, "api_wrong_type", param="prompt", field="prompt", wanted=PROMPT)
        if (wrong := next((i for i in ids if not 0 <= i < self.tokenizer.vocab_size), None)) is not None:
            wanted = f"0 … {self.tokenizer.vocab_size - 1}"
            raise ApiError(400, "api_out_of_range", param="prompt", field="prompt: id", got=str(wrong)[:40], wanted=wanted)
        return tuple(ids)

    def _control(self, given: dict[str, Any]) -> dict[str, Any]:
        """The control node with this request's style, emotion ("" switches one off) and guidance."""
        asked = {kind: _asked_label(kind, given[kind]) or None for kind in KINDS if kind in given}
        if asked and not takes_forms(self.base.control):
            raise ApiError(400, "api_no_control", param=next(iter(asked)))
        if "guidance" in given:
            if "guidance" not in self.base.control:
                raise ApiError(400, "api_no_guidance", param="guidance")
            asked["guidance"] = given["guidance"]
        return {**self.base.control, **asked}

    def _settings(self, given: dict[str, Any]) -> Settings:
        changes = {name: given[name] for name in SAMPLER_FIELDS if name in given}
        if missing := next((name for name in changes if name not in self.base.sampler), None):
            known = ", ".join(key for key in self.base.sampler if key != "_target_")
            raise ApiError(400, "api_not_in_sampler", param=missing, field=missing, known=known)
        control, unknown = self._control(given), given.get("unknown", self.base.unknown)
        if unknown not in (allowed := SAMPLE_CHOICES["unknown"]):
            raise ApiError(400, "api_wrong_type", param="unknown", field="unknown", wanted=" | ".join(allowed))
        stop = _strings("stop", given["stop"]) if "stop" in given else self.base.stop
        if "" in stop or len(stop) > MAX_STOPS or any(len(s) > MAX_STOP_CHARS for s in stop):
            raise ApiError(400, "api_wrong_type", param="stop", field="stop", wanted=f"<= {MAX_STOPS} strings of 1 … {MAX_STOP_CHARS} characters")
        return dataclasses.replace(
            self.base, sampler={**self.base.sampler, **changes}, control=control, seed=given.get("seed", self.base.seed), stop=stop, unknown=unknown,
            max_new_tokens=given.get("max_tokens", min(self.base.max_new_tokens, self.limits.max_tokens)),
        )


def _asked_label(field: str, value: str) -> str:
    _strings(field, value)
    if len(value) > MAX_LABEL_CHARS or "\n" in value:
        raise ApiError(400, "api_wrong_type", param=field, field=field, wanted=f"<= {MAX_LABEL_CHARS} characters")
    return value


def _json_object(body: bytes) -> dict[str, Any]:
    def refuse(constant: str):
        raise ValueError(constant)

    try:
        # NaN 与 Infinity 不是 JSON，Python 却收下；套得太深会用尽递归
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "api_not_json", reason=" ".join(str(error).split())[:200]) from None
    if not isinstance(value, dict):
        raise ApiError(400, "api_not_json", reason=type(value).__name__)
    return value


def _are_ids(value: Any) -> bool:
    """Whether this is one prompt of token ids."""
    return isinstance(value, list) and bool(value) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


def _stream_options(options: dict[str, Any]) -> dict[str, bool]:
    if unknown := next((name for name in options if name not in STREAM_OPTIONS), None):
        field, known = f"stream_options.{unknown[:100]}", ", ".join(STREAM_OPTIONS)
        raise ApiError(400, "api_unknown_field", param="stream_options", field=field, known=known)
    if wrong := next((name for name, value in options.items() if not isinstance(value, bool)), None):
        raise ApiError(400, "api_wrong_type", param="stream_options", field=f"stream_options.{wrong}", wanted="boolean")
    return options


def _strings(name: str, value: str | list | None) -> list[str]:
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not all(isinstance(s, str) for s in strings):
        raise ApiError(400, "api_wrong_type", param=name, field=name, wanted=FIELDS[name][0])
    for s in strings:
        try:
            s.encode("utf-8")
        except UnicodeEncodeError:
            # JSON 的 \ud800 单独出现：编码不了，也回显不了
            raise ApiError(400, "api_surrogate", param=name, field=name) from None
    return strings


class Answer:
    """The bodies that answer one Completion."""

    def __init__(self, asked: Completion, model: str, prompt_tokens: list[int]):
        self.asked = asked
        # 同一个开头写 n 段，只算读了一次
        self.prompt_tokens = sum(prompt_tokens[:: asked.n])
        count = len(asked.requests)
        self.texts, self.finish = [""] * count, [None] * count
        self.scores: list[list[Score]] = [[] for _ in range(count)]
        # None：这一段还没有消息
        self.tokens: list[int | None] = [None] * count
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": model}

    def add(self, fresh: list[News]) -> list[dict]:
        """Take up what is new; the events that tell it, one per text."""
        parts: dict[int, tuple[str, list[Score]]] = {}
        for news in fresh:
            index = news.index
            # 回显的开头随第一个事件走
            text = news.text if self.tokens[index] is not None else self.asked.prompt_of(index) + news.text
            before = parts.get(index, ("", []))
            parts[index] = before[0] + text, [*before[1], *news.scores]
            self.texts[index] += text
            self.scores[index] += news.scores
            self.tokens[index] = news.tokens
            self.finish[index] = finish_reason(news.result) if news.result else None
        usage = {"usage": self.usage()} if self.asked.running_usage else {}
        return [{**self._head, "choices": [self._choice(index, text, scores)], **usage} for index, (text, scores) in parts.items()]

    def usage(self) -> dict[str, int]:
        """Tokens read and written so far."""
        written = sum(count or 0 for count in self.tokens)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": written, "total_tokens": self.prompt_tokens + written}

    def usage_event(self) -> dict:
        """The last event of a stream that asked for usage."""
        return {**self._head, "choices": [], "usage": self.usage()}

    def whole(self) -> dict:
        """The answer that is not streamed."""
        choices = [self._choice(index, *told) for index, told in enumerate(zip(self.texts, self.scores))]
        return {**self._head, "choices": choices, "usage": self.usage()}

    def _choice(self, index: int, text: str, scores: list[Score]) -> dict:
        logprobs = None if self.asked.requests[index].logprobs is None else logprobs_of(scores)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": self.finish[index]}


def logprobs_of(scores: list[Score]) -> dict[str, list]:
    """OpenAI's form of scores: one list per property; null where nothing stands before a token."""
    return {
        "tokens": [score.token for score in scores], "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [None if score.logprob is None else score.top for score in scores], "text_offset": [score.offset for score in scores],
    }


def finish_reason(result: Result) -> str:
    """OpenAI knows two: the limit was reached, or the text came to an end."""
    return "length" if result.finish == "length" else "stop"
