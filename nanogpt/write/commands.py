"""Interactive writing without its surface: the settings, commands and texts of one session."""

# 一问一答的内核：InteractiveSession 记着设置与写过的，handle 收一行，写一段文字或执行一个 / 命令，文字印到 stdout
# 每个命令是一个 _do_<名字> 方法，NUMBERS、KINDS 与 sampler 的键也各是一个命令，所以新的 sampler 不必改这里
# 写错的一行什么也不改：新设置先试着造一个 Request，造得出才换上
# 外壳在 terminal；保存与显示用 samples 里的零件

import difflib
import json
import re
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nanogpt.base.config import check_in, choices_of, range_of
from nanogpt.base.files import folders_around
from nanogpt.base.groups import option, parsed
from nanogpt.base.language import ConfigError, say, show, text, wrapped
from nanogpt.base.quoting import in_quotes, typed_override, word
from nanogpt.base.sample_config import SampleConfig
from nanogpt.base.user_yaml import group_options
from nanogpt.base.value_checks import unescaped
from nanogpt.write.control import KINDS, build_control, read_form, takes_forms
from nanogpt.write.engine import Writer
from nanogpt.write.loading import Model, Settings
from nanogpt.write.request import Request, Result
from nanogpt.write.samples import SEPARATOR, Records, in_order, recorded, settings_record

# 换 sampler 时跟着走的设置：与怎么挑候选无关
KEPT = ("repetition_penalty", "no_repeat_ngram")
# 命令名 -> 配置里的键
NUMBERS = {"tokens": "max_new_tokens", "seed": "seed", "samples": "num_samples"}


@dataclass(frozen=True)
class Written:
    """A text that was written: how it was asked for, and everything that was shown of it."""

    # /again、/more、/save 要用：连同当时的设置，之后改了设置也说得出它是怎么写的

    typed: str
    """The prompt with its form."""
    number: int
    """Added to the seed."""
    shown: str
    result: Result
    settings: Settings


