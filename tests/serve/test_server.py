"""serve=true: the API equals the Writer, limits hold, and no client can harm another."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import make_sample_config, wild_model
from typed import ENVIRONMENT, typed

from nanogpt.base import language
from nanogpt.base.config import ROOT
from nanogpt.base.language import ConfigError
from nanogpt.core.sampling import SETTINGS, sampler
from nanogpt.data.tokenizer import ByteTokenizer, CharTokenizer
from nanogpt.write.loading import Model, Settings
from nanogpt.write.request import Request

pytest.importorskip("fastapi", reason="the server needs FastAPI and uvicorn: pip install -e .[serve]")

from nanogpt.serve.server import bind, run
from nanogpt.serve.worker import Job, TextUpdate, Worker

POEM = "春天的花朵，开在山上。\n"
LIMITS = {"port": 0, "read_seconds": 0.6, "stall_seconds": 0.6, "max_tokens": 200_000}


def poem_sampler(logits, tokens):
    """Writes the bytes of POEM over and over behind '|'; raises after a while behind '!|', is slow behind '~|'."""
    if (tokens == ord("!")).any() and tokens.size(1) > 20:
        raise RuntimeError("a bug in a sampler")
    if (tokens == ord("~")).any():
        time.sleep(0.02)
    written = (tokens >= 0).sum(-1) - (tokens == ord("|")).int().argmax(-1) - 1 - (tokens < 0).sum(-1)
    wanted = torch.tensor(list(POEM.encode("utf-8")))[written.clamp(min=0) % len(POEM.encode("utf-8"))]
    return torch.full_like(logits, -torch.inf).scatter_(1, wanted[:, None], 0.0)


POEM_SAMPLER = {"_target_": "test_server.poem_sampler"}


def tiny(tokenizer=None, **changes):
    """A random model whose logits differ."""
    tokenizer = tokenizer or CharTokenizer("\n !abcdefghijklmnopqrstuvwxyz")
    return Model("outputs/tiny/iter_00000001", wild_model(vocab_size=tokenizer.vocab_size, **changes), tokenizer, contextlib.nullcontext)


class Served:
    """A server in a thread of this process."""

    def __init__(self, model, *, sampler=None, batch_size=4, overrides=(), send_buffer=None, **limits):
        self.cfg = make_sample_config(f"batch_size={batch_size}", "max_new_tokens=20", *overrides)
        self.cfg.sampler = sampler or self.cfg.sampler
        for key, value in {**LIMITS, **limits}.items():
            assert hasattr(self.cfg.server, key)
            setattr(self.cfg.server, key, value)
        self.model, self.errors = model, []
        self.socket = bind(self.cfg.server)
        if send_buffer:
            # 每个连接继承它：不必写满几 MB 才轮到程序自己的上限
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.port = self.socket.getsockname()[1]
        ready = threading.Event()

        def started(server):
            self.server = server
            ready.set()

        def work():
            try:
                asyncio.run(run(self.cfg, model, self.socket, on_start=started))
            except BaseException as error:
                self.errors.append(error)
                ready.set()

        self.thread = threading.Thread(target=work)
        self.thread.start()
        assert ready.wait(20) and not self.errors

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive() and not self.errors

    def send(self, method, path, body=None, headers=None, timeout=20):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        given = {"Content-Type": "application/json", **(headers or {})}
        connection.request(method, path, json.dumps(body).encode() if isinstance(body, dict | list) else body, given)
        return connection, connection.getresponse()

    def get(self, path, headers=None):
        connection, response = self.send("GET", path, headers=headers)
        with contextlib.closing(connection):
            return response.status, response.headers, response.read()

    def post(self, body, headers=None, path="/v1/completions"):
        connection, response = self.send("POST", path, body, headers)
        with contextlib.closing(connection):
            return response.status, json.loads(response.read()), response.headers

    def write(self, **body):
        status, answer, _ = self.post(body)
        assert status == 200, answer
        return answer

    def open_stream(self, **body):
        """A streaming response, its head received; (connection, response)."""
        connection, response = self.send("POST", "/v1/completions", {"stream": True, **body})
        assert response.status == 200 and response.headers["Content-Type"].startswith("text/event-stream"), response.read()
        return connection, response

    def events(self, **body):
        connection, response = self.open_stream(**body)
        with contextlib.closing(connection):
            return list(events(response))

    def raw(self, text, receive_buffer=None):
        """A socket on which `text` was sent."""
        client = socket.socket()
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(10)
        client.connect(("127.0.0.1", self.port))
        client.sendall(text.encode() if isinstance(text, str) else text)
        return client

    def texts(self):
        return json.loads(self.get("/health")[2])["texts"]

    def until_texts(self, count, seconds=10):
        end = time.monotonic() + seconds
        while self.texts() != count:
            assert time.monotonic() < end, f"{self.texts()} texts, not {count}"
            time.sleep(0.02)


def events(response):
    for line in response:
        if line.startswith(b"data: "):
            data = line[6:].decode("utf-8").rstrip("\n")
            yield data if data == "[DONE]" else json.loads(data)


def read_until(client, end):
    received = b""
    while end not in received:
        piece = client.recv(65536)
        assert piece, received
        received += piece
    return received


def request_text(body, **headers):
    data = json.dumps(body)
    fields = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": len(data), **headers}
    return "POST /v1/completions HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items()) + "\r\n" + data


@pytest.fixture
def serve():
    """serve(model, **limits) -> Served; stopped at the end of the test."""
    running = []

    def start(*arguments, **options):
        running.append(Served(*arguments, **options))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="module")
def shared():
    """One server for tests that leave it as it was."""
    language.set_language("en")
    server = Served(tiny())
    yield server
    server.stop()


@pytest.fixture(scope="module")
def poet():
    """One server that writes Chinese bytes."""
    server = Served(tiny(ByteTokenizer()), sampler=POEM_SAMPLER)
    yield server
    server.stop()


# ---- 写出来的就是 Writer 写的 ----


@pytest.mark.parametrize("asked", [
    {"prompt": "the king"}, {"prompt": ["the king", "a"], "n": 2, "max_tokens": 30, "seed": 5}, {"prompt": "x", "temperature": 0},
    {"prompt": "b", "temperature": 1.1, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "typical": 0.95, "repetition_penalty": 1.2, "no_repeat_ngram": 3},
    {"prompt": "b", "stop": ["a", "bc"], "seed": 3}, {"prompt": "b", "stop": "e"},
])
def test_completions_equal_what_the_writer_gives(shared, asked):
    settings = Settings.of(shared.cfg)
    settings.sampler.update({k: v for k, v in asked.items() if k in settings.sampler})
    settings.max_new_tokens, settings.seed = asked.get("max_tokens", 20), asked.get("seed", shared.cfg.seed)
    settings.stop = [asked["stop"]] if isinstance(asked.get("stop"), str) else asked.get("stop", [])
    prompts = asked["prompt"] if isinstance(asked["prompt"], list) else [asked["prompt"]]
    wanted = []
    for prompt in prompts:
        for number in range(asked.get("n", 1)):
            *_, last = shared.model.writer(capacity=1).write([settings.request(prompt, number)])
            wanted.append((last.result.text, "length" if last.result.finish == "length" else "stop", last.result.tokens))
    answer = shared.write(**asked)
    assert [(c["text"], c["finish_reason"]) for c in answer["choices"]] == [(text, finish) for text, finish, _ in wanted]
    assert [c["index"] for c in answer["choices"]] == list(range(len(wanted)))
    assert answer["usage"] == {
        "prompt_tokens": sum(map(len, prompts)), "completion_tokens": sum(n for *_, n in wanted),
        "total_tokens": sum(map(len, prompts)) + sum(n for *_, n in wanted),
    }
    assert answer["object"] == "text_completion" and answer["model"] == "tiny" and answer["id"].startswith("cmpl-")
    streamed = [""] * len(wanted)
    for event in shared.events(**asked)[:-1]:
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == [text for text, *_ in wanted]


def test_a_stream_has_the_documented_shape(shared):
    got = shared.events(prompt=["ab", "c"], echo=True, max_tokens=3, stream_options={"include_usage": True}, user="me", logprobs=None, presence_penalty=0)
    assert got[-1] == "[DONE]" and got[-2]["choices"] == [] and got[-2]["usage"]["completion_tokens"] == 6
    firsts = {}
    for event in got[:-2]:
        assert event["object"] == "text_completion" and event["id"] == got[0]["id"] and "usage" not in event
        for choice in event["choices"]:
            firsts.setdefault(choice["index"], choice["text"])
    assert firsts[0].startswith("ab") and firsts[1].startswith("c")
    assert [c["finish_reason"] for e in got[:-2] for c in e["choices"]].count("length") == 2
    running = shared.events(prompt="a", max_tokens=5, stream_options={"continuous_usage_stats": True})[:-1]
    assert [e["usage"]["completion_tokens"] for e in running][-1] == 5 and all("usage" in e for e in running)
    assert shared.write(prompt="ab", echo=True, max_tokens=2)["choices"][0]["text"].startswith("ab")


def test_streamed_pieces_are_whole_characters_that_join_to_the_same_text(poet):
    whole = poet.write(prompt="|", max_tokens=102)["choices"][0]["text"]
    pieces = [c["text"] for e in poet.events(prompt="|", max_tokens=102)[:-1] for c in e["choices"]]
    assert "".join(pieces) == whole == POEM * 3
    assert len(pieces) > 20 and not any("�" in piece for piece in pieces)


def test_half_a_character_at_the_end_of_a_prompt_of_ids_is_shown_once_whole_and_flushed_where_nothing_follows(poet):
    half = list("|春".encode()[:-1])
    whole = poet.write(prompt=half, echo=True, max_tokens=10)["choices"][0]["text"]
    pieces = [c["text"] for e in poet.events(prompt=half, echo=True, max_tokens=10)[:-1] for c in e["choices"]]
    assert "".join(pieces) == whole == "|春天的花"
    assert poet.write(prompt=half, echo=True, max_tokens=0)["choices"][0]["text"] == "|\ufffd"


def test_two_requests_are_written_together(poet):
    one, first = poet.open_stream(prompt="~|", max_tokens=100_000)
    two, second = poet.open_stream(prompt="~|", max_tokens=100_000)
    with contextlib.closing(one), contextlib.closing(two):
        a, b = events(first), events(second)
        # 交替地取：谁都不必等谁写完
        for _ in range(5):
            assert next(a)["choices"][0]["text"] and next(b)["choices"][0]["text"]
        assert poet.texts() == 2
    poet.until_texts(0)


def test_the_loaded_model_is_announced(shared):
    status, _, body = shared.get("/v1/models")
    model = json.loads(body)["data"][0]
    assert status == 200 and model["id"] == "tiny" and model["vocab_size"] == 29 and model["defaults"]["temperature"] == 0.8
    assert model["checkpoint"] == "iter_00000001" and json.loads(shared.get("/v1/models/tiny")[2]) == model
    status, _, body = shared.get("/v1/models/gpt-4")
    assert status == 404 and "the model is called tiny" in json.loads(body)["error"]["message"]
    # 程序里写着的模型名各不相同：都由这一个来写
    for name in ("tiny", "gpt-3.5-turbo-instruct", "", "a/b"):
        assert shared.write(model=name, prompt="a")["model"] == "tiny"
    shared.until_texts(0)
    assert json.loads(shared.get("/health")[2]) == {"status": "ok", "texts": 0, "capacity": 4}


def test_the_id_of_a_model_is_the_name_of_its_folder_whichever_checkpoint_is_loaded():
    for name in ("outputs/my run/iter_00000100", "outputs/my run/ckpt/iter_00002000", "outputs/my run", "someone/my run"):
        assert Model(name, None, None, None).id == "my run"


def test_programs_that_chat_are_told_what_to_ask_instead(shared):
    status, answer, _ = shared.post({"messages": [{"role": "user", "content": "hello"}]}, path="/v1/chat/completions")
    assert status == 404 and answer["error"]["code"] == "no_chat" and "/v1/completions" in answer["error"]["message"]


def test_what_other_programs_write_for_nothing_means_nothing(shared):
    plain = shared.write(prompt="the king", n=2)["choices"]
    assert shared.write(prompt="the king", n=2, seed=-1, top_k=-1, best_of=2, suffix="", logit_bias={}, user="me", logprobs=None)["choices"] == plain
    ids = [int(i) for i in shared.model.tokenizer.encode("the king")]
    assert shared.write(prompt=ids, n=2)["choices"] == shared.write(prompt=[ids], n=2)["choices"] == plain


# ---- 评分：评测程序怎么问，就怎么试 ----


def forward(model, ids):
    """Natural logarithms of probability (T, V) behind every id, by one plain pass."""
    with torch.inference_mode():
        return model.network(torch.tensor([ids]))[0].log_softmax(-1)


def test_a_scoring_client_reads_the_likelihoods_of_a_plain_forward_pass(shared):
    model, prompts = shared.model, ["the king", "a queen is"]
    rows = [[int(i) for i in model.tokenizer.encode(prompt)] for prompt in prompts]
    # lm-evaluation-harness（local-completions）的原样：开头与要评的续写连在一起，另写一个 token
    asked = {"model": "anything", "prompt": rows, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = shared.write(**asked)
    for choice, ids, prompt in zip(answer["choices"], rows, prompts):
        told, logprobs = choice["logprobs"], forward(model, ids)
        assert told["tokens"] == list(choice["text"]) and choice["text"].startswith(prompt) and len(choice["text"]) == len(prompt) + 1
        assert told["text_offset"] == list(range(len(prompt) + 1)) and told["token_logprobs"][0] is told["top_logprobs"][0] is None
        best = logprobs.max(-1)
        wanted = [float(logprobs[at, token]) for at, token in enumerate([*ids[1:], int(best.indices[-1])])]
        assert told["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-4)
        for at, (own, top) in enumerate(zip(told["token_logprobs"][1:], told["top_logprobs"][1:])):
            greedy = int(best.indices[at]) == [*ids[1:], int(best.indices[-1])][at]
            assert (own == max(top.values())) == greedy and max(top.values()) == pytest.approx(float(best.values[at]), abs=1e-4)
    # 文字代替 id、只评不写，数都一样
    only_read = shared.write(**{**asked, "prompt": prompts, "max_tokens": 0})
    for choice, whole in zip(only_read["choices"], answer["choices"]):
        assert choice["text"] == whole["text"][:-1] and choice["finish_reason"] == "length"
        assert all(choice["logprobs"][name] == told[:-1] for name, told in whole["logprobs"].items())
    assert only_read["usage"] == {"prompt_tokens": 18, "completion_tokens": 0, "total_tokens": 18}
    events = shared.events(**asked)[:-1]
    for index, whole in enumerate(answer["choices"]):
        parts = [choice["logprobs"] for event in events for choice in event["choices"] if choice["index"] == index]
        assert {name: [one for part in parts for one in part[name]] for name in parts[0]} == whole["logprobs"]


def test_a_client_that_generates_until_a_stop_string_is_understood(shared):
    ids = [int(i) for i in shared.model.tokenizer.encode("the king")]
    # 同一个程序的另一种请求
    asked = {"prompt": [ids], "model": "m", "max_tokens": 20, "temperature": 0, "stop": ["\n\n", "<|endoftext|>"], "seed": 1234}
    assert shared.write(**asked)["choices"] == shared.write(prompt="the king", max_tokens=20, temperature=0, seed=0)["choices"]
    assert shared.write(prompt="the king", max_tokens=0, echo=True)["choices"][0] == {"index": 0, "text": "the king", "logprobs": None, "finish_reason": "length"}


def test_drawn_tokens_are_scored_before_the_sampler_and_without_those_of_the_stop_string(shared):
    for asked in ({"temperature": 0.5, "top_k": 3, "seed": 1}, {"temperature": 0, "repetition_penalty": 1.5}):
        whole = shared.write(prompt="abc", logprobs=4, max_tokens=12, **asked)["choices"][0]
        ids = [int(i) for i in shared.model.tokenizer.encode("abc" + whole["text"])]
        logprobs = forward(shared.model, ids)[2:-1]
        told = whole["logprobs"]
        assert told["token_logprobs"] == pytest.approx([float(row[token]) for row, token in zip(logprobs, ids[3:])], abs=1e-4)
        for row, top, token in zip(logprobs, told["top_logprobs"], told["tokens"]):
            assert list(top.values())[:4] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4) and token in top and len(top) <= 5
        stop = whole["text"][6:8]
        cut = shared.write(prompt="abc", logprobs=4, max_tokens=12, stop=stop, **asked)["choices"][0]
        end = whole["text"].index(stop)
        assert cut["text"] == whole["text"][:end] and cut["logprobs"] == {name: values[:end] for name, values in told.items()}


def test_parts_of_characters_have_names_of_their_own_in_scores(poet):
    choice = poet.write(prompt="春|", echo=True, logprobs=0, max_tokens=2)["choices"][0]
    assert choice["logprobs"]["tokens"] == ["bytes:\\xe6", "bytes:\\x98", "bytes:\\xa5", "|", "bytes:\\xe6", "bytes:\\x98"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 0, 1, 2, 2] and choice["logprobs"]["top_logprobs"][3].keys() == {"|"}


def test_style_and_emotion_are_announced_and_change_the_text(serve):
    server = serve(tiny(ByteTokenizer()))
    controls = json.loads(server.get("/v1/models")[2])["data"][0]["controls"]
    assert "happy" in controls["emotions"] and "poetic" in controls["styles"] and "开心" in controls["emotions"]
    plain, happy, off = (server.write(prompt="a", seed=1, **asked)["choices"][0]["text"] for asked in ({}, {"emotion": "happy"}, {"emotion": ""}))
    assert plain == off != happy
    assert server.write(prompt="emotion:happy|a", seed=1)["choices"][0]["text"] == happy


@pytest.mark.parametrize(("overrides", "body", "param"), [
    ((), {"style": "x" * 101}, "style"), ((), {"emotion": "a\nb"}, "emotion"), ((), {"style": 3}, "style"), (("control=none",), {"style": "poetic"}, "style"),
])
def test_a_style_that_cannot_be_is_one_line(serve, overrides, body, param):
    server = serve(tiny(), overrides=overrides)
    status, answer, _ = server.post({"prompt": "a", **body})
    error = answer["error"]
    assert status == 400 and error["param"] == param and "\n" not in error["message"]
    assert ("controls" in json.loads(server.get("/v1/models")[2])["data"][0]) == (not overrides)


def test_characters_that_the_vocabulary_lacks_are_named_or_passed_over(shared):
    status, answer, _ = shared.post({"prompt": "aЖb", "seed": 1})
    assert status == 400 and answer["error"]["code"] == "unknown_characters" and answer["error"]["param"] == "prompt" and '"unknown": "skip"' in answer["error"]["message"]
    texts = [shared.post({"prompt": prompt, "seed": 1, "max_tokens": 5, "unknown": "skip"})[1]["choices"][0]["text"] for prompt in ("aЖb", "ab")]
    assert texts[0] == texts[1] and shared.post({"prompt": "Ж", "unknown": "skip"})[1]["error"]["code"] == "prompt_all_skipped"
    assert shared.post({"prompt": "a", "unknown": "maybe"})[1]["error"]["param"] == "unknown"


def test_the_openapi_document_tells_the_same_limits_and_fields(shared):
    document = json.loads(shared.get("/openapi.json")[2])
    schema = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    bound = {name: field["anyOf"][0] for name, field in schema.items()}
    assert bound["max_tokens"]["maximum"] == 200_000 and (bound["n"]["maximum"], bound["best_of"]["maximum"]) == (16, 16)
    assert bound["seed"]["minimum"] == bound["top_k"]["minimum"] == -1 and schema["prompt"]["anyOf"][1]["items"]["exclusiveMaximum"] == 29
    # 命令行与 API 的范围出自同一处
    for name, (_, low, high) in SETTINGS.items():
        assert bound[name]["minimum"] == (-1 if name == "top_k" else low) and (high == float("inf") or bound[name]["maximum"] == high)
    assert list(document["paths"]) == ["/health", "/v1/models", "/v1/models/{name}", "/v1/completions"]
    answers = document["paths"]["/v1/completions"]["post"]["responses"]
    assert set(answers) == {"200", "default"} and set(answers["200"]["content"]) == {"application/json", "text/event-stream"}


def test_no_address_loads_anything_from_elsewhere(shared):
    # FastAPI 自带的说明网页从 CDN 取脚本
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert shared.get(path)[0] == 404


# ---- 错误：说得清楚，只给犯错的请求 ----


@pytest.mark.parametrize(("body", "status", "param", "words"), [
    ({}, 400, "prompt", "missing, empty or wrong"), ({"prompt": ""}, 400, "prompt", "missing, empty or wrong"), ({"prompt": []}, 400, "prompt", "missing, empty or wrong"),
    ({"prompt": ["a", ""]}, 400, "prompt", "missing"), ({"prompt": [1, 29]}, 400, "prompt", "0 … 28"), ({"prompt": [1, "a"]}, 400, "prompt", "array of strings"),
    ({"prompt": [[1], [True]]}, 400, "prompt", "token ids"), ({"prompt": [[]]}, 400, "prompt", "empty"),
    ({"prompt": [1] * 20_001}, 400, "prompt", "server.max_prompt_chars"), ({"prompt": ["a"] * 17}, 400, "prompt", "at most 16 of them (server.max_texts)"),
    ({"prompt": 3}, 400, "prompt", "string"),
    ({"prompt": "a春"}, 400, "prompt", "'春'"), ({"prompt": "a" * 20_001}, 400, "prompt", "1 … 20000 characters"),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "0 with echo=true"), ({"prompt": "a", "max_tokens": 200_001}, 400, "max_tokens", "0 … 200000 (server.max_tokens)"),
    ({"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens", "integer"), ({"prompt": "a", "max_tokens": True}, 400, "max_tokens", "integer"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature", "0 … 100"), ({"prompt": "a", "temperature": "1"}, 400, "temperature", "number"),
    ({"prompt": "a", "top_p": 1.1}, 400, "top_p", "0 … 1"), ({"prompt": "a", "repetition_penalty": 0}, 400, "repetition_penalty", "0.01"),
    ({"prompt": "a", "n": 17}, 400, "n", "1 … 16 (server.max_texts)"), ({"prompt": ["a"] * 6, "n": 3}, 400, "n", "18"), ({"prompt": "a", "n": 0}, 400, "n", "n=0 is out of range"),
    ({"prompt": "a", "seed": -2}, 400, "seed", "seed=-2"), ({"prompt": "a", "stop": [""]}, 400, "stop", "stop"), ({"prompt": "a", "stop": ["a"] * 17}, 400, "stop", "16"),
    ({"prompt": "a", "stop": {"a": 1}}, 400, "stop", "string"), ({"prompt": "a", "stream": "yes"}, 400, "stream", "boolean"),
    ({"prompt": "a", "logprobs": 21}, 400, "logprobs", "0 … 20"), ({"prompt": "a", "best_of": 3}, 400, "best_of", "must equal n (1)"),
    ({"prompt": "a" * 65, "logprobs": 1, "echo": True}, 400, "prompt", "context of"),
    ({"prompt": "a", "presence_penalty": 0.5}, 400, "presence_penalty", "must be 0: anything else is not supported"), ({"prompt": "a", "tempersture": 1}, 400, "tempersture", "no such field"),
    ({"prompt": "a", "model": 4}, 400, "model", "string"), ({"prompt": "a", "stream_options": {"x": 1}}, 400, "stream_options", "include_usage"),
    ([1], 400, None, "not a JSON object"), (b"{", 400, None, "not a JSON object"), (b"\xff", 400, None, "not a JSON object"), (b"", 400, None, "not a JSON"),
    (b'{"prompt": "a", "temperature": NaN}', 400, "temperature", "nan"), (b'{"prompt": "a", "temperature": 1e999}', 400, "temperature", "inf"),
    (b'{"prompt": "\\ud800"}', 400, None, "hex escape"), (b"[" * 100_000, 400, None, "not a JSON object"), (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", 400, None, "JSON"),
])
def test_mistakes_are_answered_in_openais_form(shared, body, status, param, words):
    got, answer, _ = shared.post(body)
    error = answer["error"]
    assert (got, error["param"], error["type"]) == (status, param, "invalid_request_error") and words in error["message"] and error["code"]
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 1000
    got, answer, _ = shared.post(body, {"Accept-Language": "zh-CN,zh;q=0.9"})
    chinese = answer["error"]["message"]
    assert got == status and re.search("[一-鿿]", chinese) and answer["error"]["code"] == error["code"]
    assert not re.search("a number|an integer|a string|an array|characters|supported", chinese)


@pytest.mark.parametrize(("body", "code"), [
    (b"{", "not_json"), ({}, "no_prompt"), ({"prompt": "a", "x": 1}, "unknown_field"), ({"prompt": "a", "n": "1"}, "wrong_type"), ({"prompt": "a", "n": 0}, "out_of_range"),
    ({"prompt": "a", "best_of": 2}, "best_of"), ({"prompt": ["a", "b"], "n": 9}, "too_many_texts"),
])
def test_programs_know_a_mistake_by_its_code(shared, body, code):
    assert shared.post(body)[1]["error"]["code"] == code


def test_a_mistake_in_a_streaming_request_is_a_status_not_an_event(shared):
    assert shared.post({"prompt": "春", "stream": True})[0] == 400


def test_addresses_and_methods(shared):
    assert shared.get("/nothing")[0] == 404 and shared.get("/../conf/sample.yaml")[0] == 404 and shared.get("/page/index.html")[0] == 404
    assert shared.get("/%2e%2e/setup.cfg")[0] == 404
    status, headers, body = shared.get("/v1/completions")
    assert status == 405 and headers["Allow"] == "POST" and json.loads(body)["error"]["code"] == "method"
    assert shared.post({"prompt": "a"}, {"Content-Type": "text/plain"})[0] == 415
    assert shared.post({"prompt": "a"}, path="/v1/models")[0] == 405
    for path in ("/", "/health"):
        connection, response = shared.send("HEAD", path)
        assert response.status == 200 and response.read() == b""
        connection.close()


def test_a_sampler_of_the_users_own_has_its_own_settings_only(poet):
    status, answer, _ = poet.post({"prompt": "|", "temperature": 0.5})
    assert status == 400 and answer["error"]["param"] == "temperature" and "no such field with the sampler" in answer["error"]["message"]


def test_an_error_ends_only_what_was_being_written_and_the_worker_lives_on(serve, capfd):
    server = serve(tiny(ByteTokenizer()), sampler=POEM_SAMPLER, batch_size=1)
    connection, response = server.open_stream(prompt="!|")
    with contextlib.closing(connection):
        got = list(events(response))
    assert got[0]["choices"] and got[-1]["error"]["code"] == "internal" and got[-1]["error"]["type"] == "server_error" and "[DONE]" not in got
    assert "a bug in a sampler" in capfd.readouterr().err
    assert server.post({"prompt": "!|"})[0] == 500
    assert server.write(prompt="|", max_tokens=9)["choices"][0]["text"] == POEM[:3]


def test_non_finite_logits_end_one_request_and_leave_no_trace(serve):
    model = tiny(ByteTokenizer())
    with torch.no_grad():
        model.network.wte.weight[1] = torch.nan
    server = serve(model)
    alone = server.write(prompt="abc", max_tokens=50)["choices"][0]["text"]
    with contextlib.closing(server.open_stream(prompt="d", max_tokens=100_000)[0]):
        for _ in range(3):
            status, answer, _ = server.post({"prompt": "\x01"})
            assert status == 500 and answer["error"]["code"] == "nonfinite_logits"
            assert server.write(prompt="abc", max_tokens=50)["choices"][0]["text"] == alone


def test_out_of_memory_ends_only_the_request_that_does_not_fit(serve, monkeypatch):
    model = tiny()
    hidden = model.network.hidden

    def small(idx, cache=None):
        if idx.size(0) > 1 or idx.size(1) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(idx, cache)

    server = serve(model)
    wanted = [server.write(prompt=p, max_tokens=9)["choices"][0]["text"] for p in ("a", "b")]
    monkeypatch.setattr(model.network, "hidden", small)
    assert [c["text"] for c in server.write(prompt=["a", "b"], max_tokens=9)["choices"]] == wanted
    status, answer, headers = server.post({"prompt": "abcdefghijkl"})
    assert status == 503 and answer["error"]["code"] == "sample_oom" and headers["Retry-After"]
    monkeypatch.undo()
    assert [c["text"] for c in server.write(prompt=["a", "b"], max_tokens=9)["choices"]] == wanted


# ---- 上限，慢的与走掉的客户端 ----


def test_a_client_that_goes_away_frees_its_rows(poet):
    connection, response = poet.open_stream(prompt=["~|", "~|"], max_tokens=100_000)
    next(events(response))
    assert poet.texts() == 2
    response.close()
    connection.close()
    poet.until_texts(0)
    # 不流式的也一样：回答还没开始，连接断了就停
    client = poet.raw(request_text({"prompt": "~|", "max_tokens": 100_000}))
    poet.until_texts(1)
    client.close()
    poet.until_texts(0)


def test_a_client_that_takes_nothing_is_cut_off_and_blocks_nobody(serve):
    server = serve(tiny(ByteTokenizer()), sampler=POEM_SAMPLER, max_unread_chars=10**9, send_buffer=4096)
    client = server.raw(request_text({"prompt": "|", "max_tokens": 200_000, "stream": True, "logprobs": 20}), receive_buffer=4096)
    server.until_texts(1)
    assert server.write(prompt="|", max_tokens=33)["choices"][0]["finish_reason"] == "length"
    # 各层的缓冲写满之后 stall_seconds；评分让每个事件大些，写满得快
    server.until_texts(0, seconds=120)
    assert b'"code": "unread"' in read_until(client, b"0\r\n\r\n")
    client.close()


def test_a_client_that_reads_too_slowly_is_cut_off(serve):
    server = serve(tiny(ByteTokenizer()), sampler=POEM_SAMPLER, max_unread_chars=100, stall_seconds=60, send_buffer=4096)
    client = server.raw(request_text({"prompt": "|", "max_tokens": 200_000, "stream": True, "logprobs": 20}), receive_buffer=2**15)
    server.until_texts(1)
    server.until_texts(0, seconds=120)
    received = read_until(client, b"0\r\n\r\n")
    # 慢慢读完的人看得到为什么
    assert b'"code": "unread"' in received and b"[DONE]" not in received
    client.close()


def test_many_texts_at_once_are_told_in_fewer_events_the_first_and_the_last_at_once():
    async def told() -> list[str]:
        job = Job([None], None, lambda job: None, lambda: 60.0)
        updates = job.updates()
        job.add(TextUpdate(0, "a", 1))
        parts = [await anext(updates)]
        waiting = asyncio.create_task(anext(updates))
        for letter in "bc":
            job.add(TextUpdate(0, letter, 2))
            await asyncio.sleep(0)
            assert not waiting.done()
        job.add(TextUpdate(0, "d", 4, object()))
        parts.append(await asyncio.wait_for(waiting, 10))
        return ["".join(update.text for update in part) for part in parts]

    async def ended() -> None:
        job = Job([None], None, lambda job: None, lambda: 60.0)
        job.add(TextUpdate(0, "a", 1))
        await anext(updates := job.updates())
        asyncio.get_running_loop().call_soon(job.fail, ConfigError("api_stopping"))
        await asyncio.wait_for(anext(updates), 10)

    assert asyncio.run(told()) == ["a", "bcd"]
    with pytest.raises(ConfigError):
        asyncio.run(ended())


def test_requests_that_come_together_begin_together():
    async def begun() -> int:
        writer, waiting = tiny().writer(capacity=4), []
        advance = writer.advance
        writer.advance = lambda: waiting.append(len(writer.waiting)) or advance()
        worker = Worker(writer, max_waiting=0)
        jobs = [worker.start([Request("a", sampler(), 3, seed)]) for seed in range(4)]
        for job in jobs:
            await job.accepted()
        worker.begin_closing()
        await asyncio.to_thread(worker.join, 10)
        return waiting[0]

    assert asyncio.run(begun()) == 4


def test_the_queue_is_bounded_and_says_when_to_come_back(serve):
    server = serve(tiny(ByteTokenizer()), sampler=POEM_SAMPLER, batch_size=1, max_waiting=1)
    connection, response = server.open_stream(prompt="~|", max_tokens=100_000)
    waiting = server.raw(request_text({"prompt": "|", "max_tokens": 3}))
    server.until_texts(2)
    status, answer, headers = server.post({"prompt": "|"})
    assert status == 503 and answer["error"]["code"] == "busy" and int(headers["Retry-After"]) > 0
    response.close()
    connection.close()
    assert '"text":"春"' in read_until(waiting, b"}}").decode()
    waiting.close()


def test_a_request_has_a_time_limit(serve):
    server = serve(tiny(ByteTokenizer()), sampler=POEM_SAMPLER, request_seconds=0.5)
    status, answer, _ = server.post({"prompt": "~|", "max_tokens": 100_000})
    assert status == 504 and answer["error"]["code"] == "time_limit"
    got = server.events(prompt="~|", max_tokens=100_000)
    assert got[-1]["error"]["code"] == "time_limit" and got[0]["choices"]
    server.until_texts(0)


def test_the_body_has_a_limit(serve):
    server = serve(tiny(), max_body_kib=4)
    # urllib 总是说 close：还在发的时候就断开，它看到的是连接被重置
    for size, headers in ((5_000, {}), (3_000_000, {}), (3_000_000, {"Connection": "close"})):
        status, answer, _ = server.post(b" " * size, headers)
        assert status == 413 and answer["error"]["code"] == "too_large" and "server.max_body_kib" in answer["error"]["message"]
    client = server.raw("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(20):
        client.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
    client.sendall(b"0\r\n\r\n")
    assert b" 413 " in client.recv(4096)
    client.close()


def test_a_body_that_trickles_is_cut_off(serve):
    server = serve(tiny())
    body = server.raw(request_text({"prompt": "a"})[:-3])
    assert b" 408 " in read_until(body, b"}}") and body.recv(4096) == b""
    body.close()


def test_connections_are_counted(serve):
    server = serve(tiny(), max_connections=3)
    held = [server.raw("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") for _ in range(3)]
    for client in held:
        assert b" 200 " in client.recv(4096)
    assert server.get("/health")[0] == 503
    for client in held:
        client.close()
    server.until_texts(0)


def test_many_requests_at_once_are_all_answered(serve):
    server = serve(tiny(), max_waiting=100)
    wanted = server.write(prompt="a", max_tokens=5)["choices"][0]["text"]
    got = []
    threads = [threading.Thread(target=lambda: got.append(server.write(prompt="a", max_tokens=5)["choices"][0]["text"])) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [wanted] * 50
    server.until_texts(0)


# ---- 谁可以来 ----


@pytest.mark.parametrize(("headers", "status"), [
    ({}, 200), ({"Host": "localhost:1234"}, 200), ({"Host": "[::1]:8000"}, 200), ({"Host": "evil.example"}, 403), ({"Host": "127.0.0.1.evil.example"}, 403),
    ({"Host": "localhost.evil.example:8000"}, 403), ({"Host": "192.168.1.5"}, 403), ({"Host": ""}, 403), ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
    ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200), ({"Host": "localhost:8000", "Origin": "http://localhost:9000"}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site"}, 403), ({"Sec-Fetch-Site": "same-origin"}, 200),
])
def test_other_origins_and_rebound_names_are_refused(shared, headers, status):
    assert shared.get("/v1/models", headers)[0] == status
    # 地址不在 /v1/ 下的，只看 Host 与 Origin：浏览器里的链接可以指向它们
    for path in ("/", "/health", "/openapi.json"):
        assert shared.get(path, headers)[0] == (200 if "Sec-Fetch-Site" in headers else status)
    assert shared.post({"prompt": "a", "max_tokens": 1}, headers)[0] == status


def test_answers_carry_no_cors_and_a_strict_policy(shared):
    status, headers, _ = shared.get("/")
    policy = headers["Content-Security-Policy"]
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8" and "default-src 'none'" in policy and "unsafe" not in policy
    assert "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy and policy.count("sha256-") == 2
    for path in ("/", "/v1/models", "/nothing", "/health"):
        headers = shared.get(path)[1]
        assert not any(name.lower().startswith("access-control") for name in headers) and headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin" and "server" not in headers
    connection, response = shared.send("OPTIONS", "/v1/completions")
    assert response.status == 405
    connection.close()


def test_the_page_is_one_file_that_asks_for_nothing_else():
    page = (ROOT / "nanogpt" / "serve" / "page" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:|#)|@import|url\(|innerHTML|outerHTML|insertAdjacent|document\.write|\bon[a-z]+=|style=""", page)
    assert page.count("<script>") == page.count("<style>") == 1


