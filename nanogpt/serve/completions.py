"""OpenAI's completions: what a request may hold, checked by pydantic, and the forms of answers and errors."""

# 正文的两头：Reader 把请求的 JSON 变成要写的几段（Completion），CompletionBody 把写出的变成 OpenAI 形状的回答
# 同一个 pydantic 模型既检查请求，也是 /openapi.json 里的说明。范围不在这里另写一遍：sampler 的取自 SETTINGS，
# guidance 的取自 GUIDANCE，seed 的取自配置，其余由 server: 的键给出
# 错误信息由本项目写：pydantic 的只有英文，也说不出是 server: 的哪个键

import dataclasses
import time
import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

# Python 3.11 的 TypedDict，pydantic 读不全
from typing_extensions import TypedDict

from nanogpt.base.config import choices_of, range_of
from nanogpt.base.language import NAMED, ConfigError, presentable, sentence, text_in
from nanogpt.base.sample_config import SampleConfig, ServerConfig
from nanogpt.core.sampling import SETTINGS
from nanogpt.core.scoring import Score
from nanogpt.data.tokenizer import Tokenizer, UnknownCharacters
from nanogpt.serve.worker import TextUpdate
from nanogpt.write.chat import Chat
from nanogpt.write.control import GUIDANCE, KINDS, takes_forms
from nanogpt.write.loading import Settings
from nanogpt.write.request import Request

# 命令行不限的，网上来的要有上限
HIGHEST = {"top_k": 2**31, "no_repeat_ngram": 100}
# 每个位置最多报几个候选；OpenAI 为 5，有的评测程序要 10
MOST_LOGPROBS = 20
MOST_MESSAGES = 2000
MAX_STOPS, MAX_STOP_CHARS, MAX_LABEL_CHARS = 16, 200, 100
# 别的程序用它们表示“没有设”
UNSET = {"seed": -1, "top_k": -1}
STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")
# 错误的名字 -> HTTP 状态；没有列出的都是 400
STATUS = {
    "api_token": 401, "api_host": 403, "api_origin": 403, "api_not_found": 404, "api_no_chat": 404, "api_no_model": 404,
    "api_only_chat": 404,
    "api_method": 405, "api_slow_body": 408, "api_unread": 408, "api_too_large": 413, "api_content_type": 415,
    "nonfinite_logits": 500, "api_internal": 500, "sample_oom": 503, "api_busy": 503, "api_stopping": 503,
    "api_time_limit": 504,
}
# 读开头时才发现的错，也说得出是哪个字段
OF_PROMPT = ("api_unknown_characters", "empty_prompt", "prompt_all_skipped", "prompt_over_context")
OF_MESSAGES = ("chat_too_long", "chat_refused")
# 对话里没有的：开头、评分、从几段里挑
NOT_IN_CHAT = ("prompt", "echo", "best_of", "logprobs", "suffix", "guidance", *KINDS)


# ---- 错误与回答的形状：程序里是普通的 dict，写成类型是为了 /openapi.json ----


class Mistake(TypedDict):  # code 在两种语言里相同，程序可以据此判断
    """What is wrong with a request."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class Refusal(TypedDict):  # 多这一层是 OpenAI 的约定，客户端库照它取
    """OpenAI's form of an error."""

    error: Mistake


class Usage(TypedDict):  # 同一个开头写 n 段，只算读了一次
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Logprobs(TypedDict):  # 第一个 token 前面什么也没有：它的评分是 null
    """Scores, one list per property of the tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(TypedDict):  # 流里还没写完的一段，结尾是 null
    """One text, or in a stream what is new of it."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(TypedDict):  # 流里只有要了 usage 的事件才有它
    """A whole answer, or one event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: NotRequired[Usage]


class Said(TypedDict):  # refusal 总是 null：OpenAI 的客户端会去读它
    """What a model answers; in a stream what is new of it."""

    role: NotRequired[Literal["assistant"]]
    content: str
    refusal: NotRequired[None]


class Answer(TypedDict):  # 流里是 delta，整个的是 message
    """One answer, or in a stream what is new of it."""

    index: int
    message: NotRequired[Said]
    delta: NotRequired[Said]
    logprobs: None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletion(TypedDict):  # 与 TextCompletion 只差 choices 的形状
    """A whole answer to a conversation, or one event of a stream."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk"]
    created: int
    model: str
    choices: list[Answer]
    usage: NotRequired[Usage]


def status_of(error: ConfigError) -> int:
    """The HTTP status of an error."""
    return STATUS.get(error.message, 400)


