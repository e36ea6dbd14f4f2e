"""The one thread that owns the Writer: it takes jobs from asyncio, hands back updates and waits for no client."""

# 写作线程与事件循环之间的桥：服务器里只有一个线程碰模型，别的都经过这里
# 事件循环里的 Job 与 Worker 的前半，写作线程里的后半；中间只有两样东西，_orders 过去，_deliver 回来
# 客户端走掉、超时、取得太慢、服务器关闭都只是 Job.fail：它让出位置，等着的人看到错误
# 两边都不等对方：命令的队列放得下一切，没送达的消息批数有上限

import asyncio
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import torch

from nanogpt.base.errors import is_out_of_memory
from nanogpt.base.language import ConfigError
from nanogpt.base.sample_config import ServerConfig
from nanogpt.core.scoring import Score
from nanogpt.write.engine import Writer
from nanogpt.write.request import Piece, Request, Result

# 还没送达 asyncio 一侧的消息批数：事件循环忙不过来时，写作等它，内存不涨
UNDELIVERED = 64
# 两步之间最多办几件事：不停地开始又取消的人，挡不住别人的文字；一起来的几十个请求要放得下
ORDERS_PER_STEP = 64
# 每个事件要过 JSON、ASGI 与 HTTP，与写作抢同一把 GIL；实测服务器比一批直接写每 token 多花 0.16 ms CPU（含接请求）
# 每多一段在写，一段的两个事件就多隔 2 ms：事件总数有上限，与一步多快无关；读的人至多多等 0.1 秒
PACE_SECONDS, LONGEST_PACE_SECONDS = 0.002, 0.1


@dataclass(frozen=True)
class TextUpdate:
    """Something new about one text of a job: whole characters, tokens so far, and at its end the result."""

    # 写作线程只交出不再变的东西：两边不共用任何会变的对象

    index: int
    text: str
    tokens: int
    result: Result | None = None
    scores: tuple[Score, ...] = ()