def test_with_a_token_only_those_who_know_it_may_write(serve):
    server = serve(tiny(), token="secret-token")
    right = {"Authorization": "Bearer secret-token"}
    assert server.get("/")[0] == server.get("/health")[0] == 200
    for wrong in ({}, {"Authorization": "Bearer secret-tokem"}, {"Authorization": "secret-token"}, {"Authorization": "Bearer "}, {"Authorization": "Bearer s\xe9cret"}):
        status, answer, headers = server.post({"prompt": "a"}, wrong)
        assert status == 401 and answer["error"]["code"] == "token" and headers["WWW-Authenticate"] == "Bearer"
        assert server.get("/v1/models", wrong)[0] == 401
    assert server.post({"prompt": "a"}, right)[0] == 200
    assert server.get("/v1/models", {**right, "Host": "my-computer.example:8000"})[0] == 200
    assert server.get("/v1/models", {**right, "Origin": "http://evil.example"})[0] == 403


@pytest.mark.parametrize(("overrides", "words"), [
    ("server.host=0.0.0.0", "server.host=0.0.0.0 can be reached"), ("server.host=192.168.1.2", "server.token"), ("server.token=short", "server.token is too short"),
    ("server.port=70000", "server.port=70000"), ("server.max_texts=0", "server.max_texts=0"), ("server.read_seconds=0", "server.read_seconds"),
])
def test_bad_settings_are_one_line_before_torch(overrides, words):
    with pytest.raises(ConfigError) as error:
        make_sample_config(*overrides.split())
    assert words in str(error.value) and "\n" not in str(error.value)
    assert make_sample_config("server.host=0.0.0.0", "server.token=long-enough").server.token == "long-enough"