def error_body(error: ConfigError, language: str | None) -> Refusal:
    """OpenAI's form of an error, in the client's language; None: in the console's."""
    # 怎样跳过词表没有的字，这里有这里的写法
    name = "api_unknown_characters" if isinstance(error, UnknownCharacters) else error.message
    values = {key: presentable(value.said(language) if isinstance(value, Wanted) else value)
              for key, value in error.values.items()}
    code = name.removeprefix("api_") if name in NAMED else "invalid_value"
    return {"error": {
        "message": text_in(language, name, **values),
        "type": "server_error" if status_of(error) >= 500 else "invalid_request_error",
        "param": values.get("field", "prompt" if name in OF_PROMPT else "messages" if name in OF_MESSAGES else None),
        "code": values.get("code", code),
    }}


# ---- 请求 ----


def _whole(value: Any) -> Any:
    # JSON 不分 1 与 1.0
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Wanted(str):
    """What a field takes: a sentence in English, which an error says in the client's language."""

    # 同一句话先写进 /openapi.json（英文），出了错再译：那时才知道对方说哪种语言

    def __new__(cls, message: str, **values):
        made = super().__new__(cls, message.format(**values))
        made.message, made.values = message, values
        return made

    def said(self, language: str | None) -> str:
        """The sentence in this language; None: in the console's."""
        return text_in(language, self.message, **self.values)


ONLY = sentence("{value}: anything else is not supported")
INTEGER = sentence("an integer, {low} … {high}{key}")


def _field(kind: Any, wanted: str) -> tuple[Any, Any]:
    """A field that may be left out; `wanted` stands in the description and in the error."""
    return kind | None, Field(None, description=wanted)


def _number(kind: type, low: float, high: float, key: str = "") -> tuple[Any, Any]:
    """A field of numbers; `key` is the key of the configuration that sets its upper limit."""
    message = INTEGER if kind is int else sentence("a number, {low} … {high}{key}")
    wanted = Wanted(message, low=low, high=high, key=f" ({key})" if key else "")
    within = Annotated[kind, Field(ge=low, le=high), *([BeforeValidator(_whole)] if kind is int else [])]
    return _field(within, wanted)


def _prompt(limits: ServerConfig, shortest: int, vocab_size: int) -> tuple[Any, Any]:
    """A text, several, ids of tokens, or several such lists."""
    # fail_fast：一万个错只报第一个，不然光列错误就要几秒
    size = Field(min_length=shortest, max_length=limits.max_prompt_chars)
    several = Field(min_length=1, max_length=limits.max_texts, fail_fast=True)
    text, token = Annotated[str, size], Annotated[int, Field(ge=0, lt=vocab_size), BeforeValidator(_whole)]
    ids = Annotated[list[token], Field(fail_fast=True), size]
    wanted = Wanted(
        sentence(
            "a string, an array of strings, an array of token ids (0 … {last}) or an array of such arrays; each of "
            "{least} … {most} characters or ids (server.max_prompt_chars), at most {texts} of them (server.max_texts)",
        ),
        last=vocab_size - 1, least=shortest, most=limits.max_prompt_chars, texts=limits.max_texts,
    )
    one = text | Annotated[ids, Field(min_length=1)]
    return one | Annotated[list[text], several] | Annotated[list[ids], several], Field(description=wanted)


class TextPart(BaseModel):  # 图与声音不是文字
    """A piece of a message."""

    type: Literal["text"]
    text: str


class MessageForm(BaseModel):  # 客户端把收到的回答原样带回来：多出来的字段不管
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    tool_calls: Annotated[list, Field(max_length=0)] | None = None

    def plain(self) -> dict[str, str]:
        """As templates take it."""
        parts = self.content if isinstance(self.content, list) else [TextPart(type="text", text=self.content)]
        return {"role": self.role.replace("developer", "system"), "content": "".join(part.text for part in parts)}


def chat_form_of(form: type[BaseModel], limits: ServerConfig) -> type[BaseModel]:
    """The fields of a request for an answer: those of a completion, with messages instead of a prompt."""
    fields = {name: (f.annotation, f) for name, f in form.model_fields.items() if name not in NOT_IN_CHAT}
    wanted = Wanted(
        sentence(
            'an array of 1 … {most} objects {{"role": "system" | "user" | "assistant", "content": a string}} without '
            "tool calls, the last of the user, of at most {chars} characters in all (server.max_prompt_chars)",
        ),
        most=MOST_MESSAGES, chars=limits.max_prompt_chars,
    )
    size = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    listed = Annotated[list[MessageForm], size]
    return create_model(
        "ChatCompletionRequest", __config__=form.model_config, messages=(listed, Field(description=wanted)), **fields,
        max_completion_tokens=_number(int, 1, limits.max_tokens, "server.max_tokens"),
        **dict.fromkeys(("logprobs", "store"), _field(Literal[False], Wanted(ONLY, value="false"))),
        response_format=_field(dict[Literal["type"], Literal["text"]], Wanted(ONLY, value='{"type": "text"}')),
        tools=_field(Annotated[list, Field(max_length=0)], Wanted(ONLY, value="[]")),
        tool_choice=_field(Literal["none", "auto"], "none | auto"),
    )


