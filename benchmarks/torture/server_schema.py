"""schemathesis against a server's own OpenAPI document: right and wrong requests, all of its checks."""

import json
from collections import Counter

from ledger import Ledger


def fuzz(ledger: Ledger, address: str, *, examples: int, seed: int, token: str | None = None) -> None:
    """Every address, positive and negative; `examples` random cases each, beside those that cover the schema."""
    # 只有长的那一种用到它：extra torture
    import schemathesis
    from schemathesis.config import SchemathesisConfig
    from schemathesis.engine import events, from_schema

    schemathesis.hook("filter_case")(sayable)
    config = SchemathesisConfig.from_dict({
        "seed": seed, "generation": {"max-examples": examples, "mode": "all", "database": "none"}, "request-timeout": 60, "continue-on-failure": True,
        "headers": {"Authorization": f"Bearer {token}"} if token else {},
    })
    schema = schemathesis.openapi.from_url(address, config=config, headers={"Authorization": f"Bearer {token}"} if token else {})
    kind = "schemathesis with a token" if token else "schemathesis"
    checks: Counter = Counter()
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            ledger.breach(kind, str(getattr(event, "value", event)))
        elif isinstance(event, events.ScenarioFinished):
            _count(ledger, kind, event.recorder, checks)
    ledger.figures[f"{kind}: checks passed"] = dict(sorted(checks.items()))


def _count(ledger: Ledger, kind: str, recorder, checks: Counter) -> None:
    for case_id, interaction in recorder.interactions.items():
        failed = [node for node in recorder.checks.get(case_id, []) if node.failure_info]
        checks.update(node.name for node in recorder.checks.get(case_id, []) if not node.failure_info)
        for node in failed:
            request = interaction.request
            ledger.breach(kind, f"{node.name}: {node.failure_info.failure} {request.method} {request.uri} {request.body!r:.300}")
        if not failed:
            status = interaction.response.status_code if interaction.response else "no answer"
            ledger.count(kind, str(status))


def sayable(_context, case) -> bool:
    """Drop what only two fields together make wrong: a schema cannot say that prompts x n has a limit, or that best_of is n."""
    body = case.body
    if not isinstance(body, dict):
        return True
    prompt, n, echo, scored = body.get("prompt"), body.get("n") or 1, body.get("echo") is True, body.get("logprobs") is not None
    several = isinstance(prompt, list) and isinstance(n, int) and not all(isinstance(i, int) for i in prompt)
    if several and len(prompt) * n > 16:
        return False
    # 评分的开头不能长过上下文；JSON 的长度不会短于 token 数
    return body.get("best_of") in (None, n) and (body.get("max_tokens") != 0 or echo) and not (echo and scored and len(json.dumps(prompt)) > 60)