class Job:
    """The texts of one request with what was written and not yet fetched; used in the event loop's thread only."""

    # 不给 asyncio 的队列：读得慢时多步并成一批，也知道积了多少字
    def __init__(
        self, requests: list[Request], limits: ServerConfig | None, on_fail: Callable[["Job"], None],
        pace: Callable[[], float] = lambda: 0.0,
    ):
        self.requests = requests
        self.limits = limits
        self.prompt_tokens: list[int] | None = None
        """Per text, once the prompts have been read."""
        self.error: ConfigError | None = None
        self._on_fail, self._pace = on_fail, pace
        self._unread: deque[TextUpdate] = deque()
        self._unread_chars, self._unread_since = 0, 0.0
        self._unfinished = len(requests)
        self._changed = asyncio.Event()
        # 还没到下一次送出的时候
        self._pause: asyncio.TimerHandle | None = None

    async def accepted(self) -> list[int]:
        """Wait until every prompt has been read; raises what is wrong with one."""
        while self.prompt_tokens is None and not self.error:
            await self._next_change()
        if self.error:
            raise self.error
        return self.prompt_tokens

    async def updates(self) -> AsyncIterator[list[TextUpdate]]:
        """What is new, many steps at once where the reader was slow or many texts are being written, until all end."""
        try:
            while self._unfinished or self._unread:
                if self.error:
                    raise self.error
                if not self._unread or (self._pause and self._unfinished):
                    await self._next_change()
                    continue
                fresh, self._unread, self._unread_chars = list(self._unread), deque(), 0
                if (seconds := self._pace()) and self._unfinished:
                    self._pause = asyncio.get_running_loop().call_later(seconds, self._end_pause)
                yield fresh
        finally:
            if self._pause:
                self._pause.cancel()

    def _end_pause(self) -> None:
        self._pause = None
        if self._unread:
            self._changed.set()

    def fail(self, error: ConfigError) -> None:
        """End the job with an error, free its rows; the first error counts."""
        self.error = self.error or error
        self._changed.set()
        # 读它的人可能正卡在送不出去的字节上，等不到他来收回
        self._on_fail(self)

    def accept(self, prompt_tokens: list[int]) -> None:
        """The worker has read the prompts."""
        self.prompt_tokens = prompt_tokens
        self._changed.set()

    def add(self, update: TextUpdate) -> None:
        """The worker has written."""
        now = time.monotonic()
        if not self._unread:
            self._unread_since = now
        self._unread.append(update)
        # 一个评分与一个字同样算：它们也要等人取走
        self._unread_chars += len(update.text) + len(update.scores)
        self._unfinished -= update.result is not None
        if not self._pause or not self._unfinished:
            self._changed.set()
        # 送不出去的字节会让读它的人停下：于是这里积起来
        if (most := self.limits) and (
            self._unread_chars > most.max_unread_chars or now - self._unread_since > most.stall_seconds
        ):
            self.fail(ConfigError("api_unread"))

    async def _next_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class Worker:
    """Runs a Writer in a thread of its own; every method is called in the event loop's thread.

    `capacity` texts are written together, `max_waiting` more may wait. After an out-of-memory error the Writer
    goes on with fewer rows; once nothing is left to write it starts again with all of them.
    """

    # 只有一个线程碰模型与 Writer，不需要锁；事件循环从不等它算完

    def __init__(self, writer: Writer, *, max_waiting: int):
        self.capacity = writer.capacity
        self.max_texts = writer.capacity + max_waiting
        self.texts = 0
        """Texts that the worker has been given and has not let go."""
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        # job -> 它的时限
        self._jobs: dict[Job, asyncio.TimerHandle | None] = {}
        # 每个 job 至多一次开始、一次停止，再加一次关闭：不设上限也积不多；一批一批地交过去
        self._orders: queue.SimpleQueue[list[tuple[str, Job | None]]] = queue.SimpleQueue()
        self._unsent: list[tuple[str, Job | None]] = []
        self._undelivered = threading.Semaphore(UNDELIVERED)
        self._closing = False
        self._threads = torch.get_num_threads()
        # 以下只在工作线程里用：还没办的命令，Writer 的 key -> 哪个 job 的第几段
        self._taken: deque[tuple[str, Job | None]] = deque()
        self._keys: dict[int, tuple[Job, int]] = {}
        self._outbox: list[tuple[Callable, tuple]] = []
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    # ---- 事件循环一侧 ----

    @property
    def alive(self) -> bool:
        """Whether it can write at all."""
        return self._thread.is_alive() and not self._closing

    def start(self, requests: list[Request], limits: ServerConfig | None = None) -> Job:
        """Hand over the texts of one request; ConfigError when they do not fit into the queue."""
        if not self.alive:
            raise ConfigError("api_stopping")
        # 一个请求可以大过整个队列，但那时队列里不能有别人
        if self.texts and self.texts + len(requests) > self.max_texts:
            raise ConfigError("api_busy")
        job = Job(requests, limits, self.stop, self._pace)
        self._jobs[job] = limits and self._loop.call_later(
            limits.request_seconds, job.fail, ConfigError("api_time_limit", seconds=limits.request_seconds)
        )
        self.texts += len(requests)
        self._order("start", job)
        return job

    def stop(self, job: Job) -> None:
        """Forget a job, finished or not; its rows are free after the current step."""
        if job in self._jobs:
            if limit := self._jobs.pop(job):
                limit.cancel()
            self._order("stop", job)

    def begin_closing(self) -> None:
        """End every job with an error, take no more."""
        if not self._closing:
            self._closing = True
            for job in list(self._jobs):
                job.fail(ConfigError("api_stopping"))
            self._order("close")
            # 事件循环也许不再转了
            self._hand_over()

    def _order(self, order: str, job: Job | None = None) -> None:
        # 一起来的请求由事件循环在同一圈里读完：等这一圈转完才交，它们一起开始写；独自来的几乎不等
        if not self._unsent:
            self._loop.call_soon(self._hand_over)
        self._unsent.append((order, job))

    def _hand_over(self) -> None:
        orders, self._unsent = self._unsent, []
        self._orders.put(orders)

    def join(self, seconds: float) -> None:
        """Wait for the step under way."""
        self._thread.join(seconds)

    def _deliver(self, outbox: list[tuple[Callable, tuple]]) -> None:
        self._undelivered.release()
        for function, arguments in outbox:
            function(*arguments)

    def _pace(self) -> float:
        # 独自写的不必等
        return min(PACE_SECONDS * (self.texts - 1), LONGEST_PACE_SECONDS)

    def _let_go(self, count: int) -> None:
        self.texts -= count

    # ---- 工作线程 ----

    def _run(self) -> None:
        # 这两项每个线程各有一份：与载入模型的线程一样，写得才一样快
        torch.set_flush_denormal(True)
        torch.set_num_threads(self._threads)
        while self._take_orders():
            try:
                for piece in self._writer.advance():
                    self._report(piece)
            except Exception as error:
                self._recover(error)
            self._restore_capacity()
            self._send()

    def _report(self, piece: Piece) -> None:
        job, index = self._keys.get(piece.key, (None, 0))
        # 同一请求的另一段刚在这一步里失败，它已经不在了
        if job is None:
            return
        if piece.error:
            self._fail(job, piece.error)
            return
        tokens = piece.result.tokens if piece.result else len(self._writer.texts[piece.key].ids)
        self._tell(job.add, TextUpdate(index, piece.text, tokens, piece.result, piece.scores))
        if piece.result:
            del self._keys[piece.key]

    def _recover(self, error: Exception) -> None:
        """After an error that belongs to no single row: end as few jobs as possible and go on."""
        if isinstance(error, ConfigError) and error.message == "sample_oom":
            # 一行都放不下：错在队首那一段，其余接着写
            self._fail(self._keys[self._writer.waiting[0]][0], error)
            return
        # 不知道错在谁：正在写的全部作废，排队的不受影响
        traceback.print_exception(error, file=sys.stderr)
        for job in {self._keys[key][0] for key in self._writer.reset()}:
            self._fail(job, ConfigError("api_internal"))

    def _take_orders(self) -> bool:
        """Carry out what was asked; waits while there is nothing to write. False once the worker is to end."""
        for _ in range(ORDERS_PER_STEP):
            if not self._taken and self._orders.empty():
                # 一批一起告诉：事件循环只醒一次
                self._send()
                if self._writer.texts:
                    break
            while not self._taken:
                self._taken.extend(self._orders.get())
            order, job = self._taken.popleft()
            if order == "close":
                return False
            if order == "start":
                self._begin(job)
            else:
                self._forget(job)
                self._tell(self._let_go, len(job.requests))
        return True

    def _begin(self, job: Job) -> None:
        try:
            for index, request in enumerate(job.requests):
                self._keys[self._writer.submit(request)] = (job, index)
        except Exception as error:
            # 开头里有词表没有的字，或读它的内存不够：只有这个请求知道
            if is_out_of_memory(error):
                error = ConfigError("sample_oom")
            if not isinstance(error, ConfigError):
                traceback.print_exc(file=sys.stderr)
                error = ConfigError("api_internal")
            self._fail(job, error)
            return
        mine = [key for key, (owner, _) in self._keys.items() if owner is job]
        self._tell(job.accept, [self._writer.texts[key].prompt_tokens for key in mine])

    def _fail(self, job: Job, error: ConfigError) -> None:
        self._forget(job)
        self._tell(job.fail, error)

    def _forget(self, job: Job) -> None:
        for key in [key for key, (owner, _) in self._keys.items() if owner is job]:
            self._writer.cancel(key)
            del self._keys[key]

    def _restore_capacity(self) -> None:
        if not self._writer.texts and self._writer.capacity != self.capacity:
            self._writer.reset()
            self._writer.capacity = self.capacity

    def _tell(self, function: Callable, *arguments) -> None:
        self._outbox.append((function, arguments))

    def _send(self) -> None:
        """Everything since the last time in one wake-up of the loop."""
        if not self._outbox:
            return
        while not self._undelivered.acquire(timeout=1):
            if self._closing:
                return
        outbox, self._outbox = self._outbox, []
        try:
            self._loop.call_soon_threadsafe(self._deliver, outbox)
        except RuntimeError:
            # 事件循环已经关了：没有人在听
            self._closing = True