def form_of(base: Settings, limits: ServerConfig, *, vocab_size: int, empty_prompts: bool) -> type[BaseModel]:
    """The fields of a request here, with their limits: what the sampler or the control lacks is no field."""
    label = Annotated[str, Field(max_length=MAX_LABEL_CHARS, pattern=r"^[^\n]*$")]
    stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
    stops = Wanted(
        sentence("a string or an array of at most {most} strings, each of 1 … {chars} characters"), most=MAX_STOPS,
        chars=MAX_STOP_CHARS,
    )
    skipping = choices_of(SampleConfig, "unknown")
    texts = _number(int, 1, limits.max_texts, "server.max_texts")
    fields = {
        "prompt": _prompt(limits, 0 if empty_prompts else 1, vocab_size),
        "max_tokens": _number(int, 0, limits.max_tokens, "server.max_tokens"), "n": texts, "best_of": texts,
        "logprobs": _number(int, 0, MOST_LOGPROBS),
        "seed": _number(int, UNSET["seed"], range_of(SampleConfig, "seed").high),
        "stop": _field(stop | Annotated[list[stop], Field(max_length=MAX_STOPS, fail_fast=True)], stops),
        "unknown": _field(Literal[skipping], " | ".join(skipping)),
        **dict.fromkeys(("stream", "echo"), _field(bool, Wanted(sentence("a boolean")))),
        **dict.fromkeys(("model", "user"), _field(str, Wanted(sentence("a string")))),
        "stream_options": _field(
            dict[Literal[STREAM_OPTIONS], bool],
            Wanted(sentence("an object of booleans: {names}"), names=", ".join(STREAM_OPTIONS)),
        ),
        # OpenAI 有而这里没有的：写着“不用”的值放行，官方客户端会带上它们
        **dict.fromkeys(
            ("frequency_penalty", "presence_penalty"),
            _field(Annotated[float, Field(ge=0, le=0)], Wanted(ONLY, value="0")),
        ),
        **dict.fromkeys(
            ("logit_bias", "metadata"), _field(Annotated[dict, Field(max_length=0)], Wanted(ONLY, value="{}")),
        ),
        "suffix": _field(Literal[""], Wanted(ONLY, value='""')),
    }
    for name, (kind, low, high) in SETTINGS.items():
        if name in base.sampler:
            fields[name] = _number(kind, UNSET.get(name, low), HIGHEST.get(name, high))
    if takes_forms(base.control):
        line = Wanted(sentence("one line of at most {most} characters"), most=MAX_LABEL_CHARS)
        fields |= dict.fromkeys(KINDS, _field(label, line))
    if "guidance" in base.control:
        fields["guidance"] = _number(float, *GUIDANCE)
    # strict：字符串 "1" 不是数，true 也不是；NaN 与 Infinity 不是 JSON，解析器却收下
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return create_model("CompletionRequest", __config__=config, **fields)


@dataclass(frozen=True)
class Completion:
    """A checked request; its texts are those of the first prompt, then those of the second, …"""

    # 读过之后就不再看 JSON：后面的程序只认得要写的几段
    requests: list[Request]
    n: int
    stream: bool
    echo: bool
    usage: bool
    """Whether a stream ends with the token counts."""
    running_usage: bool
    """Whether every event of a stream has them."""
    chat: bool = False
    """Whether it is an answer to a conversation."""


