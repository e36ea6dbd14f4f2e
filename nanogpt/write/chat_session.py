"""A conversation at the terminal or through a pipe: interactive writing that remembers what was said."""

# chat=true 而没有写下问题：互动写作（commands）的对话版，外壳仍是 terminal；记着说过的话，/reset 忘掉

from nanogpt.base.language import say
from nanogpt.base.sample_config import SampleConfig
from nanogpt.base.value_checks import unescaped
from nanogpt.data.chat import Message
from nanogpt.data.tokenizer import UnknownCharacters
from nanogpt.write.chat import Chat
from nanogpt.write.commands import InteractiveSession
from nanogpt.write.loading import Model
from nanogpt.write.request import Request


class ChatSession(InteractiveSession):
    """An interactive session that is a conversation: what was said before is read again with every question."""

    # 续写与风格的命令在这里没有意义：去掉，其余照旧

    def __init__(self, cfg: SampleConfig, model: Model, *, piped: bool):
        super().__init__(cfg, model, piped=piped)
        self.chat = Chat(model, cfg.system)
        self.said: list[Message] = []
        for name in ("more", "style", "emotion", "control"):
            del self.commands[name]

    def write(self, typed: str, *, first: int = 0, samples: int | None = None, goes_on: bool = False) -> None:
        """Answer a question; of several answers the conversation goes on with the last."""
        before = len(self.written)
        super().write(typed, first=first, samples=samples)
        if len(self.written) > before:
            asked = {"role": "user", "content": typed}
            self.said = [*self.said, asked, {"role": "assistant", "content": self.written[-1].shown}]

    def _requests(self, typed: str, first: int, count: int) -> list[Request]:
        messages = [*self.said, {"role": "user", "content": typed}]
        return [
            self.chat.request(self.settings, messages, first + n, forget=True, skip="/unknown skip")
            for n in range(count)
        ]

    def _open(self, prompt: str) -> None:
        # 问题是人刚敲下的：不再写一遍
        super()._open("")

    def overview(self) -> list[str]:
        shown = [line for line in super().overview() if not line.startswith("control=")]
        return [*shown, self._typed("system", self.chat.system)]

    def _do_help(self, value: str) -> None:
        say(
            "  /reset                  forget the conversation\n"
            "  /system Be brief.       what the model is told first; forgets the conversation\n"
            "  /again                  another answer to the last question\n"
            "  /temperature 0.5        lower is safer, 0 greedy; /sampler top_p  /tokens 200\n"
            "  /samples 3  /seed 7  /stop \\n  /unknown skip\n"
            "  /save [all] FILE.txt    append the last answer, or all, to a file; or .jsonl\n"
            "  /settings  /help  /quit\n"
            "  Alt-Enter starts a new line, // begins a question with a slash",
        )

    def _do_reset(self, value: str) -> None:
        self.said = []
        say("the conversation begins anew")

    def _do_system(self, value: str) -> None:
        told = unescaped(value)
        if self.settings.unknown != "skip":
            # 读不了的现在就说，原来的留着：不然每一问都写不成
            try:
                self.model.tokenizer.encode(told)
            except UnknownCharacters as error:
                raise UnknownCharacters(error.characters, skip="/unknown skip") from None
        self.chat.system = told
        self._changed("system", self.chat.system)
        self._do_reset("")

    def _do_again(self, value: str) -> None:
        last, kept = self._last(), self.said
        # /reset 之后，要重答的那一问已经不在对话里了
        begun = kept[:-2] if kept and kept[-2]["content"] == last.typed else kept
        self.said = begun
        try:
            self.write(last.typed, first=last.number + 1)
        finally:
            # 没写成：原来的回答还在
            self.said = kept if self.said is begun else self.said
