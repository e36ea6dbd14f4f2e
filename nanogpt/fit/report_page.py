"""report.html: one self-contained page, light and dark, in the console's language; every text is escaped."""

from collections.abc import Sequence
from html import escape

from nanogpt.fit.chart import COLOURS, loss_chart, memory_chart, svg
from nanogpt.fit.ranking import best_of, names, ranked
from nanogpt.fit.result import STATUS_MESSAGES, TrialResult
from nanogpt.messages import current_language, text

# 颜色只在这里：SVG 也引用这些变量，深浅两套随系统切换
STYLE = """
:root { color-scheme: light dark; --page:#f6f7f9; --card:#fff; --ink:#111827; --soft:#4b5563; --faint:#e5e7eb; --accent:#2563eb; --bad:#dc2626;
  --c0:#2563eb; --c1:#d97706; --c2:#059669; --c3:#db2777; --c4:#7c3aed; --c5:#0891b2; --c6:#65a30d; --c7:#dc2626; }
@media (prefers-color-scheme: dark) { :root { --page:#0f1218; --card:#181c25; --ink:#e8eaf0; --soft:#a0a8b8; --faint:#2b313d; --accent:#7aa2ff;
  --bad:#ff7b72; --c0:#7aa2ff; --c1:#f0b35a; --c2:#4fcf9d; --c3:#f48fc0; --c4:#b79bff; --c5:#5ccfe6; --c6:#a6d65c; --c7:#ff8f88; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--page); color:var(--ink); font:15px/1.5 system-ui,"PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif; }
main { max-width:1000px; margin:0 auto; padding:36px 20px 60px; }
h1 { font-size:26px; margin:0; letter-spacing:-.01em; } h2 { font-size:17px; margin:0 0 2px; }
p { margin:4px 0 0; } .soft { color:var(--soft); font-size:14px; }
.card { background:var(--card); border:1px solid var(--faint); border-radius:14px; padding:20px 22px; margin-top:18px; overflow-x:auto; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:14px; margin-top:20px; }
.tile { background:var(--card); border:1px solid var(--faint); border-radius:14px; padding:14px 18px; }
.tile b { display:block; white-space:nowrap; font-size:23px; font-variant-numeric:tabular-nums; letter-spacing:-.01em; }
.tile span { color:var(--soft); font-size:13px; }
code { font:13px/1.5 ui-monospace,Consolas,"DejaVu Sans Mono",monospace; overflow-wrap:anywhere; }
pre { margin:10px 0 0; padding:12px 14px; border-radius:10px; background:var(--page); overflow-x:auto; }
table { border-collapse:collapse; width:100%; margin-top:12px; font-variant-numeric:tabular-nums; }
th { text-align:left; font-size:12px; font-weight:600; color:var(--soft); border-bottom:1px solid var(--faint); padding:6px 12px 6px 0; }
td { border-bottom:1px solid var(--faint); padding:8px 12px 8px 0; vertical-align:top; } tr:last-child td { border-bottom:0; }
th.n, td.n { text-align:right; white-space:nowrap; } tr.best td { font-weight:600; }
.bar { display:block; height:4px; border-radius:2px; background:var(--faint); margin-top:5px; min-width:70px; }
.bar i { display:block; height:4px; border-radius:2px; background:var(--accent); }
.badge { display:inline-block; white-space:nowrap; font-size:12px; font-weight:600; border-radius:99px; padding:1px 9px; background:var(--faint);
  color:var(--soft); } .badge.ok { background:color-mix(in srgb,var(--c2) 18%,transparent); color:var(--c2); }
.badge.oom,.badge.crashed,.badge.timeout,.badge.invalid { background:color-mix(in srgb,var(--bad) 14%,transparent); color:var(--bad); }
.legend { display:flex; flex-wrap:wrap; gap:4px 18px; margin-top:6px; font-size:13px; color:var(--soft); } .legend span { white-space:nowrap; }
.legend i { display:inline-block; width:10px; height:10px; border-radius:50%; margin-right:6px; }
svg { display:block; width:100%; min-width:560px; height:auto; margin-top:10px; }
svg text { font-family:inherit; fill:var(--soft); font-size:12px; } svg .name { font-size:13px; } svg .label { fill:var(--ink); font-weight:600; }
.grid { stroke:var(--faint); } .axis { stroke:var(--soft); } .limit { stroke:var(--bad); stroke-width:1.5; stroke-dasharray:6 4; }
svg .limit-name { fill:var(--bad); font-weight:600; } .beyond { fill:var(--bad); opacity:.06; }
.front { fill:none; stroke:var(--soft); stroke-width:6; stroke-linejoin:round; stroke-linecap:round; opacity:.2; }
.line { fill:none; stroke-width:2; opacity:.65; } .dot { stroke:var(--card); stroke-width:2; } .hollow { fill:var(--card); stroke-width:2.5; }
.ring { fill:none; stroke:var(--ink); stroke-width:2; } .failed { stroke:var(--bad); stroke-width:2.5; stroke-linecap:round; }
.mark:hover .dot { stroke:var(--ink); }
""" + "".join(f".line.c{i} {{ stroke:var(--c{i}) }} .dot.c{i} {{ fill:var(--c{i}) }} .hollow.c{i} {{ stroke:var(--c{i}) }}\n" for i in range(COLOURS))