def test_a_port_that_is_taken_is_one_line():
    cfg = make_sample_config("server.port=0").server
    with bind(cfg) as first:
        first.listen()
        cfg.port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"server.port={cfg.port} cannot be used.*server.port=0"):
            bind(cfg)
    cfg.host = "no.such.host.invalid"
    with pytest.raises(ConfigError, match=r"server.host=no.such.host.invalid"):
        bind(cfg)


# ---- 开始与结束 ----


def test_shutting_down_ends_streams_and_takes_no_time(serve):
    server = serve(tiny(ByteTokenizer()), sampler=POEM_SAMPLER)
    connection, response = server.open_stream(prompt="~|", max_tokens=100_000)
    reader = events(response)
    next(reader)
    started = time.monotonic()
    server.server.should_exit = True
    *_, last = reader
    assert last["error"]["code"] == "stopping"
    server.thread.join(10)
    assert not server.thread.is_alive() and time.monotonic() - started < 5
    connection.close()


@pytest.mark.skipif(os.name == "nt", reason="signals to a child work differently on Windows")
def test_the_command_serves_a_trained_model_until_ctrl_c(own_run):
    command = [sys.executable, str(ROOT / "run_sample.py"), "serve=true", "server.port=0", "max_new_tokens=30", "device=cpu", "fast=false"]
    process = subprocess.Popen(command, cwd=own_run, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        line = process.stderr.readline()
        address = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert address, line
        connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=30)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "the king and"}), {"Content-Type": "application/json"})
        text = json.loads(connection.getresponse().read())["choices"][0]["text"]
        one_shot = typed("run_sample.py", own_run, "start=the king and", "max_new_tokens=30", "device=cpu", "fast=false")
        assert one_shot.stdout == f"the king and{text}\n"
        connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=30)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "a", "max_tokens": 4000, "n": 8, "stream": True}), {"Content-Type": "application/json"})
        stream = events(connection.getresponse())
        assert next(stream)["choices"]
        process.send_signal(signal.SIGINT)
        *_, last = stream
        assert last["error"]["code"] == "stopping"
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0 and out == "" and err == ""
    finally:
        process.kill()
        process.communicate()


def test_a_missing_server_library_is_one_line(in_tmp):
    code = "import sys; sys.modules['uvicorn'] = None; import nanogpt.serve.server"
    done = subprocess.run([sys.executable, "-c", code], env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, encoding="utf-8")
    assert "ConfigError: serve=true needs the package fastapi uvicorn; install it with: pip install fastapi uvicorn" in done.stderr
