"""One self-contained HTML page a run: a table, plots as inline SVG, the settings. No network, no scripts."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxforget.files import write_atomic

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #1c2733; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.note { color: #52606d; margin-top: .25rem; max-width: 60rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .3rem .55rem; text-align: right; border-bottom: 1px solid #e1e7ed; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #9aa8b5; } tr.mark td { background: #eef5ec; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } .plots svg { max-width: 100%; height: auto; }
pre { background: #f4f6f8; padding: 1rem; overflow-x: auto; font-size: 12px; }
"""


def cell(value: Any, interval: Any = None) -> str:
    """Format a number for people: four significant digits, its interval behind it, a dash for null."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return text if interval is None else f"{text} ±{interval:.2g}"


def table(
    rows: Sequence[dict[str, Any]], fields: Sequence[str], mark: Callable[[dict], bool] = lambda row: False
) -> str:
    """Render rows as an HTML table; `mark` highlights yardstick rows."""
    head = "".join(f"<th>{html.escape(field.replace('_', ' '))}</th>" for field in fields)
    body = []
    for row in rows:
        cells = "".join(f"<td>{html.escape(cell(row.get(f), row.get(f + '_ci95')))}</td>" for f in fields)
        body.append(f"<tr class='mark'>{cells}</tr>" if mark(row) else f"<tr>{cells}</tr>")
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def figure(draw: Callable[[Any], None], *, width: float = 5.2, height: float = 3.7) -> str:
    """Draw on a matplotlib Axes and return it as an inline SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(
        {
            "svg.hashsalt": "jaxforget",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
        }
    ):
        canvas, axes = plt.subplots(figsize=(width, height), layout="constrained")
        draw(axes)
        buffer = io.StringIO()
        # No date, for equal runs give equal pages; no creator, for it holds an address.
        canvas.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        plt.close(canvas)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def write_page(path: Path, title: str, lead: str, sections: Sequence[tuple[str, str, str]], config: dict) -> None:
    """Write the page. sections: (heading, one sentence on how to read it, HTML)."""
    parts = [
        f"<h2>{html.escape(head)}</h2><p class='note'>{html.escape(note)}</p>{body}" for head, note, body in sections
    ]
    settings = html.escape(json.dumps(config, indent=2))
    write_atomic(
        path,
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p class='note'>{html.escape(lead)}</p>{''.join(parts)}"
        f"<h2>Settings</h2><details><summary>config.json</summary><pre>{settings}</pre></details></body></html>\n",
    )