def page(found: Sequence[TrialResult], *, margin: float, command: str | None, created: str) -> str:
    """The whole report as HTML."""
    order = ranked(found, margin)
    best = best_of(found, margin)
    title = text("report_title")
    body = [f"<header><h1>{escape(title)}</h1><p class='soft'>{escape(_subtitle(order, created))}</p></header>"]
    body.append(_tiles(found, best))
    if command:
        body.append(_card(text("report_use"), "", f"<pre><code>{escape(command)}</code></pre>"))
    chart = memory_chart(order, best)
    if chart.points:
        body.append(_card(text("report_chart"), text("report_chart_note"), svg(chart, text("report_chart")) + _legend(chart.series)))
    losses = loss_chart(order, best)
    if losses:
        body.append(_card(text("report_loss"), text("report_loss_note"), svg(losses, text("report_loss")) + _legend(losses.series)))
    body.append(_ranking(order, best, margin))
    body.append(_failures(order))
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width,initial-scale=1'>"
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html>\n<html lang='{current_language()}'><head>{head}</head>\n<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"


def _subtitle(found: Sequence[TrialResult], created: str) -> str:
    device = next((r.device for r in found if r.device), "-")
    return text("report_subtitle", device=device, created=created, known=sum(r.known for r in found), count=len(found))


def _card(title: str, note: str, content: str) -> str:
    below = f"<p class='soft'>{escape(note)}</p>" if note else ""
    return f"<section class='card'><h2>{escape(title)}</h2>{below}{content}</section>"


def _tiles(found: Sequence[TrialResult], best: TrialResult | None) -> str:
    # 溢出的也测到了速度
    failed = sum(r.status not in ("ok", "spilled") for r in found)
    tiles = [(f"{len(found) - failed} / {len(found)}", text("tile_done"))]
    if best:
        tiles = [
            (f"{best.tokens_per_s or 0:,.0f}", text("tile_speed")), (f"{best.step_ms or 0:,.0f} ms", text("tile_step")),
            (f"{best.held_gib or 0:.2f} / {best.budget_gib or 0:.2f}", text("tile_memory")), *tiles,
        ]
    return "<div class='tiles'>" + "".join(f"<div class='tile'><b>{escape(v)}</b><span>{escape(n)}</span></div>" for v, n in tiles) + "</div>"


def _legend(series: Sequence[str]) -> str:
    if len(series) < 2 or len(series) > COLOURS:
        return ""
    return "<div class='legend'>" + "".join(
        f"<span><i style='background:var(--c{index})'></i>{escape(name or text('trial_defaults'))}</span>" for index, name in enumerate(series)
    ) + "</div>"


def _ranking(order: Sequence[TrialResult], best: TrialResult | None, margin: float) -> str:
    heads = [("#", "n"), (text("column_setting"), ""), (text("column_status"), ""), ("tokens/s", "n"), (text("column_step"), "n"),
             (text("column_peak"), "n"), (text("column_predicted"), "n"), (text("column_batch"), "n")]
    rows = []
    for rank, (r, name) in enumerate(zip(order, names(order)), 1):
        cells = [
            (str(rank), "n"), (f"<code>{escape(name or text('trial_defaults'))}</code>", ""), (_badge(r), ""), (figure(r.tokens_per_s, ",.0f"), "n"),
            (figure(r.step_ms, ",.1f"), "n"), (_memory(r, margin), "n"), (figure(r.predicted_gib, ".2f"), "n"), (figure(r.effective_batch, "d"), "n"),
        ]
        rows.append(f"<tr{' class=best' if r is best else ''}>" + "".join(f"<td class='{kind}'>{cell}</td>" for cell, kind in cells) + "</tr>")
    table = "<table><tr>" + "".join(f"<th class='{kind}'>{escape(head)}</th>" for head, kind in heads) + "</tr>" + "".join(rows) + "</table>"
    return _card(text("report_ranking"), text("report_ranking_note", margin=margin * 100), table)


def _badge(result: TrialResult) -> str:
    return f"<span class='badge {result.status}'>{escape(text(STATUS_MESSAGES[result.status]))}</span>"


def _memory(result: TrialResult, margin: float) -> str:
    held, budget = result.held_gib, result.budget_gib
    if held is None:
        return "–"
    if not budget:
        return f"{held:.2f}"
    # 余量不足的不会被推荐，要看得出来
    tight = "" if result.status != "ok" or result.fits(margin) else " ⚠"
    return f"{held:.2f} / {budget:.2f}{tight}<span class='bar'><i style='width:{min(held / budget, 1):.0%}'></i></span>"


def figure(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def _failures(order: Sequence[TrialResult]) -> str:
    failed = [(r, n) for r, n in zip(order, names(order)) if r.status != "ok"]
    if not failed:
        return ""
    rows = "".join(
        f"<tr><td><code>{escape(name or text('trial_defaults'))}</code></td><td>{_badge(r)}</td><td>{escape(r.reason)}</td></tr>"
        for r, name in failed
    )
    heads = "".join(f"<th>{escape(text(name))}</th>" for name in ("column_setting", "column_status", "column_reason"))
    return _card(text("report_failures"), "", f"<table><tr>{heads}</tr>{rows}</table>")
