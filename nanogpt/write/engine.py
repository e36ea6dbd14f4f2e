"""The Writer, which turns text into text: requests become rows of the decode loop, ids become whole characters.

One-shot, batch, interactive and served writing all go through `Writer`.
"""

# 写作的引擎：Writer 收下任意多个 Request，至多 capacity 段一起写，其余排队，一步一步交出 Piece
# 它管 core 的 Decoder 不管的事：开头的编码、停止词、半个字符、评分、显存不够时减半重来；抽 token 的循环在 core/generate
# 一次写、一批、一问一答、服务器都用它；出错的那一段自己结束，别人照写（advance），或者抛出来（step）
# 文字写到哪里都由 ids 决定：缓存随时可以丢掉重读，写出的不变

import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from nanogpt.base.errors import is_out_of_memory, release
from nanogpt.base.language import ConfigError
from nanogpt.core import scoring
from nanogpt.core.generate import Decoder
from nanogpt.core.lanes import READ_PER_STEP
from nanogpt.core.sampling import Sampler
from nanogpt.core.scoring import Likely, Score
from nanogpt.data.chat import question_ids, turn_end
from nanogpt.data.labels import label_tokens
from nanogpt.data.tokenizer import LibraryStream, TextStream, Tokenizer, begin_of, ends_of
from nanogpt.write.request import Piece, Request, Result, default_prompt, encode_prompt, labels_of
from nanogpt.write.speed.speculation import decoder_of

# 训练中给人看的样本最多写几种标签
SAMPLED_LABELS = 6


@dataclass
class _Text:
    """A request under way."""

    # 写过的 ids 都在这里而不在缓存里：减半或换行之后重读一遍就接得上

    request: Request
    prompt_ids: np.ndarray
    prompt_tokens: int
    """Ids that are read before the first is drawn: separator and labels too."""
    stream: TextStream | LibraryStream
    ids: list[int] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    # 可能是停止词的开头，先不放出去
    held: str = ""
    # 还没随文字送出去的；None 表示开头还没评
    scores: list[Score] | None = None
    submitted: float = field(default_factory=time.perf_counter)
    first_token: float | None = None

    def take_scores(self) -> tuple[Score, ...]:
        """The scores that were not taken yet."""
        taken, self.scores = tuple(self.scores or ()), []
        return taken