class Reader:
    """Turns bodies into Completions; what a body leaves out is taken from `base`."""

    # 字段与上限在开始服务时就定下了，每个请求只是照它检查
    def __init__(
        self, model: str, base: Settings, limits: ServerConfig, tokenizer: Tokenizer, *, empty_prompts: bool = False,
        chat: Chat | None = None,
    ):
        """`chat`: the model as one that answers, None where it does not."""
        self.chat = chat
        self.model, self.base, self.limits, self.tokenizer = model, base, limits, tokenizer
        self.form = form_of(base, limits, vocab_size=tokenizer.vocab_size, empty_prompts=empty_prompts)
        self.chat_form = chat_form_of(self.form, limits)

    def read(self, body: bytes) -> Completion:
        """Check every field; ConfigError names one that is wrong."""
        given = self._given(self.form, body)
        prompt, n, echo = given["prompt"], given.get("n", 1), given.get("echo", False)
        # 一列整数是一个开头，而不是许多个
        prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        if (texts := len(prompts) * n) > (limit := self.limits.max_texts):
            raise ConfigError(
                "prompts x n = {got}; at most {limit} texts per request (server.max_texts)",
                code="too_many_texts", field="n" if n > 1 else "prompt", got=texts, limit=limit,
            )
        if given.get("best_of", n) != n:
            raise ConfigError(
                "best_of={got}: texts are not chosen among here, so best_of must equal n ({n}) or be left out",
                code="best_of", field="best_of", got=given["best_of"], n=n,
            )
        if given.get("max_tokens") == 0 and not echo:
            wanted = Wanted(sentence("an integer, 1 … {most} (0 with echo=true)"), most=self.limits.max_tokens)
            raise ConfigError("api_out_of_range", field="max_tokens", got=0, wanted=wanted)
        settings, logprobs, options = self._settings(given), given.get("logprobs"), given.get("stream_options", {})
        scored = {"logprobs": logprobs, "score_prompt": echo and logprobs is not None}
        requests = [self._request(settings, one, number, scored) for one in prompts for number in range(n)]
        usage, running_usage = (options.get(name, False) for name in STREAM_OPTIONS[:2])
        return Completion(requests, n, given.get("stream", False), echo, usage, running_usage)

    def _given(self, form: type[BaseModel], body: bytes) -> dict[str, Any]:
        """The fields that a body holds."""
        try:
            asked = form.model_validate_json(body)
        except ValidationError as error:
            raise self._refused(error.errors(include_url=False)[0], form) from None
        # null 与不写相同，官方客户端也这样用
        return {name: value for name, value in asked if value is not None and value != UNSET.get(name)}

    def read_chat(self, body: bytes) -> Completion:
        """The same for a conversation."""
        given = self._given(self.chat_form, body)
        messages, n = [message.plain() for message in given["messages"]], given.get("n", 1)
        chars = sum(len(message["content"]) for message in messages)
        last, wanted = messages[-1]["role"], self.chat_form.model_fields["messages"].description
        if chars > self.limits.max_prompt_chars or last != "user":
            got = Wanted(sentence("{n} characters"), n=chars) if last == "user" else f"[…, {{role: {last}}}]"
            raise ConfigError("api_out_of_range", field="messages", got=got, wanted=wanted)
        if "max_completion_tokens" in given:
            given["max_tokens"] = given["max_completion_tokens"]
        if given.get("max_tokens") == 0:
            wanted = Wanted(INTEGER, low=1, high=self.limits.max_tokens, key="")
            raise ConfigError("api_out_of_range", field="max_tokens", got=0, wanted=wanted)
        settings, options = self._settings(given), given.get("stream_options", {})
        try:
            requests = [self.chat.request(settings, messages, number) for number in range(n)]
        except UnknownCharacters as error:
            error.values["field"] = "messages"
            raise
        usage, running_usage = (options.get(name, False) for name in STREAM_OPTIONS[:2])
        return Completion(requests, n, given.get("stream", False), False, usage, running_usage, chat=True)

    def _refused(self, error: dict[str, Any], form: type[BaseModel]) -> ConfigError:
        """The first complaint of pydantic in this project's words."""
        if not error["loc"]:
            reason = error["msg"]
            return ConfigError("the body is not a JSON object in UTF-8 ({reason})", code="not_json", reason=reason)
        field, fields = str(error["loc"][0]), form.model_fields
        if error["type"] == "extra_forbidden":
            return ConfigError(
                "{field}: there is no such field with the sampler and control that this server was started with; "
                "known fields: {known}",
                code="unknown_field", field=field, known=", ".join(fields),
            )
        if field in ("prompt", "messages"):
            # 它有四种写法，pydantic 对每一种各有一句话：说清楚要什么，比挑其中一句好
            return ConfigError(
                "{field} is missing, empty or wrong; it must be {wanted}",
                code=f"no_{field}", field=field, wanted=fields[field].description,
            )
        name = "api_wrong_type" if error["type"].endswith("_type") else "api_out_of_range"
        return ConfigError(name, field=field, got=str(error["input"])[:40], wanted=fields[field].description)

    def _request(self, settings: Settings, prompt: str | list[int], number: int, scored: dict[str, Any]) -> Request:
        if isinstance(prompt, str):
            return dataclasses.replace(settings.request(prompt, number), **scored)
        # 开头停在半个字上：这个字随续写出来，回显里先没有它
        text = self.tokenizer.decode(prompt).removesuffix(self.tokenizer.stream(prompt).finish())
        return dataclasses.replace(settings.request("", number), prompt=text, ids=tuple(prompt), **scored)

    def _settings(self, given: dict[str, Any]) -> Settings:
        """What to write with: the settings of this server, changed as the request says."""
        base, stop = self.base, given.get("stop", self.base.stop)
        # "" 关掉配置里写着的风格
        control = {name: given[name] or None for name in KINDS if name in given}
        if "guidance" in given:
            control["guidance"] = given["guidance"]
        return dataclasses.replace(
            base, sampler=base.sampler | {name: given[name] for name in SETTINGS if name in given},
            control=base.control | control, stop=[stop] if isinstance(stop, str) else stop,
            seed=given.get("seed", base.seed), unknown=given.get("unknown", base.unknown),
            max_new_tokens=given.get("max_tokens", min(base.max_new_tokens, self.limits.max_tokens)),
        )