class InteractiveSession:
    """What interactive mode remembers. `handle(line)` writes a text or obeys a command; mistakes change nothing."""

    # 不知道自己在终端还是管道后面：测试一行行喂它，与真的一样

    def __init__(self, cfg: SampleConfig, model: Model, *, piped: bool):
        self.cfg, self.model = cfg, model
        self.settings, self.samples = Settings.of(cfg), cfg.num_samples
        self.temperature = cfg.temperature
        self.chosen = {group: cfg.groups.get(group, "?") for group in ("sampler", "control")}
        self.records = Records(cfg.output, model.name)
        self.written: list[Written] = []
        self.piped = piped
        """A line stands between the texts of different prompts too, and Ctrl-C ends everything."""
        self.printed = self.done = False
        self.commands: dict[str, Callable[[str], None]] = {
            **{name.removeprefix("_do_"): getattr(self, name) for name in dir(self) if name.startswith("_do_")},
            **{name: partial(self._set_number, name) for name in NUMBERS},
            **{kind: partial(self._set_style_or_emotion, kind) for kind in KINDS},
        }

    # ---- 读一行 ----

    def handle(self, line: str) -> None:
        """A prompt, or /command value; // begins a prompt with a slash. ConfigError on a mistake."""
        if line.startswith("／"):
            line = "/" + line[1:]
        if not line.startswith("/") or line.startswith("//"):
            if line.strip():
                self.write(line[1:] if line.startswith("//") else line)
            return
        name, _, value = line[1:].strip().partition(" ")
        name, value = name.lower(), value.strip()
        if name in self.commands:
            self.commands[name](value)
        elif name in self.sampler_keys():
            self._set_sampler_key(name, value)
        else:
            close = difflib.get_close_matches(name, self.names(), n=1)
            raise ConfigError(
                "/{got}: there is no such command{guess}; /help shows them all",
                got=name, guess=text("did_you_mean", guess=f"/{close[0]}") if close else "",
            )

    def names(self) -> list[str]:
        """All commands."""
        return sorted({*self.commands, *self.sampler_keys()})

    def sampler_keys(self) -> list[str]:
        """Keys of the sampler in use; each is a command."""
        return [key for key in self.settings.sampler if key != "_target_"]

    def values(self, command: str) -> list[str]:
        """Words that may follow a command."""
        if command in ("sampler", "control"):
            extra = [k for k in self.settings.control if k not in ("_target_", *KINDS) and not self._is_table(k)]
            return group_options(command) + (extra if command == "control" else [])
        if command == "unknown":
            return list(choices_of(SampleConfig, "unknown"))
        if command in KINDS and takes_forms(self.settings.control):
            return build_control(self.settings.control).known(self.model.tokenizer)[command]
        return []

    # ---- 写作 ----

    def write(self, typed: str, *, first: int = 0, samples: int | None = None, goes_on: bool = False) -> None:
        """Write texts behind a prompt and print them.

        Ctrl-C ends the text that is being shown and drops those behind it.
        """
        count = samples or self.samples
        requests = self._requests(typed, first, count)
        writer = self.model.writer_of(requests, batch_size=self.cfg.batch_size, skip="/unknown skip")
        opened = -1

        def finished(result: Result) -> None:
            # 对话的问题不再写一遍
            shown = ("" if result.request.ids else result.request.prompt) + whole(result.text)
            self.written.append(Written(typed, first + opened, shown, result, self.settings))

        try:
            for piece in in_order(recorded(writer, self.records, self.settings, lambda done: None), count):
                if piece.key != opened:
                    opened = piece.key
                    self._open("" if goes_on else piece.prompt)
                show(whole(piece.text) if piece.result else piece.text, end="\n" if piece.result else "")
                if piece.result:
                    finished(piece.result)
        except KeyboardInterrupt:
            self._interrupted(writer, opened, finished)
        except ConfigError:
            if opened >= 0:
                # 错误信息另起一行
                show("")
            raise

    def _requests(self, typed: str, first: int, count: int) -> list[Request]:
        return [self.settings.request(typed, first + n) for n in range(count)]

    def _interrupted(self, writer: Writer, key: int, finished: Callable[[Result], None]) -> None:
        # 还没显示的（key 为 -1）和排在后面的不留
        if key in writer.texts:
            piece = writer.interrupt(key)
            show(piece.text)
            self.records.add(piece.result, self.settings)
            finished(piece.result)
        say("[stopped]")
        if self.piped:
            # 脚本里没有人接着打字：其余的也不写了
            raise KeyboardInterrupt

    def _open(self, prompt: str) -> None:
        if self.printed:
            show(SEPARATOR)
        self.printed = True
        show(prompt, end="")

    def begin(self) -> None:
        """A new line was read: on a terminal its texts stand for themselves."""
        self.printed = self.printed and self.piped

    def _last(self) -> Written:
        if not self.written:
            raise ConfigError("nothing_written")
        return self.written[-1]

    # ---- 设置 ----

    def change(self, **fields: Any) -> None:
        """Take settings over if a text could be written with them."""
        changed = replace(self.settings, **fields)
        changed.request("")
        self.settings = changed

    def _changed(self, key: str, value: Any) -> None:
        say("{key}={value}", key=key, value=value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))

    def _set_sampler_key(self, name: str, value: str) -> None:
        number = parsed(f"sampler.{name}", value)
        self.change(sampler={**self.settings.sampler, name: number})
        if name == "temperature":
            # 之后换上的 sampler 也用它
            self.temperature = number
        self._changed(f"sampler.{name}", number)

    def _set_number(self, command: str, value: str) -> None:
        key, number = NUMBERS[command], parsed(NUMBERS[command], value)
        if isinstance(number, bool) or not isinstance(number, int):
            raise ConfigError("wrong_type", key=key, got=value, want="int")
        check_in(key, number, range_of(SampleConfig, key))
        if command == "samples":
            self.samples = number
        else:
            self.change(**{key: number})
        self._changed(key, number)

    def _set_style_or_emotion(self, kind: str, value: str) -> None:
        if not takes_forms(self.settings.control):
            raise ConfigError(
                "control={name} has no {kind}; type /control codes first",
                kind=kind, name=self.chosen["control"],
            )
        self.change(control={**self.settings.control, kind: value or None})
        self._changed(f"control.{kind}", value or None)

    def _is_table(self, key: str) -> bool:
        return isinstance(self.settings.control[key], dict | list)

    # ---- 命令：_do_<名字>(其后的文字) ----

    def _do_help(self, value: str) -> None:
        keys = textwrap.wrap(" ".join(f"/{key}" for key in self.sampler_keys()), 72)
        say(
            "  /temperature 0.5        lower is safer, 0 greedy; other keys of the sampler:\n"
            "      {sampler_keys}\n"
            "  /sampler top_p          another strategy\n"
            "  /tokens 200             how long; /samples 3  /seed 7  /stop \\n\n"
            "  /style poetic           for all texts from now on; without a word: none\n"
            "  /emotion happy          style:poetic| emotion:happy| It was  (this text only)\n"
            "  /control [none]         styles and emotions, the model's labels first;\n"
            "                          /control guidance 2  /control strength 3\n"
            "  /again  /more           the same beginning with the next seed; go on from the\n"
            "                          last text\n"
            "  /unknown skip           pass over characters that the vocabulary lacks;\n"
            "                          /unknown error names them\n"
            "  /save [all] FILE.txt    append the last text, or all, to a file; or .jsonl\n"
            "  /settings  /help  /quit\n"
            "  Alt-Enter starts a new line, // begins a text with a slash",
            sampler_keys="\n      ".join(keys),
        )

    def _do_quit(self, value: str) -> None:
        self.done = True

    def _do_settings(self, value: str) -> None:
        for line in self.overview():
            show(wrapped(line, sys.stderr), file=sys.stderr)

    def overview(self) -> list[str]:
        """Every setting as key=value, as it would be typed on the command line."""
        shown = {k: v for k, v in self.settings.control.items() if k != "_target_" and not self._is_table(k)}
        control = [self._typed(f"control.{k}", v) for k, v in shown.items()]
        sampler = [f"sampler.{k}={plain(self.settings.sampler[k])}" for k in self.sampler_keys()]
        return [
            text("model: {name}", name=self.model.name),
            " ".join([f"sampler={self.chosen['sampler']}", *sampler]),
            " ".join([f"control={self.chosen['control']}", *control]),
            f"max_new_tokens={self.settings.max_new_tokens} seed={self.settings.seed} num_samples={self.samples} "
            f"{word('stop=' + self._stops())} unknown={self.settings.unknown} "
            + self._typed("output", self.cfg.output),
        ]

    def _stops(self) -> str:
        stops = self.settings.stop
        # PowerShell 5 吞掉双引号：能用单引号的用单引号
        plainly = all(re.fullmatch(r"[^'\"\\\n\t]*", stop) for stop in stops)
        return f"[{','.join(map(in_quotes, stops))}]" if plainly else json.dumps(stops, ensure_ascii=False)

    def _typed(self, key: str, value: Any) -> str:
        return typed_override(key, value if value is None else plain(value))

    def _do_stop(self, value: str) -> None:
        stops = parsed("stop", value) if value.startswith("[") else [value] if value else []
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise ConfigError("wrong_type", key="stop", got=value, want="[str]")
        if "" in stops:
            raise ConfigError("empty_stop")
        self.change(stop=[unescaped(stop) for stop in stops])
        self._changed("stop", self.settings.stop)

    def _do_unknown(self, value: str) -> None:
        if value not in choices_of(SampleConfig, "unknown"):
            allowed = " | ".join(choices_of(SampleConfig, "unknown"))
            raise ConfigError("not_a_choice", key="unknown", got=value, allowed=allowed)
        self.change(unknown=value)
        self._changed("unknown", value)

    def _do_control(self, value: str) -> None:
        key, _, setting = value.partition(" ")
        if not key:
            for kind, names in build_control(self.settings.control).known(self.model.tokenizer).items():
                say("{kind}: {names} — or any other words", kind=kind, names=" ".join(names))
        elif not setting:
            node = option("control", key, self.temperature)
            # 换一种控制方式，风格和情绪不变
            before = self.settings.control
            kept = {kind: before[kind] for kind in KINDS if kind in node and kind in before}
            self.change(control={**node, **kept})
            self.chosen["control"] = key
            self._changed("control", key)
        elif key in KINDS:
            self._set_style_or_emotion(key, setting.strip())
        elif key not in self.settings.control or key == "_target_" or self._is_table(key):
            raise ConfigError(
                "{group}.{got}: there is no such setting; choose one of: {known}",
                group="control", got=key, known=" ".join(self.values("control")),
            )
        else:
            self.change(control={**self.settings.control, key: parsed(f"control.{key}", setting)})
            self._changed(f"control.{key}", self.settings.control[key])

    def _do_sampler(self, value: str) -> None:
        if not value:
            raise ConfigError("unknown_option", group="sampler", got="", options=", ".join(group_options("sampler")))
        if value == self.cfg.groups.get("sampler"):
            # 命令行选的那个：连同当时写的值一起回来
            node = dict(self.cfg.sampler)
            if node.get("temperature") == self.cfg.temperature:
                node["temperature"] = self.temperature
        else:
            node = option("sampler", value, self.temperature)
        kept = {key: self.settings.sampler[key] for key in KEPT if key in node and key in self.settings.sampler}
        self.change(sampler={**node, **kept})
        self.chosen["sampler"] = value
        self._changed("sampler", value)

    def _do_again(self, value: str) -> None:
        last = self._last()
        self.write(last.typed, first=last.number + 1)

    def _do_more(self, value: str) -> None:
        last = self._last()
        # 开头里的 style:…| 对续写也有效
        forms = takes_forms(self.settings.control)
        head = last.typed[: len(last.typed) - len(read_form(last.typed).prompt)] if forms else ""
        before = len(self.written)
        self.write(head + last.shown, first=last.number + 1, samples=1, goes_on=True)
        for at in range(before, len(self.written)):
            # /again 重写的仍是最初的开头
            self.written[at] = replace(self.written[at], typed=last.typed)

    def _do_save(self, value: str) -> None:
        first, _, rest = value.partition(" ")
        whole_session = first == "all"
        path = Path((rest.strip() if whole_session else value) or "samples.txt")
        if path.suffix not in (".txt", ".jsonl"):
            raise ConfigError("/save {got}: the file's name must end in .txt or .jsonl", got=path)
        chosen = self.written if whole_session else [self._last()]
        if not chosen:
            raise ConfigError("nothing_written")
        try:
            with folders_around(path), path.open("a", encoding="utf-8", newline="\n") as file:
                file.write("".join(map(saved_text if path.suffix == ".txt" else saved_record, chosen)))
        except OSError as error:
            raise ConfigError(
                "/save {got}: cannot be written ({reason}); choose another file",
                got=path, reason=error.strerror,
            ) from None
        say("{count} text(s) appended to {path}", count=len(chosen), path=path)


def whole(piece: str) -> str:
    """A text's last piece without the half character that max_new_tokens may have cut off."""
    return piece.removesuffix("\ufffd")


def saved_text(written: Written) -> str:
    """A text, behind the question that it answers, and a separating line."""
    asked = f"> {written.typed}\n" if written.result.request.ids else ""
    return f"{asked}{written.shown}\n{SEPARATOR}\n"


def saved_record(written: Written) -> str:
    """A text as one json line."""
    prompt, answers = written.result.request.prompt, bool(written.result.request.ids)
    record = {
        "prompt": prompt, "text": written.shown if answers else written.shown.removeprefix(prompt),
        "finish": written.result.finish,
        "seed": written.result.request.seed, "settings": settings_record(written.result, written.settings),
        "saved": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def plain(value: Any) -> str:
    """A value as it is typed on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