class Writer:
    """Writes any number of requests, up to `capacity` of them together; the others wait for a free row.

    A model of documents reads its separator before every text, so that its prompt may be empty.
    """

    # texts 里是所有没完的，waiting 是其中还没占行的；key 由 submit 给出，各处都用它指一段文字

    def __init__(
        self, model, tokenizer: Tokenizer, *, capacity: int = 1, max_length: int | None = None,
        context=contextlib.nullcontext, speculate: int | str = "auto",
    ):
        self.model, self.tokenizer, self.context, self.speculate = model, tokenizer, context, speculate
        self.capacity, self.max_length = capacity, max_length
        self.separator: int | None = model.config.separator
        self.begin = begin_of(tokenizer) if self.separator is None else ()
        self.ends = ends_of(tokenizer)
        # GPU 上先排下一步，再读上一步的结果：取数与解码文字的时间藏在计算后面
        self.lookahead = model.device.type == "cuda"
        self._flight: tuple[list[int | None], torch.Tensor, Likely | None] | None = None
        self.decoder: Decoder | None = None
        self.texts: dict[int, _Text] = {}
        self.waiting: deque[int] = deque()
        self._next_key = 0

    def submit(self, request: Request) -> int:
        """Queue a request; its key names it in the pieces. ConfigError when the prompt cannot be read."""
        if request.control:
            request = request.control.apply(request, self.tokenizer)
        ids = self._prompt_ids(request)
        skipped = request.skip_unknown and request.prompt and request.ids is None
        if skipped and not len(encode_prompt(self.tokenizer, request.prompt, skip_unknown=True)):
            # 悄悄从空的写起，会让人以为开头起了作用
            raise ConfigError("prompt_all_skipped", got=request.prompt)
        if not len(ids) and self.separator is None:
            raise ConfigError("prompt_all_skipped" if request.prompt else "empty_prompt", got=request.prompt)
        read = len(ids) + len(self._opening(request))
        if request.score_prompt and read > (most := self.model.config.block_size):
            raise ConfigError("prompt_over_context", got=read, limit=most)
        key, self._next_key = self._next_key, self._next_key + 1
        self.texts[key] = _Text(request, ids, read, self.tokenizer.stream(ids.tolist()))
        self.waiting.append(key)
        return key

    def _prompt_ids(self, request: Request) -> np.ndarray:
        if request.ids is None:
            ids = encode_prompt(self.tokenizer, request.prefix + request.prompt, skip_unknown=request.skip_unknown)
            return np.concatenate((np.array(self.begin, dtype=np.int64), ids))
        prefix = encode_prompt(self.tokenizer, request.prefix, skip_unknown=request.skip_unknown)
        return np.concatenate((prefix, np.array(request.ids, dtype=np.int64)))

    def _opening(self, request: Request) -> tuple[int, ...]:
        """What is read before the prompt by itself."""
        return (() if self.separator is None else (self.separator,)) + labels_of(request)

    def cancel(self, key: int) -> None:
        """Forget a request, finished or not."""
        if self.texts.pop(key, None) is None:
            return
        if key in self.waiting:
            self.waiting.remove(key)
        elif self.decoder:
            self.decoder.remove(key)

    def interrupt(self, key: int) -> Piece:
        """End an unfinished text as it stands; the bytes of half a character are dropped."""
        text = self.texts[key]
        return self._end(key, text.held + text.stream.finish().rstrip("\ufffd"), "interrupted")

    def reset(self) -> list[int]:
        """Drop every row that is being written (the next one where none is), after an unforeseen error; their keys."""
        dropped = [key for key in self.texts if key not in self.waiting]
        # 一行都还没开始就出错：放弃队首，否则会永远停在这里
        if not dropped and self.waiting:
            dropped = [self.waiting.popleft()]
        for key in dropped:
            del self.texts[key]
        self.decoder = self._flight = None
        return dropped

    def step(self) -> list[Piece]:
        """One more token for every row; what is new to show, if anything."""
        pieces = self.advance()
        for piece in pieces:
            if piece.error:
                raise piece.error
        return pieces

    def advance(self) -> list[Piece]:
        """The same, where a text that cannot go on ends with an error of its own and the others go on."""
        drawn = None
        while drawn is None:
            try:
                read = self._admit()
                drawn = self._drawn()
            except Exception as error:
                # 只接住显存不足：减半并排的行数，写过的 token 都在，重读即可
                if not is_out_of_memory(error):
                    raise
            if drawn is None:
                # 出了 except 才清理：异常的 traceback 还引用着旧缓存
                self._shrink()
        # 多走了一步的行可能已经写完
        pushed = (self._push(key, token, likely) for key, token, likely in drawn if key in self.texts)
        return read + [piece for piece in pushed if piece]

    def _drawn(self) -> list[tuple[int | None, int, tuple[float, dict[int, float]] | None]]:
        """(key, id, how likely) of the rows, of this step or, looking ahead, of the one before.

        The key is None where the id is no longer wanted.
        """
        launched = None
        if self.decoder and self.decoder.rows:
            keys = [row.key for row in self.decoder.rows]
            asked = [count for key in keys if (count := self.texts[key].request.logprobs) is not None]
            self.decoder.top = max(asked, default=None)
            with self.context():
                launched = keys, self.decoder.step(), self.decoder.likely
        ready, self._flight = (self._flight, launched) if self.lookahead else (launched, None)
        if not ready:
            return []
        keys, ids, likely = ready
        return list(zip(keys, ids.tolist(), likely.rows() if likely else [None] * len(keys)))

    def write(self, requests: Iterable[Request] = ()) -> Iterator[Piece]:
        """Write these requests and all that were submitted before, to the end; in a new Writer keys count from 0."""
        for request in requests:
            self.submit(request)
        while self.texts:
            yield from self.step()

    def _admit(self) -> list[Piece]:
        """Give free rows to those that wait; the end of a text that was only to be read, if there was one.

        While texts are under way, at most READ_PER_STEP ids are read in one step, or one prompt that is longer.
        """
        going, read = bool(self.decoder and self.decoder.rows), 0
        while self.waiting and (self.decoder is None or len(self.decoder.rows) < self.capacity):
            key = self.waiting[0]
            text, request = self.texts[key], self.texts[key].request
            ids = min(text.prompt_tokens + len(text.ids), self.model.config.block_size)
            if going and read and read + ids > READ_PER_STEP:
                break
            read += ids
            if request.score_prompt and text.scores is None:
                text.scores = self._prompt_scores(text)
                if not all(score.logprob is None or math.isfinite(score.logprob) for score in text.scores):
                    self.cancel(key)
                    return [Piece(key, request.prompt, "", error=ConfigError("nonfinite_logits"))]
            if not request.max_new_tokens:
                # 只评不写：一次一段，别人的文字不必等一整批
                return [self._end(key, text.stream.finish(), "length")]
            if self.decoder is None:
                self.decoder = self._new_decoder()
            self.waiting.popleft()
            prompt = np.concatenate((text.prompt_ids, np.array(text.ids, dtype=np.int64)))
            self.decoder.add(
                key, prompt, request.sampler, request.seed, count=len(text.ids), labels=labels_of(request),
                guidance=request.guidance,
            )
        return []

    def _new_decoder(self) -> Decoder:
        # 多一个位置：提前排下的一步不该触发重读
        length = None if self.max_length is None else self.max_length + 1
        never = () if self.separator is None else label_tokens(self.tokenizer)
        return decoder_of(
            self.model, self.speculate, capacity=self.capacity, max_length=length,
            vocab_size=self.tokenizer.vocab_size, never=never,
        )

    def _prompt_scores(self, text: _Text) -> list[Score]:
        """Scores of the tokens of the prompt, without those of its prefix."""
        request = text.request
        ids = [*self._opening(request), *text.prompt_ids.tolist()]
        own = len(self._prompt_ids(replace(request, prefix=""))) if request.prefix else len(text.prompt_ids)
        with self.context():
            asked = torch.tensor(ids, device=self.model.device)
            count, vocab_size = request.logprobs or 0, self.tokenizer.vocab_size
            likely = [None, *scoring.read(self.model, asked, vocab_size=vocab_size, count=count)]
        stream, offset, scores = self.tokenizer.stream(), 0, []
        for token, found in list(zip(ids, likely))[len(ids) - own :]:
            scores.append(self._score(token, found, offset, request))
            offset += len(stream.push(token))
        return scores

    def _score(self, token: int, likely: tuple[float, dict[int, float]] | None, offset: int, request: Request) -> Score:
        word = self.tokenizer.word
        if likely is None:
            return Score(word(token), None, {}, offset)
        own, listed = likely
        top = dict(itertools.islice(listed.items(), request.logprobs or 0)) | {token: own}
        # 标签永远抽不到：-inf 也写不进 JSON
        return Score(word(token), own, {word(i): value for i, value in top.items() if value > -math.inf}, offset)

    def _shrink(self) -> None:
        # 正在写的排到队首，次序不变；旧缓存先释放，再建小的
        self.waiting = deque(key for key in self.texts if key not in self.waiting) + self.waiting
        self.decoder = self._flight = None
        release(self.model.device)
        if self.capacity == 1:
            raise ConfigError("sample_oom")
        self.capacity //= 2

    def _push(self, key: int, token: int, likely: tuple[float, dict[int, float]] | None) -> Piece | None:
        text = self.texts[key]
        request = text.request
        if token < 0:
            self.decoder.wipe(key)
            self.cancel(key)
            return Piece(key, request.prompt, "", error=ConfigError("nonfinite_logits"))
        text.first_token = text.first_token or time.perf_counter()
        finish = "end_of_text" if request.stop_at_end_of_text and token in {*self.ends, *request.ends} else None
        if not finish:
            text.ids.append(token)
            if request.logprobs is not None:
                before = len(request.prompt) if request.score_prompt else 0
                before += sum(map(len, text.shown)) + len(text.held)
                text.scores = [*(text.scores or []), self._score(token, likely, before, request)]
            text.held += text.stream.push(token)
            finish = "length" if len(text.ids) == request.max_new_tokens else None
        text.held += text.stream.finish() if finish else ""
        found = [at for stop in request.stop if (at := text.held.find(stop)) >= 0]
        if found:
            return self._end(key, text.held[: min(found)], "stop")
        if finish:
            return self._end(key, text.held, finish)
        if token == self.separator:
            self._begin_document(key)
        safe = len(text.held) - longest_beginning(text.held, request.stop)
        shown, text.held = text.held[:safe], text.held[safe:]
        text.shown.append(shown)
        return Piece(key, request.prompt, shown, scores=text.take_scores()) if shown else None

    def _begin_document(self, key: int) -> None:
        """A text goes on behind the end of a document: another one begins, which does not see the one before."""
        self.decoder.remove(key)
        self.waiting.appendleft(key)
        if self._flight:
            # 提前排下的那一步还接着上一篇：不要它
            self._flight = [None if k == key else k for k in self._flight[0]], *self._flight[1:]

    def _end(self, key: int, last: str, finish: str) -> Piece:
        text, now = self.texts[key], time.perf_counter()
        self.cancel(key)
        whole = "".join(text.shown) + last
        result = Result(
            text.request, whole, finish, len(text.ids), text.prompt_tokens,
            (text.first_token or now) - text.submitted, now - text.submitted,
        )
        end = len(whole) + (len(text.request.prompt) if text.request.score_prompt else 0)
        # 停止词从这里起：它自己的 token 不算
        scores = tuple(score for score in text.take_scores() if finish != "stop" or score.offset < end)
        return Piece(key, text.request.prompt, last, result, scores=scores)


