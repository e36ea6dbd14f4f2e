"""Requests in, whole characters out: stop strings, end of text, queueing, out of memory."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_model_config, wild_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import STREAMED, some_ids

from nanogpt.base.language import ConfigError
from nanogpt.core import generate
from nanogpt.core.model import GPT
from nanogpt.core.sampling import sampler
from nanogpt.data.labels import with_labels
from nanogpt.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer
from nanogpt.write import engine
from nanogpt.write.engine import Writer, longest_beginning, write_sample
from nanogpt.write.request import Piece, Request, default_prompt, encode_prompt

GREEDY = sampler(temperature=0.0)
TOKENIZER = CharTokenizer("abcdefghijk")
# 8 是分隔符，9、10 是标签
DOCUMENTS = with_labels(CharTokenizer("abcdefgh"), {"style": ["x", "y"]}, grow=True)


@pytest.fixture
def model():
    return wild_model(ngrams=[2], ngram_buckets=99)


def write(model, *requests, tokenizer=TOKENIZER, **options):
    """Texts of all requests; the pieces must join to the results."""
    pieces = list(Writer(model, tokenizer, **options).write(requests))
    texts = ["".join(p.text for p in pieces if p.key == key) for key in range(len(requests))]
    results = {p.key: p.result for p in pieces if p.result}
    assert [results[key].text for key in range(len(requests))] == texts
    return texts


class Scripted:
    """A "model" that writes the given ids one after the other, whatever it reads."""

    device, dtype = torch.device("cpu"), torch.float32
    last_hidden = GPT.last_hidden

    def __init__(self, ids, vocab_size):
        self.ids, self.vocab_size, self.read = ids, vocab_size, 0
        self.config = tiny_model_config(vocab_size=vocab_size, block_size=64)

    def hidden(self, idx, cache):
        cache.begin(idx.size(1))
        cache.advance(idx)
        return torch.zeros(*idx.shape, 16)

    def logits(self, hidden):
        logits = torch.zeros(hidden.size(0), self.vocab_size)
        logits[:, self.ids[min(self.read, len(self.ids) - 1)]] = 50.0
        self.read += 1
        return logits

    def next_logits(self, idx, cache):
        return self.logits(self.hidden(idx[:, None], cache)[:, -1])


def test_many_requests_with_few_rows_equal_one_by_one(model):
    requests = [Request(prompt, GREEDY, n, seed=0) for prompt, n in (("abc", 20), ("k", 5), ("hfedb", 33), ("aa", 1), ("cab", 20))]
    alone = [write(model, request)[0] for request in requests]
    for capacity in (1, 2, 5):
        assert write(model, *requests, capacity=capacity) == alone
    assert [len(text) for text in alone] == [20, 5, 33, 1, 20]


def test_texts_under_way_wait_for_few_ids_of_others(model, monkeypatch):
    monkeypatch.setattr(engine, "READ_PER_STEP", 10)
    writer = Writer(model, TOKENIZER, capacity=8)
    writer.submit(Request("abc", GREEDY, 20, 0))
    writer.step()
    for prompt in ("abcd", "abcd", "abcdabcdabcdab", "a", "a"):
        writer.submit(Request(prompt, GREEDY, 20, 0))
    rows = []
    for _ in range(3):
        writer.step()
        rows.append(len(writer.decoder.rows))
    assert rows == [3, 4, 6]


def test_looking_a_step_ahead_changes_nothing(model):
    requests = [Request(prompt, chosen, n, seed=3) for prompt, n in (("abc", 20), ("k", 1), ("hfedb", 33)) for chosen in (sampler(), GREEDY)]
    plain = write(model, *requests, capacity=2)
    ahead = Writer(model, TOKENIZER, capacity=2)
    ahead.lookahead = True
    pieces = list(ahead.write(requests))
    assert ["".join(p.text for p in pieces if p.key == key) for key in range(len(requests))] == plain


def test_a_shorter_cache_changes_nothing_where_the_text_fits(model):
    request = Request("abc", GREEDY, 9, seed=0)
    assert write(model, request, max_length=12) == write(model, request)


def test_a_text_ends_before_its_stop_string_wherever_the_pieces_break():
    text = "春天来了。夏天也来了。END"
    ids = list(ByteTokenizer().encode(text))
    for stop, want in (("夏天", "春天来了。"), ("也来", "春天来了。夏天"), ("END", "春天来了。夏天也来了。"), ("春", ""), ("无", text)):
        pieces = list(Writer(Scripted(ids, 256), ByteTokenizer()).write([Request("x", GREEDY, len(ids), seed=0, stop=("zzz", stop))]))
        assert "".join(p.text for p in pieces) == want and pieces[-1].result.finish == ("length" if stop == "无" else "stop")


def test_the_earliest_of_several_stop_strings_counts():
    ids = list(TOKENIZER.encode("abcdefgh"))
    assert write(Scripted(ids, 11), Request("k", GREEDY, 8, seed=0, stop=("fg", "cde", "cd"))) == ["ab"]


@pytest.mark.parametrize(("text", "stops", "want"), [("abc", ("cd",), 1), ("abc", ("bcd", "c!"), 2), ("abc", ("abc",), 3), ("abc", ("x",), 0), ("abc", (), 0), ("aaa", ("aab",), 2)])
def test_what_may_be_the_beginning_of_a_stop_string_is_held_back(text, stops, want):
    assert longest_beginning(text, stops) == want


@pytest.mark.parametrize("text", ["春天的花朵 blossoms\n开了", "a\nb\n\n", "😀\n"])
def test_streaming_never_shows_half_a_character(text):
    ids = list(ByteTokenizer().encode(text))
    pieces = list(Writer(Scripted(ids, 256), ByteTokenizer()).write([Request("x", GREEDY, len(ids), seed=0)]))
    assert "".join(p.text for p in pieces) == text and not any("�" in p.text for p in pieces)


def test_half_a_character_at_the_very_end_is_marked():
    ids = list(ByteTokenizer().encode("春天"))[:-1]
    assert write(Scripted(ids, 256), Request("x", GREEDY, 5, seed=0), tokenizer=ByteTokenizer()) == ["春�"]
    broken = [0xFF, 0xE6, 0x41, 0x80]
    assert write(Scripted(broken, 256), Request("x", GREEDY, 4, seed=0), tokenizer=ByteTokenizer()) == [ByteTokenizer().decode(broken)]


def test_bytes_of_a_library_tokenizer_end_a_text_at_once_and_half_a_character_is_dropped_by_an_interruption():
    tokenizer = STREAMED["byte fallback"]()
    the, newline = tokenizer.encode("the")[-1], 3 + ord("\n")
    stopped = list(Writer(Scripted([the, newline], tokenizer.vocab_size), tokenizer).write([Request("a", GREEDY, 9, seed=0, stop=("\n",))]))
    assert "".join(p.text for p in stopped) == "the" and (stopped[-1].result.finish, stopped[-1].result.tokens) == ("stop", 2)
    writer = Writer(Scripted([3 + byte for byte in "春天".encode()], tokenizer.vocab_size), tokenizer)
    key = writer.submit(Request("a", GREEDY, 9, seed=0))
    assert "".join(piece.text for _ in range(5) for piece in writer.step()) == "春" and writer.interrupt(key).text == ""


@pytest.mark.parametrize("kind", STREAMED)
def test_any_ids_are_shown_as_they_decode_behind_the_prompt_up_to_the_first_stop_string(kind):
    tokenizer = STREAMED[kind]()

    @settings(max_examples=6)
    @given(some_ids(tokenizer), some_ids(tokenizer), st.integers(0, 20))
    def check(prompt, ids, at):
        # 词表之外的 id 抽不到
        prompt, ids = ([i for i in some if i < tokenizer.vocab_size] for some in ([0, *prompt], [*ids, 0]))
        left = len(tokenizer.decode(prompt)) - len(tokenizer.stream(prompt).finish())
        text = tokenizer.decode(prompt + ids)[left:]
        model, base = Scripted(ids, tokenizer.vocab_size), Request("…", GREEDY, len(ids), seed=0, ids=tuple(prompt), stop_at_end_of_text=False)
        assert write(model, base, tokenizer=tokenizer) == [text]
        model.read, stop = 0, text[at : at + 2] or "无"
        assert write(model, replace(base, stop=(stop,)), tokenizer=tokenizer) == [text.partition(stop)[0]]

    check()


def test_a_word_behind_the_prompt_keeps_its_space():
    tokenizer = STREAMED["vocab.txt"]()
    ids = [int(i) for i in tokenizer.encode("world hello")]
    assert write(Scripted(ids, tokenizer.vocab_size), Request("hello", GREEDY, 2, seed=0), tokenizer=tokenizer) == [" world hello"]


@pytest.fixture
def letters():
    """A byte-pair vocabulary of single bytes with an end-of-text token."""
    return BPETokenizer("letters", r".+|\n", {bytes((i,)): i for i in range(256)}, {"<|endoftext|>": 256})


def test_the_end_of_text_token_ends_a_row_and_is_never_shown(letters):
    ids = [97, 98, 256, 99]
    request = Request("x", GREEDY, 4, seed=0)
    pieces = list(Writer(Scripted(ids, 257), letters).write([request]))
    assert "".join(p.text for p in pieces) == "ab" and pieces[-1].result.finish == "end_of_text"
    assert write(Scripted(ids, 257), Request("x", GREEDY, 4, seed=0, stop_at_end_of_text=False), tokenizer=letters) == ["ab<|endoftext|>c"]


def test_a_prompt_may_name_the_end_of_text_token(letters):
    assert encode_prompt(letters, "<|endoftext|>ab<|endoftext|>").tolist() == [256, 97, 98, 256]
    assert encode_prompt(letters, "ab").tolist() == [97, 98]
    assert encode_prompt(CharTokenizer("<|endoftx>ab"), "<|endoftext|>").size == 13


@pytest.mark.parametrize("tokenizer", [*STREAMED, "春天", "to be", "to."])
def test_the_default_prompt_can_be_read_whatever_the_vocabulary(tokenizer):
    tokenizer = STREAMED[tokenizer]() if tokenizer in STREAMED else CharTokenizer("".join(sorted(set(tokenizer))))
    prompt = default_prompt(tokenizer, None)
    assert prompt and prompt in tokenizer.decode(encode_prompt(tokenizer, prompt)) and default_prompt(tokenizer, 3) == ""
    assert prompt == "\n" or "\n" not in tokenizer.decode(tokenizer.encode("\n", skip_unknown=True))


def test_unknown_characters_are_named_or_skipped(model):
    with pytest.raises(ConfigError, match="lacks 'x' 'z'; leave them out, or train"):
        write(model, Request("azbx", GREEDY, 3, seed=0))
    assert write(model, Request("azbx", GREEDY, 3, seed=0, skip_unknown=True)) == write(model, Request("ab", GREEDY, 3, seed=0))
    with pytest.raises(ConfigError, match="the prompt 'zx': the vocabulary has none of its characters"):
        write(model, Request("zx", GREEDY, 3, seed=0, skip_unknown=True))


def test_the_prefix_is_read_but_not_part_of_the_text(model):
    assert write(model, Request("abc", GREEDY, 9, seed=0, prefix="kj")) == write(model, Request("kjabc", GREEDY, 9, seed=0))


def test_cancelled_requests_leave_the_others_alone(model):
    requests = [Request(prompt, GREEDY, 20, seed=0) for prompt in ("abc", "k", "hfedb")]
    alone = [write(model, request)[0] for request in requests]
    busy = Writer(model, TOKENIZER, capacity=2)
    keys = [busy.submit(request) for request in requests]
    got = dict.fromkeys(keys, "")
    for step in range(60):
        if step == 7:
            busy.cancel(keys[0])
        for piece in busy.step():
            got[piece.key] += piece.text
    assert got[keys[1]] == alone[1] and got[keys[2]] == alone[2] and alone[0].startswith(got[keys[0]]) and len(got[keys[0]]) == 7
    busy.cancel(keys[0])
    assert busy.step() == []


def test_out_of_memory_halves_the_rows_and_loses_nothing(model, monkeypatch):
    requests = [Request(prompt, chosen, 30, seed=3) for prompt in ("abc", "k", "hfedb", "b") for chosen in (sampler(), GREEDY)]
    calm = write(model, *requests, capacity=8)
    real, limit = generate.Decoder.step, [8]

    def tight(self):
        if len(self.rows) > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.rows[0].count == 5 and limit[0] > 2:
            limit[0] //= 2
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self)

    monkeypatch.setattr(generate.Decoder, "step", tight)
    assert write(model, *requests, capacity=8) == calm and limit[0] == 2
    limit[0] = 0
    with pytest.raises(ConfigError, match="out of memory even with one text"):
        write(model, requests[0])


def test_a_damaged_model_is_one_line(model):
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ConfigError, match="not finite"):
        write(model, Request("abc", GREEDY, 3, seed=0))


def test_a_sample_leaves_the_training_state_as_it_was(model):
    model.train()
    before = torch.get_rng_state()
    text = write_sample(model, TOKENIZER, "abc", 12, sampler=sampler(temperature=0.8), seed=5)
    assert model.training and torch.equal(before, torch.get_rng_state()) and text.startswith("abc") and len(text) == 15
    assert text == write_sample(model, TOKENIZER, "abc", 12, sampler=sampler(temperature=0.8), seed=5)


def test_results_count_tokens_and_seconds(model):
    result = [p.result for p in Writer(model, TOKENIZER).write([Request("abc", GREEDY, 8, seed=0)])][-1]
    assert (result.tokens, result.prompt_tokens, result.finish) == (8, 3, "length") and 0 < result.seconds_to_first_token <= result.seconds
    assert Piece(0, "a", "b").result is None


# ---- 成篇的模型 ----


@pytest.fixture
def document_model():
    return wild_model(separator=8, ngrams=[2], ngram_buckets=99)


def document_requests(count=30, **changes):
    """Guided, labelled and plain texts side by side."""
    cases = [("abc", (9,), 2.5), ("", (10,), 1.0), ("hfedb", (9, 10), 0.5), ("", (), 1.0), ("b", (), 3.0), ("g", (10,), 0.0)]
    return [
        Request(prompt, chosen, count, seed=3, prefix_ids=ids, guidance=guidance, **changes)
        for prompt, ids, guidance in cases for chosen in (sampler(repetition_penalty=1.2), GREEDY)
    ]


def test_guided_texts_share_few_rows_and_look_ahead_as_if_alone(document_model):
    requests = document_requests()
    alone = [write(document_model, request, tokenizer=DOCUMENTS)[0] for request in requests]
    assert write(document_model, *requests, tokenizer=DOCUMENTS, capacity=2) == alone
    ahead = Writer(document_model, DOCUMENTS, capacity=5)
    ahead.lookahead = True
    assert [r.text for r in results_of(ahead, requests)] == alone


def results_of(writer, requests):
    found = {p.key: p.result for p in writer.write(requests) if p.result}
    return [found[key] for key in range(len(requests))]


def test_out_of_memory_halves_guided_texts_too_and_loses_nothing(document_model, monkeypatch):
    # 每篇短于上下文：半路重读的一行看到的正是原来那些
    requests = document_requests(9)
    calm = write(document_model, *requests, tokenizer=DOCUMENTS, capacity=12)
    real, limit = generate.Decoder.step, [20]

    def tight(self):
        if len(self.lanes) > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.rows[0].count == 2 and limit[0] > 2:
            limit[0] //= 2
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self)

    monkeypatch.setattr(generate.Decoder, "step", tight)
    assert write(document_model, *requests, tokenizer=DOCUMENTS, capacity=12) == calm and limit[0] == 2


def test_guidance_zero_is_writing_without_labels_and_guidance_one_is_writing_with_them(document_model):
    def texts(ids, guidance):
        return [write(document_model, Request(p, GREEDY, 25, seed=0, prefix_ids=ids, guidance=guidance), tokenizer=DOCUMENTS)[0] for p in ("", "abc", "hhgfa")]

    assert texts((9,), 0.0) == texts((), 1.0) == texts((), 4.0)
    assert len({str(texts(ids, guidance)) for ids, guidance in (((9,), 1.0), ((9,), 3.0), ((), 1.0))}) == 3


def test_a_model_of_documents_begins_with_its_separator_and_takes_an_empty_prompt(document_model, model):
    empty, behind = results_of(Writer(document_model, DOCUMENTS), [Request("", GREEDY, 5, seed=0, prefix_ids=(9,)), Request("ab", GREEDY, 5, seed=0)])
    assert (empty.prompt_tokens, behind.prompt_tokens) == (2, 3)
    with pytest.raises(ConfigError, match="empty"):
        write(model, Request("", GREEDY, 3, seed=0))


@pytest.mark.parametrize("lookahead", [False, True])
def test_behind_the_end_of_a_document_another_one_begins(document_model, lookahead):
    torch.nn.init.constant_(document_model.lm_head.weight, 0.0)
    request = Request("abc", sampler(), 60, seed=1, prefix_ids=(9,), guidance=2.0, stop_at_end_of_text=False)
    writer = Writer(document_model, DOCUMENTS)
    writer.lookahead = lookahead
    got, read = [], []
    real = generate.Decoder._open_lanes

    def noting(self, row, ids):
        real(self, row, ids)
        read.append([lane.unread.tolist() for lane in self.lanes])

    generate.Decoder._open_lanes = noting
    try:
        got = results_of(writer, [request])[0]
    finally:
        generate.Decoder._open_lanes = real
    assert got.tokens == 60 and len(read) > 3 and read[0] == [[8, 9, 0, 1, 2], [8, 0, 1, 2]] and all(lanes == [[8, 9], [8]] for lanes in read[1:])
    # 均匀的 logits：抽到什么只看随机数，接在哪里都一样
    once = Writer(wild_model(separator=8, ngrams=[2], ngram_buckets=99), DOCUMENTS)
    torch.nn.init.constant_(once.model.lm_head.weight, 0.0)
    assert got.text == results_of(once, [request])[0].text


@pytest.mark.parametrize("lookahead", [False, True])
def test_texts_of_documents_are_scored_behind_their_separator_and_labels(document_model, lookahead):
    requests = [Request(prompt, GREEDY, n, seed=0, prefix_ids=(9,), logprobs=2, score_prompt=True) for prompt, n in (("abc", 5), ("", 3), ("hfedb", 0))]
    writer = Writer(document_model, DOCUMENTS, capacity=2)
    writer.lookahead = lookahead
    pieces = list(writer.write(requests))
    for key, request in enumerate(requests):
        scores = [score for piece in pieces if piece.key == key for score in piece.scores]
        text = request.prompt + "".join(piece.text for piece in pieces if piece.key == key)
        ids = DOCUMENTS.encode(text).tolist()
        with torch.no_grad():
            logits = document_model(torch.tensor([[8, 9, *ids]]))[0, 1:-1]
        # 标签从不抽取：写出来的字，概率里没有它们；开头则照一次普通的前向
        logits[len(request.prompt) :, 9:] = -torch.inf
        wanted = logits.log_softmax(-1)
        assert [score.token for score in scores] == list(text) and [score.offset for score in scores] == list(range(len(text)))
        torch.testing.assert_close(torch.tensor([score.logprob for score in scores]), wanted[range(len(ids)), ids], atol=1e-5, rtol=1e-5)
        assert all(list(score.top.values())[:2] == pytest.approx(row.topk(2).values.tolist(), abs=1e-5) for score, row in zip(scores, wanted))


def test_scores_survive_too_little_memory_and_a_damaged_model_is_one_line(model, monkeypatch):
    requests = [Request(prompt, GREEDY, n, seed=0, logprobs=1, score_prompt=True) for prompt, n in (("abc", 4), ("k", 0), ("hfedb", 2))]

    def scores(**options):
        pieces = Writer(model, TOKENIZER, **options).write(requests)
        return sorted((p.key, score.offset, score.token, round(score.logprob or 0, 3)) for p in pieces for score in p.scores)

    calm, real = scores(capacity=1), engine.scoring.read
    failures = [torch.OutOfMemoryError("CUDA out of memory")]

    def tight(*arguments, **options):
        if len(failures) == 1 and len(arguments[1]) == 5:
            raise failures.pop()
        return real(*arguments, **options)

    monkeypatch.setattr(engine.scoring, "read", tight)
    assert scores(capacity=2) == calm and len(calm) == 7 + 1 + 7 and not failures
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ConfigError, match="not finite"):
        scores()
