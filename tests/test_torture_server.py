"""A short form of benchmarks/torture/server.py against a server in this process."""

from random import Random

import pytest
from conftest import torture
from test_server import serve, shared, tiny  # noqa: F401 - 前两个是 fixture

from nanogpt.data.tokenizer import ByteTokenizer


@pytest.fixture
def ledger():
    """A ledger that must have nothing broken at the end."""
    made = torture("ledger").Ledger("server", "short")
    yield made
    assert made.cases and not made.broken


def test_no_client_makes_the_server_fault_tell_or_forget_itself(serve, ledger, capfd):  # noqa: F811
    server = serve(tiny(ByteTokenizer(), block_size=64), batch_size=8, max_waiting=64, read_seconds=2)
    target, raw, attack = torture("target").Target(server.port, ledger), torture("raw_requests"), torture("server")
    # 请求头的写法由 h11 管：这里只试交到 app 手里的
    attack.book(ledger, map(target.try_case, [*raw.paths(), *raw.strangers(), *raw.bodies()][::3]))
    for one in (attack.vanishing, attack.crowd, attack.sequence):
        one(ledger, target, 5, Random(0))
    target.still_itself("all of it")
    torture("server_life").quiet(ledger, capfd.readouterr().err)
    assert ledger.cases > 120


def test_the_judge_sees_what_is_wrong(serve, ledger):  # noqa: F811
    server = serve(tiny(ByteTokenizer()))
    target, reply = torture("target").Target(server.port, ledger, secrets=[b"/home/someone"]), torture("target").replies
    head = "HTTP/1.1 {} x\r\n" + "".join(f"{name}: {value}\r\n" for name, value in torture("target").HEADERS.items())
    good = head.format(200) + "content-length: 2\r\n\r\n{}"
    assert target.wrong_with_reply(*reply(good.encode()), frozenset({200})) is None
    for bad, words in ((good.replace("200", "500"), "status 500"), (good.replace("nosniff", "x").replace("X-Content-Type-Options", "X"), "headers"),
                       (good.replace("HTTP/1.1 200 x\r\n", "HTTP/1.1 200 x\r\naccess-control-allow-origin: *\r\n"), "headers"),
                       (head.format(200) + "content-length: 13\r\n\r\n/home/someone", "it tells")):
        assert words in target.wrong_with_reply(*reply(bad.encode()), frozenset({200}))
    assert not reply(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc")[0].whole and not reply(b"HTTP/1.1 200 OK\r\nX")[0].whole
    ledger.count("judge", "sees")


@pytest.mark.parametrize("body", [
    '{"prompt": "a", "\\ud800": 1}', '{"prompt": "a", "stream_options": {"\\ud800": true}}',
    '{"prompt": ["a", "a"], "n": ' + "9" * 4300 + "}", '{"prompt": "a", "best_of": true}', '{"prompt": "a", "stream_options": {"include_usage": "no"}}',
])
def test_what_the_attack_found_stays_fixed(shared, ledger, body):  # noqa: F811
    status, answer, _ = shared.post(body.encode())
    assert status == 400 and len(answer["error"]["message"]) < 1000
    ledger.count("fixed", str(status))