def longest_beginning(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` with which one of `stops` begins."""
    starts = (stop[:n] for stop in stops for n in range(1, min(len(stop), len(text)) + 1))
    return max((len(start) for start in starts if text.endswith(start)), default=0)


def write_sample(
    model, tokenizer: Tokenizer, prompt: str | None, max_new_tokens: int, *, sampler: Sampler, seed: int
) -> str:
    """The prompt (None: the usual one) and max_new_tokens tokens behind it.

    The model's mode and the global generators are left as they were. A model of documents writes one text for each
    of up to SAMPLED_LABELS labels of one kind, "[label] text", each up to its end. A model of conversations answers.
    """
    if model.config.marked:
        ids = question_ids(tokenizer, [{"role": "user", "content": prompt}])
        asked = {"ids": tuple(ids.tolist()), "ends": (turn_end(tokenizer),)}
        prompt += "\n"
    else:
        asked = {"stop_at_end_of_text": model.config.separator is not None}
    documents = model.config.separator is not None
    prompt = default_prompt(tokenizer, model.config.separator) if prompt is None else prompt
    listed = next(iter(tokenizer.labels.values()), {}) if documents else {}
    # 同一个种子：几段的不同只来自标签
    base = Request(prompt, sampler, max_new_tokens, seed, **asked)
    chosen = list(listed.items())[:SAMPLED_LABELS]
    requests = {f"[{label}] ": replace(base, prefix_ids=ids) for label, ids in chosen} or {"": base}
    was_training = model.training
    model.eval()
    try:
        writer = Writer(model, tokenizer, capacity=len(requests))
        results = {piece.key: piece.result for piece in writer.write(requests.values()) if piece.result}
        return "\n".join(f"{head}{prompt}{results[key].text}" for key, head in enumerate(requests))
    finally:
        model.train(was_training)
