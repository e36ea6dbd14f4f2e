"""chat=true and /v1/chat/completions: a model trained on conversations answers, once, in a conversation and over HTTP."""

import contextlib
import io
import json
from dataclasses import replace

import pytest
from conftest import make_config, make_sample_config, resumed_trainer, train, wild_model
from typed import typed

import nanogpt
from nanogpt.base.language import ConfigError
from nanogpt.core.sampling import sampler
from nanogpt.data.chat import question_ids, turn_end, with_template
from nanogpt.data.tokenizer import ByteTokenizer, CharTokenizer, LibraryTokenizer
from nanogpt.data.tokenizer_files import read_tokenizer, to_library_json
from nanogpt.plan.filled_config import filled
from nanogpt.weights.build import build_model, preset
from nanogpt.weights.export import export
from nanogpt.weights.huggingface import write_family
from nanogpt.weights.pretrained import Pretrained
from nanogpt.write import loading
from nanogpt.write.chat import Chat
from nanogpt.write.chat_session import ChatSession
from nanogpt.write.engine import write_sample
from nanogpt.write.loading import Model, Settings
from nanogpt.write.terminal import from_a_pipe, toolbar

# 问一个字母，答它的大写三遍；再问一次，答得一样：第二句要看得见前面的
LETTERS = "abcdefghijklmnop"
LEARNING = [
    "model.n_layer=2", "model.n_head=2", "model.n_embd=32", "model.block_size=32", "model.ngrams=[2]", "model.ngram_buckets=97", "optimizer.ngram_lr_scale=3", "optimizer.embedding_lr_scale=1", "batch_size=8",
    "dataset=chat", "dataset.path=talks.jsonl", "dataset.dir=talks", "dataset.val_fraction=0.1",
    "max_iters=60", "eval_interval=60", "learning_rate=2e-2", "warmup_iters=2", "logger=none", "device=cpu", "sample_tokens=8", "log_interval=30",
]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A folder with outputs/run, trained on such conversations; it stays the current one."""
    folder = tmp_path_factory.mktemp("answers")
    talks = [[f"say {a}{b}", b.upper() * 3, "again", b.upper() * 3] for a in LETTERS for b in LETTERS[:6]]
    lines = (json.dumps({"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(talk)]}) for talk in talks)
    (folder / "talks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with contextlib.chdir(folder):
        trainer = train(LEARNING)
        assert trainer.data.question in trainer.last_sample and trainer.cfg.model.marked and trainer.cfg.model.separator is None
        yield folder


@pytest.fixture(scope="module")
def answers(learned):
    """The model, opened as run_sample.py opens it."""
    cfg = make_sample_config("out_dir=outputs/run", "chat=true", "temperature=0", "fast=false", "max_new_tokens=6")
    return loading.open_model(cfg, learned / "outputs" / "run"), cfg


def test_a_model_that_learned_answers_alone_answers_and_stops(learned):
    done = typed("run_sample.py", learned, "out_dir=outputs/run", "chat=true", 'starts=["say pa","say ad"]', "temperature=0", "fast=false", "output=answers.jsonl")
    assert done.stdout.split("\n")[::2][:2] == ["AAA", "DDD"]
    records = [json.loads(line) for line in (learned / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["prompt"], r["text"], r["finish"], r["tokens"]) for r in records] == [("say pa", "AAA", "end_of_text", 3), ("say ad", "DDD", "end_of_text", 3)]


def test_a_system_text_that_the_vocabulary_cannot_read_is_refused_or_named(answers, capsys):
    model, cfg = answers
    session = ChatSession(cfg, model, piped=True)
    before = session.chat.system
    assert from_a_pipe(session, io.BytesIO("/system § be\nsay pa\n".encode())) == 2
    out, err = capsys.readouterr()
    assert "the vocabulary lacks '§'; leave them out, pass over them with /unknown skip" in err and session.chat.system == before and "AAA" in out
    # 命令行上写的，到第一问才读：说是它
    session.chat.system = "§"
    with pytest.raises(ConfigError, match="^system: the vocabulary lacks '§'"):
        session.write("say pa")
    with pytest.raises(ConfigError, match="^the vocabulary lacks '§'"):
        session.write("say §")


def test_a_conversation_is_remembered_until_it_is_reset(answers, capsys, tmp_path):
    model, cfg = answers
    session = ChatSession(cfg, model, piped=True)
    lines = ["say pa", "again", "/again", "/system be", "/tokens 5", "/reset", "say ad", "again", f"/save all {tmp_path / 'a.txt'}", "/more", f"/save {tmp_path / 'a.jsonl'}"]
    assert from_a_pipe(session, io.BytesIO("\n".join(lines).encode())) == 2
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if not line.startswith("-")] == ["AAA", "AAA", "AAA", "DDD", "DDD"]
    assert len(session.said) == 4 and session.chat.system == "be" and "/more: there is no such command" in err
    assert (tmp_path / "a.txt").read_text(encoding="utf-8").startswith("> say pa\nAAA\n")
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))["text"] == "DDD"
    session.handle("/help")
    session.handle("/settings")
    assert "/reset" in (said := capsys.readouterr().err) and "system=be" in said and "control=" not in said and toolbar(session)


def test_a_mistake_leaves_the_conversation_as_it_was(answers, capsys):
    model, cfg = answers
    session = ChatSession(cfg, model, piped=True)
    session.handle("say pa")
    before = list(session.said)
    with pytest.raises(ConfigError, match="'é'.*/unknown skip"):
        session.handle("é")
    session.cfg.batch_size, kept = 0, session.cfg.batch_size
    with contextlib.suppress(Exception):
        session.handle("/again")
    session.cfg.batch_size = kept
    assert session.said == before
    session.handle("/unknown skip")
    session.handle("éagain")
    assert capsys.readouterr().out.count("AAA") == 2
    # 一个字也不剩的，不当作空的来问
    with pytest.raises(ConfigError, match="the prompt 'é': the vocabulary has none of its characters"):
        session.handle("é")


def test_another_answer_after_a_reset_begins_the_conversation(answers, capsys):
    model, cfg = answers
    session = ChatSession(cfg, model, piped=True)
    for line in ("say pa", "/reset", "/again"):
        session.handle(line)
    assert session.said == [{"role": "user", "content": "say pa"}, {"role": "assistant", "content": "AAA"}]
    session.handle("/again")
    assert len(session.said) == 2


def test_from_python_a_question_is_answered_as_the_command_does(learned):
    writer = nanogpt.load("outputs/run", "chat=true", "temperature=0", "device=cpu", "fast=false")
    assert writer.write("say pa") == writer.write(None, "start=say pa") == "AAA"
    for key in ("num_samples=2", "output=a.jsonl", "checkpoint=last", "interactive=true", "start=say ad"):
        with pytest.raises(ConfigError, match=f"^{key.partition('=')[0]}=…: "):
            writer.write("say pa", key)


def test_a_conversation_longer_than_the_context_forgets_its_oldest_questions(answers):
    model, cfg = answers
    chat, settings = Chat(model, "go"), replace(Settings.of(cfg), max_new_tokens=500)
    talk = [{"role": role, "content": text} for i in range(4) for role, text in (("user", f"say {'abcd'[i]}"), ("assistant", "AAA"))] + [{"role": "user", "content": "again"}]
    request = chat.request(settings, talk, forget=True)
    kept = [{"role": "system", "content": "go"}, talk[-1]]
    assert request.ids == tuple(question_ids(model.tokenizer, kept).tolist()) and len(request.ids) <= 16
    with pytest.raises(ConfigError, match="more than the model's context of 32; say less"):
        chat.request(settings, talk)
    with pytest.raises(ConfigError, match="say less"):
        chat.request(settings, [{"role": "user", "content": "a" * 40}], forget=True)


def test_the_run_goes_on_is_tuned_and_leaves_with_its_template(learned, tmp_path):
    trainer = resumed_trainer("outputs/run", "max_iters=62")
    trainer.fit()
    template = trainer.data.tokenizer.chat_template
    assert trainer.progress.iteration == 62 and template
    pretrained = export("outputs/run", tmp_path / "out")
    again = read_tokenizer(tmp_path / "out", pretrained.config.vocab_size)
    assert again.chat_template["template"] == template["template"] == pretrained.tokenizer.chat_template["template"]
    told = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert told["chat_template"] == template["template"] and told["eos_token"] == "<|endoftext|>"
    tuned = train([*LEARNING, "init_from=outputs/run", "dataset.dir=again", "max_iters=1", "eval_interval=1", "warmup_iters=0"], out="outputs/tuned")
    assert tuned.data.tokenizer.to_dict() == trainer.data.tokenizer.to_dict()
    # 续写时它就是一个普通的模型
    assert typed("run_sample.py", learned, "out_dir=outputs/run", "start=say", "max_new_tokens=4", "fast=false").stdout.startswith("say")


def test_every_end_of_an_answer_is_known_whatever_the_vocabulary_calls_its_end():
    tokenizer = ByteTokenizer(("<|endoftext|>", "<|im_end|>"))
    tokenizer.chat_template = {"template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "bos_token": "", "eos_token": "<|endoftext|>"}
    model = Model("m", wild_model(vocab_size=258, block_size=32), tokenizer, contextlib.nullcontext)
    request = Chat(model).request(Settings.of(make_sample_config()), [{"role": "user", "content": "a"}])
    assert request.ids == (97, 257) and request.ends == (257,) == (turn_end(tokenizer),)
    sample = write_sample(wild_model(vocab_size=258, block_size=32, marked=True), tokenizer, "a", 4, sampler=sampler(temperature=1.0), seed=1)
    assert sample.startswith("a\n")


def test_a_plan_knows_that_rows_hold_conversations(learned):
    for more in ([], ["init_from=outputs/run"]):
        model = filled(make_config(*LEARNING, *more))[0].model
        assert model.marked and model.separator is None and model.vocab_size == 29
    (learned / "my.txt").write_text("a", encoding="utf-8")
    assert not filled(make_config("dataset=text_file", "dataset.path=my.txt", "init_from=outputs/run"))[0].model.marked


@pytest.mark.parametrize(("overrides", "message"), [
    (["system=x"], "add chat=true or serve=true"), (["chat=true", "control.style=poetic"], "chat=true takes no control.style"), (["chat=true", "serve=true"], "leave out chat"),
])
def test_what_does_not_go_together_is_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_sample_config(*overrides)


def test_a_model_without_a_template_says_how_to_get_one():
    plain = Model("outputs/plain", wild_model(), CharTokenizer("abcdefghijk"), contextlib.nullcontext)
    with pytest.raises(ConfigError, match="chat=true: outputs/plain has no chat template.*dataset=chat"):
        Chat(plain)


# ---- HTTP ----


@pytest.fixture(scope="module")
def served(learned):
    pytest.importorskip("fastapi", reason="the server needs FastAPI and uvicorn: pip install -e .[serve]")
    from test_server import Served

    model = loading.open_model(make_sample_config("out_dir=outputs/run", "fast=false"), learned / "outputs" / "run")
    server = Served(model, overrides=["temperature=0"])
    yield server
    server.stop()


LLAMA = {
    "norm_gain": True, "activation": "swiglu", "qk_norm": False, "embed_norm": False, "ngrams": [], "logit_softcap": 0.0, "tie_embeddings": True, "init": "gpt2",
    "intermediate_size": 32, "norm_eps": 1e-5,
}
URL = "/v1/chat/completions"
ASKED = [{"role": "user", "content": "say pa"}]


def test_a_chat_client_gets_an_answer_in_openais_form(served):
    # 官方客户端带回来的回答有许多 null
    talk = [*ASKED, {"role": "assistant", "content": "AAA", "refusal": None, "tool_calls": None}, {"role": "user", "content": [{"type": "text", "text": "again"}]}]
    for messages in (ASKED, talk):
        status, answer, _ = served.post({"model": "run", "messages": messages, "max_completion_tokens": 9, "n": 2, "tools": [], "response_format": {"type": "text"}}, path=URL)
        assert status == 200 and answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-"), answer
        for index, choice in enumerate(answer["choices"]):
            assert choice == {"index": index, "message": {"role": "assistant", "content": "AAA", "refusal": None}, "logprobs": None, "finish_reason": "stop"}
        read = len(question_ids(served.model.tokenizer, [{"role": "user", "content": "say pa"}] if messages is ASKED else [*talk[:2], {"role": "user", "content": "again"}]))
        assert answer["usage"] == {"prompt_tokens": read, "completion_tokens": 6, "total_tokens": read + 6}
    assert served.post({"messages": ASKED, "stop": "AA"}, path=URL)[1]["choices"][0]["message"]["content"] == ""
    assert served.post({"messages": ASKED, "max_tokens": 2}, path=URL)[1]["choices"][0]["finish_reason"] == "length"
    told = [{"role": "developer", "content": "again"}, *ASKED]
    assert served.post({"messages": told}, path=URL)[1]["usage"]["prompt_tokens"] > answer["usage"]["prompt_tokens"] - 8
    assert json.loads(served.get("/v1/models")[2])["data"][0]["chat"] is True


def test_an_answer_is_streamed_in_chunks(served):
    from test_server import events

    connection, response = served.send("POST", URL, {"messages": ASKED, "stream": True, "stream_options": {"include_usage": True}})
    with contextlib.closing(connection):
        *chunks, usage, done = events(response)
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"]["completion_tokens"] == 3
    assert {chunk["object"] for chunk in (*chunks, usage)} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant" and all("role" not in delta for delta in deltas[1:])
    assert "".join(delta["content"] for delta in deltas) == "AAA" and chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(("changes", "code", "param"), [
    ({"messages": None}, "no_messages", "messages"), ({"messages": []}, "no_messages", "messages"), ({"messages": [{"role": "tool", "content": "x"}]}, "no_messages", "messages"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "no_messages", "messages"),
    ({"messages": [*ASKED, {"role": "assistant", "content": "A"}]}, "out_of_range", "messages"), ({"messages": [{"role": "user", "content": "a" * 60}]}, "chat_too_long", "messages"),
    ({"messages": [{"role": "user", "content": "é"}]}, "unknown_characters", "messages"), ({"prompt": "a"}, "unknown_field", "prompt"), ({"tools": [{}]}, "out_of_range", "tools"),
    ({"max_tokens": 0}, "out_of_range", "max_tokens"), ({"logprobs": True}, "out_of_range", "logprobs"),
])
def test_mistakes_in_a_conversation_are_named(served, changes, code, param):
    status, answer, _ = served.post({"messages": ASKED, **changes}, path=URL)
    assert status == 400 and (answer["error"]["code"], answer["error"]["param"]) == (code, param), answer
    if code == "out_of_range" and param == "messages":
        # 不是太长，是最后一句不该由它来说
        assert "[…, {role: assistant}]" in answer["error"]["message"]


def test_the_openapi_document_describes_conversations_and_every_reference_in_it_is_there(served):
    text = served.get("/openapi.json")[2].decode()
    schemas = json.loads(text)["components"]["schemas"]
    assert URL in json.loads(text)["paths"] and "MessageForm" in schemas
    assert all(f'"{name}"' in text for name in schemas)
    references = {part.split('"')[0] for part in text.split('"$ref":"#/components/schemas/')[1:]}
    assert references <= schemas.keys() and '"#/$defs' not in text
    status, answer, _ = served.post({}, path="/v1/responses")
    assert status == 404 and URL in answer["error"]["message"]


def test_system_is_told_first_and_a_broken_template_stops_only_conversations():
    pytest.importorskip("fastapi")
    from test_server import Served

    tokenizer = with_template(ByteTokenizer(), grow=True)
    model = Model("outputs/t", wild_model(vocab_size=tokenizer.vocab_size, block_size=64), tokenizer, contextlib.nullcontext)
    server = Served(model, overrides=["serve=true", "system=Be brief."])
    try:
        answer = server.post({"messages": ASKED, "max_tokens": 1}, path=URL)[1]
        assert answer["usage"]["prompt_tokens"] == len(question_ids(tokenizer, [{"role": "system", "content": "Be brief."}, *ASKED]))
    finally:
        server.stop()
    tokenizer.chat_template = {**tokenizer.chat_template, "template": "{% oops %}"}
    server = Served(model)
    try:
        assert server.post({"messages": ASKED}, path=URL)[0] == 404 and server.write(prompt="a", max_tokens=1)
    finally:
        server.stop()


def test_a_model_from_elsewhere_is_tuned_in_its_own_template_and_ends_where_that_ends(learned, tmp_path):
    from test_chat import CHATML, folder_of

    folder = folder_of(tmp_path / "base", "chatml")
    # 底座的结尾不是对话的结尾，Qwen 的底座就是这样
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "chat_template": CHATML}), encoding="utf-8")
    tokenizer = read_tokenizer(folder, 259)
    library = LibraryTokenizer(to_library_json(tokenizer), "<|endoftext|>")
    library.chat_template = tokenizer.chat_template
    config = preset("tiny", n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=259, **LLAMA)
    write_family(folder, Pretrained(config, dict(build_model(config, 0).state_dict()), library))
    tuned = train([*LEARNING, f"init_from={folder}", "dataset.dir=elsewhere", "model.block_size=48", "max_iters=2", "eval_interval=2", "warmup_iters=0"][6:], out="outputs/elsewhere")
    assert tuned.data.tokenizer.chat_template["template"] == CHATML and tuned.model.config.marked
    x, y = tuned.data.rows("train", tuned.data.starts(0, 0, 1, 48), 48)
    ids = tokenizer.special
    assert int((y == ids["<|im_end|>"]).sum()) >= 1 and ~int(x[0, 0]) == ids["<|im_start|>"]
    cfg = make_sample_config("out_dir=outputs/elsewhere", "fast=false")
    model = loading.open_model(cfg, learned / "outputs" / "elsewhere")
    request = Chat(model).request(Settings.of(cfg), ASKED)
    assert request.ends == (ids["<|im_end|>"],) and model.tokenizer.decode(request.ids) == tokenizer.decode(question_ids(tokenizer, ASKED))