# ---- 回答 ----


class CompletionBody:
    """The answer to one Completion, as one body or as the events of a stream."""

    # 流式与整个的回答用同一份记录，两者的文字才不会不同
    prefix, part, whole_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, asked: Completion, model: str, prompt_tokens: list[int]):
        self.asked, count = asked, len(asked.requests)
        self.prompt_tokens = sum(prompt_tokens[:: asked.n])
        self.texts, self.finish = [""] * count, [None] * count
        self.scores: list[list[Score]] = [[] for _ in range(count)]
        # None：这一段还没有消息
        self.tokens: list[int | None] = [None] * count
        number, now = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._head = {"id": number, "object": self.part, "created": now, "model": model}

    def add(self, fresh: list[TextUpdate]) -> list[TextCompletion]:
        """Take up what is new; the events that tell it, one per text."""
        parts: dict[int, tuple[str, list[Score]]] = {}
        for update in fresh:
            index = update.index
            # 回显的开头随第一个事件走
            shown = self.asked.requests[index].prompt if self.asked.echo and self.tokens[index] is None else ""
            text, scores = parts.get(index, ("", []))
            parts[index] = text + shown + update.text, [*scores, *update.scores]
            self.texts[index] += shown + update.text
            self.scores[index] += update.scores
            self.tokens[index] = update.tokens
            if update.result:
                # OpenAI 只有两种结尾：写满了，或文字自己到了头
                self.finish[index] = "length" if update.result.finish == "length" else "stop"
        usage = {"usage": self.usage()} if self.asked.running_usage else {}
        return [{**self._head, "choices": [self._choice(index, *part)], **usage} for index, part in parts.items()]

    def usage(self) -> Usage:
        """Tokens read and written so far."""
        written = sum(count or 0 for count in self.tokens)
        total = self.prompt_tokens + written
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": written, "total_tokens": total}

    def usage_event(self) -> TextCompletion:
        """The last event of a stream that asked for usage."""
        return {**self._head, "choices": [], "usage": self.usage()}

    def whole(self) -> TextCompletion:
        """The answer that is not streamed."""
        choices = [self._choice(index, *part) for index, part in enumerate(zip(self.texts, self.scores))]
        return {**self._head, "object": self.whole_kind, "choices": choices, "usage": self.usage()}

    def _choice(self, index: int, text: str, scores: list[Score]) -> Choice:
        logprobs = None if self.asked.requests[index].logprobs is None else logprobs_of(scores)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": self.finish[index]}


class ChatBody(CompletionBody):
    """The answer to a conversation."""

    # 只有形状不同：第一个事件说出角色
    prefix, part, whole_kind = "chatcmpl", "chat.completion.chunk", "chat.completion"

    def add(self, fresh: list[TextUpdate]) -> list[ChatCompletion]:
        new = {update.index for update in fresh if self.tokens[update.index] is None}
        events = super().add(fresh)
        for choice in (event["choices"][0] for event in events):
            said = choice.pop("message")
            choice["delta"] = {"content": said["content"]} | ({"role": "assistant"} if choice["index"] in new else {})
        return events

    def _choice(self, index: int, text: str, scores: list[Score]) -> Answer:
        said = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": said, "logprobs": None, "finish_reason": self.finish[index]}


def logprobs_of(scores: list[Score]) -> Logprobs:
    """OpenAI's form of scores."""
    return {
        "tokens": [score.token for score in scores], "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [None if score.logprob is None else score.top for score in scores],
        "text_offset": [score.offset for score in scores],
    }
