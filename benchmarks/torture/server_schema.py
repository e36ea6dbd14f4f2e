"""schemathesis against a server's own OpenAPI document: right and wrong requests, all of its checks."""

from collections import Counter

from ledger import Ledger


def fuzz(ledger: Ledger, address: str, *, examples: int, seed: int, token: str | None = None) -> None:
    """Every address, positive and negative; `examples` random cases each, beside those that cover the schema."""
    # 只有长的那一种用到它：extra torture
    import schemathesis
    from schemathesis.config import SchemathesisConfig
    from schemathesis.engine import events, from_schema

    schemathesis.hook("filter_case")(within_max_texts)
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


def within_max_texts(_context, case) -> bool:
    """Drop what only the product of two fields makes wrong: a schema cannot say that prompts x n has a limit."""
    body = case.body
    if not isinstance(body, dict) or not isinstance(body.get("prompt"), list) or not isinstance(body.get("n"), int):
        return True
    return len(body["prompt"]) * body["n"] <= 16
