"""A page for people about one placement: self-contained HTML."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from deltaworks.units import format_time
from deltaworks.wording import counted, listed

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #2a8f5b; --bad: #c0392b; --bar: #3b7dd8; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p.sub { opacity: .75; margin-top: 0; }
.facts { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.2rem 0; }
.fact { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .9rem; min-width: 8.5rem; }
.fact b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.fact span { opacity: .75; font-size: .85rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } th:first-child, td:first-child, td.text, th.text { text-align: left; }
.bar { display: inline-block; height: .6rem; background: var(--bar); border-radius: 2px; vertical-align: middle; }
.note { border-left: 3px solid var(--bar); padding: .3rem .8rem; background: var(--soft); margin: .5rem 0; }
details summary { cursor: pointer; } code { background: var(--soft); padding: .05rem .3rem; border-radius: 3px; }
.wrap { overflow-x: auto; } .good { color: var(--good); } .bad { color: var(--bad); }
"""


FAILURES = {"starved": "starved", "memory_errors": "out of memory"}


def placement_page(placement: Mapping[str, Any]) -> str:
    """The page of what placement.json holds."""
    gpus = placement["gpus"]
    count, adapters = placement["gpu_count"], placement["adapter_count"]
    title = f"{counted(count, 'GPU')} for {counted(adapters, 'adapter')}"
    body = [f"<h1>{escape(title)}</h1>", f'<p class="sub">{escape(_subtitle(placement))}</p>', _facts(placement)]
    body += [f'<p class="note">{escape(note)}</p>' for note in placement["notes"]]
    body += ["<h2>GPUs</h2>", _gpus(gpus)]
    if placement.get("moves") is not None:
        body += ["<h2>Moves</h2>", _moves(placement["moves"])]
    if placement.get("compared"):
        body += ["<h2>Other ways to deal the same adapters</h2>", _compared(placement)]
    if placement.get("what_if"):
        body += ["<h2>What if</h2>", _what_if(placement["what_if"])]
    body += ["<h2>Start it</h2>", _START]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


_START = (
    "<p>One server: <code>./serve.sh gpu-0</code>. All on one machine: <code>./serve.sh</code> or <code>docker compose"
    " up</code>. A cluster: <code>kubectl apply -f kubernetes.yaml</code>.</p>"
    "<p>Requests are routed by a routing map, or by LiteLLM with a config. Which of them holds the right addresses"
    " depends on where the router runs: on the machine of the servers <code>routes.json</code> and"
    " <code>litellm.yaml</code>, inside the compose project <code>routes.compose.json</code> and"
    " <code>litellm.compose.yaml</code>, inside the cluster <code>routes.kubernetes.json</code> and"
    " <code>litellm.kubernetes.yaml</code>.</p>"
)


def _subtitle(placement: Mapping[str, Any]) -> str:
    headroom = placement["headroom"]
    untried = placement["untried"]
    if len(untried) == placement["gpu_count"]:
        return "NOT tried by the digital twin, because no request arrives"
    parts = ["NOT verified"]
    if placement["verified"] is not False:
        parts = ["the digital twin sees no adapter starved and no GPU out of memory"]
    parts += [f"but nothing was tried on {listed(untried)}, where no request arrives"] if untried else []
    parts.append(f"with {headroom:.0%} more traffic than asked" if headroom else "at the traffic asked")
    parts += [f"{name} at most {format_time(limit)}" for name, limit in placement["slo"].items()]
    parts += [placement["waits"]] if placement.get("waits") else []
    return ", ".join(parts)


def _facts(placement: Mapping[str, Any]) -> str:
    worst = max((gpu["predicted"]["ttft_ms"]["p99"] or 0.0 for gpu in placement["gpus"]), default=0.0)
    through, offered = placement["throughput_tps"], placement["offered_tps"]
    facts = [
        (*counted(placement["gpu_count"], "GPU").split(" "),),
        *([] if placement["lower_bound"] is None else [(str(placement["lower_bound"]), "lower bound")]),
        (f"{through:,.0f}", f"tokens/s of {offered:,.0f} asked"),
        (format_time(worst), "TTFT, 99th percentile, worst GPU"),
    ]
    if "price" in placement:
        facts.append((f"{placement['price']:g}", f"price; at least {placement['price_lower_bound'] or 0:.3g}"))
    return '<div class="facts">' + "".join(_fact(*fact) for fact in facts) + "</div>"


