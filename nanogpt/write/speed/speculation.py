"""Speculative decoding of one row without a second model: the text so far guesses, one pass checks several ids."""

# 写一段文字时，读一遍权重的时间就是一个 token 的时间；同一遍里多看几个位置却便宜得多
# Guesses 猜：结尾在前文里最长的那次重现，后面跟着什么；SpeculativeDecoder 把猜的接在最新的 id 后面一次读完
# 抽 token 仍是 core/generate 的循环，一步一个，同样的采样器、随机数与控制：抽到的恰是猜的，下一步的 logits 就现成
# 所以分布不必另证：logits 相同则文字相同；编译好的一步（fast_cpu）逐位如此，默认只在那里开
# 别的路上 k 个位置与 1 个用不同的 kernel，只差舍入：写明 speculate=k 才用

import torch

from nanogpt.core.generate import Decoder
from nanogpt.core.lanes import Row

# 多长的重现算同样长；再长也不必数
LONGEST = 32
# 一次最多猜几个：再多，越过的位置也要付钱
MOST = 8
# 猜中的比例从这里起，每次改这么多：大约看最近三十次
FIRST_RATE, RATE_STEP = 0.3, 1 / 16
# 至少要赚这么多才猜：比例是估的，猜本身也要几微秒
LEAST_GAIN = 1.05


class Guesses:
    """What comes next in a text if it repeats itself, and how often such guesses came true."""

    # 只数数，不看钟：同样的文字总做同样的选择
    # 一个 id 当作一个字符：str.rfind 找得比自己的循环快几十倍

    def __init__(self, ids: list[int]):
        self.text = "".join(map(chr, ids))
        self.length, self.behind = LONGEST, 0
        self.rates = [FIRST_RATE] * LONGEST.bit_length()
        self._find()

    def add(self, token: int) -> None:
        """The text went on with `token`."""
        if self.length:
            # 没有拿去验的猜测也算数：不花模型的时间，就知道值不值得
            kind, hit = self.length.bit_length() - 1, self.text[self.behind] == chr(token)
            self.rates[kind] += (hit - self.rates[kind]) * RATE_STEP
        self.text += chr(token)
        self._find()

    def _find(self) -> None:
        """Find the longest end of the text that occurred before, at most LONGEST; of several the latest."""
        # 每添一个字，重现至多长一个
        last = len(self.text) - 1
        for length in range(min(self.length + 1, last, LONGEST), 0, -1):
            found = self.text.rfind(self.text[-length:], 0, last)
            if found >= 0:
                self.length, self.behind = length, found + length
                return
        self.length = 0

    def next(self, count: int) -> list[int]:
        """Up to `count` ids that would follow; none where nothing recurs."""
        if not self.length or count < 1:
            return []
        # 周期比 count 短时，照着周期接下去
        period = self.text[self.behind :]
        return [ord(period[i % len(period)]) for i in range(count)]

    def worth(self, row_cost: float) -> int:
        """How many guesses write the most per time, where one more row adds `row_cost` of a step's time."""
        rate = self.rates[self.length.bit_length() - 1] if self.length else 0.0
        best, best_gain, expected = 0, LEAST_GAIN, 1.0
        for count in range(1, MOST + 1):
            expected += rate**count
            gain = expected / (1 + row_cost * count)
            if gain > best_gain:
                best, best_gain = count, gain
        return best


class SpeculativeDecoder(Decoder):
    """A Decoder that, while it has one row, reads guesses along with the newest id; its texts are the Decoder's.

    `read` (idx (1, T), cache) gives logits (T, V); `count` is how many ids are guessed, None: as many as pay where one
    more costs `row_cost` of a step. `passes` of the model have written `written` ids, for those who measure.
    """

    def __init__(self, model, *, read, count: int | None, row_cost: float, **options):
        super().__init__(model, **options)
        self.read, self.count, self.row_cost = read, count, row_cost
        self.passes = self.written = 0
        self._row: Row | None = None
        self._seen = 0
        self._guesses: Guesses | None = None
        # 读过而还没用的：猜的 id 与它后面的 logits (1, V)
        self._ahead: list[tuple[int, torch.Tensor]] = []

    def next_logits(self) -> torch.Tensor:
        """Logits (lanes, V) behind the newest id of every lane."""
        if len(self.lanes) != 1 or self.lanes[0].unread is not None:
            self._ahead = []
            return super().next_logits()
        token = int(self.newest[0])
        self._follow(token)
        self.written += 1
        if self._ahead and self._ahead[0][0] == token:
            self.cache.lengths[0] += 1
            return self._ahead.pop(0)[1]
        self.passes += 1
        return self._pass(token)

    def _follow(self, token: int) -> None:
        """Take up the newest id; a text that was not followed id by id is taken up whole."""
        row, cache = self.rows[0], self.cache
        if self._row is row and self._seen == row.count - 1:
            self._guesses.add(token)
        else:
            self._ahead = []
            read = torch.cat((row.earlier, cache.tokens[0, : cache.lengths[0]], self.newest[:1]))
            rates = self._guesses.rates if self._guesses else None
            self._guesses = Guesses(read.tolist())
            self._guesses.rates = rates or self._guesses.rates
        self._row, self._seen = row, row.count

    def _pass(self, token: int) -> torch.Tensor:
        """Read the newest id and the guesses behind it; the cache counts only the first."""
        start, cache = self.cache.lengths[0], self.cache
        room = cache.max_length - start - 1
        wanted = self._guesses.worth(self.row_cost) if self.count is None else self.count
        guessed = self._guesses.next(min(wanted, room))
        if not guessed:
            self._ahead = []
            return super().next_logits()
        logits = self.read(torch.tensor([[token, *guessed]], device=self.device), cache)
        # 没抽到的猜测留在缓存里：长度退回来，下一次就盖掉
        cache.lengths[0] = start + 1
        if logits.sum().isfinite():
            self._ahead = list(zip(guessed, logits[1:].split(1)))
        else:
            # 坏值在遮住的位置也会传开（0 × NaN）
            self._ahead = []
            cache.k[:, 0, :, start + 1 :].zero_()
            cache.v[:, 0, :, start + 1 :].zero_()
        return logits[:1]


def decoder_of(model, speculate: int | str, **options) -> Decoder:
    """The decoder of speculate=auto | 0 | k."""
    step = getattr(model, "fast_step", None)
    exact = getattr(step, "read", None)
    if speculate == 0 or (speculate == "auto" and exact is None):
        return Decoder(model, **options)
    count, row_cost = (None, step.row_cost) if speculate == "auto" else (speculate, 0.0)
    read = exact or (lambda idx, cache: model(idx, cache)[0])
    return SpeculativeDecoder(model, read=read, count=count, row_cost=row_cost, **options)
