"""The surfaces of interactive writing: a terminal with editing, history and completion, or lines from a pipe."""

# interactive=true 的外壳：终端上有编辑、历史、补全与状态栏，管道里一行是一个开头或命令
# converse 由 run_sample.py 调用，按 stdin 是不是终端选一种；一行该做什么全由 commands 的 InteractiveSession 决定
# 管道里错了一行照写其余的，最后以退出码 2 说明；终端上 Ctrl-C 只清掉这一行

import contextlib
import locale
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

from nanogpt.base.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR
from nanogpt.base.language import ConfigError, say, text
from nanogpt.base.sample_config import SampleConfig
from nanogpt.data.assets import cache_folder
from nanogpt.write.chat_session import ChatSession
from nanogpt.write.commands import InteractiveSession, plain
from nanogpt.write.loading import Model


def converse(cfg: SampleConfig, model: Model) -> int:
    """Write what is asked for until the end of the input; the process' exit code."""
    is_terminal = sys.stdin.isatty()
    kind = ChatSession if cfg.chat else InteractiveSession
    session = kind(cfg, model, piped=not is_terminal)
    model.announce()
    if is_terminal:
        return at_the_terminal(session, prompt_session(session))
    return from_a_pipe(session, sys.stdin.buffer)


def obey(session: InteractiveSession, line: str) -> bool:
    """Handle one line; a mistake is said and makes it False."""
    session.begin()
    try:
        session.handle(line)
    except ConfigError as error:
        say("error", line=error)
        return False
    return True


# ---- 管道 ----


def from_a_pipe(session: InteractiveSession, lines: Iterable[bytes]) -> int:
    """One prompt or command per line: stdout gets the texts, stderr the messages; 2 if a line was wrong."""
    good = True
    try:
        for number, raw in enumerate(lines):
            line = decoded(raw.removeprefix(b"\xef\xbb\xbf") if number == 0 else raw).rstrip("\r\n")
            # 先判断再与：一行错了，其余的照写
            good = obey(session, line) and good
            if session.done:
                break
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0 if good else EXIT_USER_ERROR


def decoded(raw: bytes) -> str:
    """A line in UTF-8, or else in the system's encoding (GBK on a Chinese Windows)."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode(locale.getpreferredencoding(False), errors="replace")


# ---- 终端 ----


def at_the_terminal(session: InteractiveSession, prompt) -> int:
    """Ask for lines until /quit or Ctrl-D; Ctrl-C only clears the line."""
    if isinstance(session, ChatSession):
        say("ask and press Enter; /reset begins anew, /help shows the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    else:
        say("type a beginning and press Enter; /help shows the commands, Ctrl-C stops a text, Ctrl-D leaves")
    with unechoed(sys.stdin):
        while not session.done:
            try:
                line = prompt.prompt()
                obey(session, line)
            except KeyboardInterrupt:
                continue
            except EOFError:
                break
    return 0


@contextlib.contextmanager
def unechoed(stdin: TextIO) -> Iterator[None]:
    """Do not show what is typed while a text is written: the next prompt reads it. Afterwards all is as before."""
    try:
        import termios
    except ImportError:
        # Windows 的控制台只在读的时候回显
        termios = None
    if termios is None or not stdin.isatty():
        yield
        return
    before = termios.tcgetattr(stdin)
    quiet = termios.tcgetattr(stdin)
    # 一个键一个键地留着：方向键、Ctrl-D、回车原样交给下一次提示；Ctrl-C 照旧停下文字
    quiet[0] &= ~termios.ICRNL
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    # 默认的 SIGTERM 不走 finally，终端就一直没有回显
    ended = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    termios.tcsetattr(stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
        signal.signal(signal.SIGTERM, ended)


def prompt_session(session: InteractiveSession, **surface):
    """A prompt_toolkit session; `surface` may name another input and output."""
    # 只在终端上才导入：管道与一次性写作不必等它
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output

    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event):
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event):
        event.current_buffer.insert_text("\n")

    if "output" not in surface:
        # stdout 重定向到文件时，提示画在 stderr 的终端上；Windows 的控制台只能是 stdout
        try:
            surface["output"] = create_output(always_prefer_tty=True)
        except Exception as error:
            # 这个类在别的系统上导入不了
            if type(error).__name__ != "NoConsoleScreenBufferError":
                raise
            raise ConfigError(
                "interactive=true draws on the console, and its output is redirected; add output=texts.txt instead of >"
            ) from None
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        path = cache_folder() / "prompt_history"
        path.open("a", encoding="utf-8").close()
        history = FileHistory(str(path))
    except OSError:
        # 家目录只读也能写作，只是下次不记得
        history = InMemoryHistory()
    return PromptSession(
        "> ", multiline=True, history=history, completer=completer(session), complete_while_typing=True,
        key_bindings=bindings, bottom_toolbar=lambda: toolbar(session), prompt_continuation="… ",
        enable_open_in_editor=False, **surface,
    )


def completer(session: InteractiveSession):
    """Completes /commands and the names that may follow them; prompts are left alone."""
    from prompt_toolkit.completion import Completer, Completion

    # 写在函数里：它的基类要等 prompt_toolkit 导入之后才有
    class CommandCompleter(Completer):
        def get_completions(self, document, complete_event):
            typed = document.text_before_cursor
            if not typed.startswith("/") or "\n" in typed:
                return
            name, space, value = typed[1:].partition(" ")
            words = session.values(name) if space else session.names()
            beginning = value if space else name
            for word in words:
                if word.startswith(beginning):
                    yield Completion(word, start_position=-len(beginning))

    return CommandCompleter()


def toolbar(session: InteractiveSession) -> str:
    """The settings that matter, in one line."""
    settings, control = session.settings, session.settings.control
    parts = [session.chosen["sampler"]]
    parts += [f"temperature={settings.sampler['temperature']}"] if "temperature" in settings.sampler else []
    parts += [f"tokens={settings.max_new_tokens}", f"seed={settings.seed}"]
    parts += [f"samples={session.samples}"] if session.samples > 1 else []
    parts += [f"{kind}={plain(control[kind])}" for kind in ("style", "emotion") if control.get(kind)]
    parts += [f"guidance={control['guidance']}"] if control.get("guidance", 1) != 1 else []
    return " " + " · ".join([*parts, text("/help")])