def _fact(value: str, label: str) -> str:
    return f'<div class="fact"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def _gpus(gpus: list[Any]) -> str:
    most = max((gpu["predicted"]["throughput_tps"] for gpu in gpus), default=0.0) or 1.0
    rows = []
    for gpu in gpus:
        said = gpu["predicted"]
        width = round(100 * said["throughput_tps"] / most)
        listed = "".join(
            f"<tr><td>{escape(a['name'])}</td><td>{a['share']:.0%}</td><td>{a['rank']}</td><td>{a['rate']:.4g}</td></tr>"
            for a in sorted(gpu["adapters"], key=lambda a: -a["rate"])
        )
        inner = f"<table><tr><th>adapter</th><th>share</th><th>rank</th><th>requests/s</th></tr>{listed}</table>"
        rows.append(
            f"<tr><td>{escape(gpu['id'])}</td><td class='text'>{escape(gpu['type'])}</td>"
            f"<td><details><summary>{len(gpu['adapters']):,}</summary>{inner}</details></td>"
            f"<td>{gpu['max_loras']}</td><td>{gpu['max_lora_rank']}</td><td>{said['kv_tokens']:,}</td>"
            f"<td class='text'><span class='bar' style='width:{width}px'></span> {said['throughput_tps']:,.0f}</td>"
            f"<td>{format_time(said['ttft_ms']['p50'])}</td><td>{format_time(said['ttft_ms']['p99'])}</td>"
            f"<td>{format_time(said['itl_ms']['mean'])}</td></tr>"
        )
    head = (
        "id",
        "type",
        "adapters",
        "max_loras",
        "max_lora_rank",
        "KV tokens",
        "tokens/s",
        "TTFT p50",
        "TTFT p99",
        "ITL",
    )
    return _table(head, rows, text=("type", "tokens/s"))


def _moves(moves: list[Any]) -> str:
    if not moves:
        return "<p>No adapter moves.</p>"
    rows = [
        f"<tr><td>{escape(m['adapter'])}</td><td class='text'>{escape(', '.join(m['from']) or 'nowhere')}</td>"
        f"<td class='text'>{escape(', '.join(m['to']) or 'nowhere')}</td><td class='text'>{escape(m['why'])}</td></tr>"
        for m in moves
    ]
    return _table(("adapter", "from", "to", "why"), rows, text=("from", "to", "why"))


def _compared(placement: Mapping[str, Any]) -> str:
    ours = {"deltaworks": {"gpus": placement["gpu_count"], "starved": 0, "memory_errors": 0}}
    rows = []
    for name, row in (ours | placement["compared"]).items():
        fails = [f"{row[key]} {label}" for key, label in FAILURES.items() if row[key]]
        if row["gpus"] is None:
            fails = ["some GPU starves, up to twice as many GPUs as ours"]
        verdict = f"<span class='bad'>{', '.join(fails)}</span>" if fails else "<span class='good'>accepted</span>"
        gpus = "-" if row["gpus"] is None else str(row["gpus"])
        rows.append(f"<tr><td>{escape(name)}</td><td>{gpus}</td><td class='text'>{verdict}</td></tr>")
    return _table(("way", "GPUs", "the twin says"), rows, text=("the twin says",))


def _what_if(answers: list[Any]) -> str:
    rows = [
        f"<tr><td>{escape(a['question'])}</td><td class='text'>{escape(a['answer'])}</td>"
        f"<td>{'-' if a['gpus'] is None else a['gpus']}</td><td>{format_time(a['ttft_p99_ms'])}</td></tr>"
        for a in answers
    ]
    return _table(("question", "answer", "GPUs", "TTFT p99"), rows, text=("answer",))


def _table(head: Iterable[str], rows: Iterable[str], text: tuple[str, ...] = ()) -> str:
    cells = "".join(f"<th{' class=text' if name in text else ''}>{escape(name)}</th>" for name in head)
    return f'<div class="wrap"><table><tr>{cells}</tr>{"".join(rows)}</table></div>'
