"""One self-contained HTML page a run: what came out, tables that sort, plots as inline SVG, settings. No network."""

from __future__ import annotations

import html
import io
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxforget.files import write_atomic
from jaxforget.report.run import program
from jaxforget.report.terms import meaning

STYLE = """
:root { --ink: #1c2733; --soft: #52606d; --paper: #fff; --line: #e1e7ed; --rule: #9aa8b5; --mark: #eef5ec;
  --box: #f4f6f8; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #dde4ea; --soft: #9fadb9; --paper: #14191e; --line: #2b343c;
  --rule: #5c6974; --mark: #1d2d20; --box: #1e252b; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1280px; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin-bottom: 0; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p, ul, dl { max-width: 60rem; } p.note, figcaption, dl { color: var(--soft); margin-top: .25rem; }
ul.found { padding-left: 1.2rem; } ul.found li { margin: .2rem 0; }
figure { margin: 1rem 0; } figcaption, dl { font-size: 13px; } dt { font-weight: 600; } dd { margin: 0 0 .3rem 1rem; }
summary { cursor: pointer; } 
.scroll { overflow-x: auto; background: linear-gradient(to left, var(--paper) 30%, transparent) right / 3rem 100%
  no-repeat local, linear-gradient(to left, #8888, transparent) right / .7rem 100% no-repeat; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .3rem .55rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap;
  overflow-wrap: normal; }
th.text, td.text { text-align: left; } td.long { white-space: normal; min-width: 16rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
td.long:first-child { max-width: 24rem; }
thead th { border-bottom: 2px solid var(--rule); vertical-align: bottom; padding: 0; }
th button { all: unset; cursor: pointer; padding: .3rem .55rem; font-weight: 600; white-space: normal; }
th button:focus-visible { outline: 2px solid #3f90da; } th button::after { content: "\\a0↕"; color: var(--rule); }
th[aria-sort=ascending] button::after { content: "\\a0↑"; } th[aria-sort=descending] button::after { content: "\\a0↓"; }
tr.mark td { background: var(--mark); }
.plots { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1rem; overflow-x: auto; }
svg { max-width: 100%; height: auto; background: #fff; }
pre { background: var(--box); padding: 1rem; overflow-x: auto; font-size: 12px; } code { font-size: 13px; }
pre.command { white-space: pre-wrap; }
@media (max-width: 600px) { body { margin-top: 1rem; }
  td:first-child, td.long:first-child { max-width: 46vw; min-width: 6rem; white-space: normal;
    overflow-wrap: anywhere; } }
"""

# Sorts a table by the column whose heading is pressed: up, then down. Numbers by value, whatever stands behind them;
# a column with anything else as text; cells without a value last either way.
SCRIPT = """
document.addEventListener("click", event => {
  const button = event.target.closest("thead button");
  if (!button) return;
  const head = button.parentNode, body = head.closest("table").tBodies[0], rows = [...body.rows];
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const text = row => row.cells[head.cellIndex].textContent.trim().replace(/\\u2212/g, "-");
  const empty = row => ["", "\\u2013", "\\u2014"].includes(text(row));
  const number = row => {
    const found = text(row).match(/^[+-]?(\\d[\\d,]*\\.?\\d*|\\.\\d+)(e[+-]?\\d+)?(?=$|[\\s\\u00b1%\\[(])/i);
    return found ? Number(found[0].replace(/,/g, "")) : NaN;
  };
  const numeric = rows.every(row => empty(row) || !isNaN(number(row)));
  rows.sort((a, b) => empty(a) - empty(b) || (empty(a) ? 0 : sign * (numeric ? number(a) - number(b)
    : text(a).localeCompare(text(b), "en", {numeric: true}))));
  body.append(...rows);
  for (const other of head.parentNode.cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
});
"""

# Ten colours that the colour-blind tell apart (arXiv 2107.02270), the red last: it is the yardsticks'.
COLOURS = ("#3f90da", "#ffa90e", "#832db6", "#94a4a2", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd", "#bd1f01")


def cell(value: Any, interval: Any = None) -> str:
    """Format a number for people: four significant digits; or as many as its interval warrants, and that behind it.

    An interval of 0 is left out, and null is a dash.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(cell, value))
    if not isinstance(value, (int, float)):
        return str(value)
    if interval and interval >= 1e-4:  # its first two digits, and the value to the same decimal
        places = max(0, 1 - math.floor(math.log10(interval)))
        return f"{value:,.{places}f} ±{interval:,.{places}f}"
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:,.4g}"
    return f"{text} ±{interval:.2g}" if interval and interval > 1e-9 * abs(value) else text  # less is of rounding


def table(
    rows: Sequence[Mapping[str, Any]], fields: Sequence[str], mark: Callable[[Any], bool] = lambda row: False
) -> str:
    """Render rows as an HTML table that sorts; `mark` highlights yardstick rows.

    Behind a number stands its interval: ± <field>_ci95, or <field>_low and <field>_high in brackets, where the row has
    them; columns of those two are left out, and those without any value. Below the table stands what columns mean.
    """
    ends = [field for field in fields if re.sub("_(low|high)$", "", field) in set(fields) - {field}]
    known = [field for field in fields if any(row.get(field) is not None for row in rows)]
    fields = [field for field in known if field not in ends]
    texts = [[_spanned(row, field) for field in fields] for row in rows]
    kinds = [_kind([row.get(field) for row in rows], column) for field, column in zip(fields, zip(*texts))]
    heads = [html.escape(field.replace("_", " ")) for field in fields]
    head = "".join(f"<th scope='col' aria-sort='none'{kind}><button type='button'>{text}</button></th>"
                   for text, kind in zip(heads, kinds))  # fmt: skip
    body = []
    for row, mine in zip(rows, texts):
        cells = "".join(f"<td{kind}>{html.escape(text)}</td>" for kind, text in zip(kinds, mine))
        body.append(f"<tr class='mark'>{cells}</tr>" if mark(row) else f"<tr>{cells}</tr>")
    said = [f"{len(rows)} rows; press a heading to sort."] if len(rows) > 1 else []
    said += ["±: half of the 95 % interval."] if any(" ±" in one for one in body) else []
    said += ["–: does not apply or was not measured."] if any(">–<" in one for one in body) else []
    terms = "".join(f"<dt>{html.escape(field.replace('_', ' '))}</dt><dd>{html.escape(text)}</dd>"
                    for field in fields if (text := meaning(field)))  # fmt: skip
    terms = f"<details><summary>What the columns mean</summary><dl>{terms}</dl></details>" if terms else ""
    return (f"<figure><div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
            f"</div><figcaption>{' '.join(said)}{terms}</figcaption></figure>")  # fmt: skip


def _spanned(row: Mapping[str, Any], field: str) -> str:
    value, low, high = row.get(field), row.get(f"{field}_low"), row.get(f"{field}_high")
    text = cell(value, row.get(f"{field}_ci95"))
    known = isinstance(value, (int, float)) and low is not None and high is not None
    return f"{text} [{cell(low)}, {cell(high)}]" if known else text


def _kind(values: Sequence[Any], texts: Sequence[str]) -> str:
    """Return the class of a column: text stands left, and long text breaks."""
    if not any(isinstance(value, (str, list, tuple)) and not re.match(r"[+-]?[\d.]", text)
               for value, text in zip(values, texts)):  # fmt: skip
        return ""
    return " class='text long'" if max(map(len, texts)) > 40 else " class='text'"


def figure(draw: Callable[[Any], Any], *, width: float = 5.2, height: float = 3.7) -> str:
    """Draw on a matplotlib Axes and return it as an inline SVG.

    Its legend moves below the plot, where it covers nothing. Title, labels of the axes and legend make the text that
    is read out instead of the plot.
    """
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
            "axes.axisbelow": True,
            "axes.prop_cycle": plt.cycler(color=COLOURS),
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "legend.fontsize": 8,
        }
    ):
        canvas, axes = plt.subplots(figsize=(width, height), layout="constrained")
        draw(axes)
        handles, names = axes.get_legend_handles_labels()
        if axes.get_legend():
            axes.get_legend().remove()
            columns = max(1, min(len(names), int(15 * width / (6 + max(map(len, names))))))
            canvas.set_figheight(height + 0.18 * math.ceil(len(names) / columns))
            canvas.legend(handles, names, loc="outside lower center", ncols=columns)
        buffer = io.StringIO()
        # No date, for equal runs give equal pages; no creator, for it holds an address.
        canvas.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        plt.close(canvas)
    shown = {"": axes.get_title(), "across: ": axes.get_xlabel(), "up: ": axes.get_ylabel(),
             "shown: ": ", ".join(names)}  # fmt: skip
    told = html.escape("Plot. " + "; ".join(f"{what}{text}" for what, text in shown.items() if text), quote=True)
    svg = buffer.getvalue()
    # On a narrow screen it shrinks as far as its text stays legible, then scrolls in its box.
    return svg[svg.index("<svg") :].replace(
        "<svg", f'<svg role="img" aria-label="{told}" style="min-width: {0.62 * width:.2f}in"', 1
    )


def plots(*figures: str) -> str:
    """Put figures beside each other where there is room."""
    return f"<div class='plots'>{''.join(figures)}</div>"


def write_page(
    path: Path,
    title: str,
    lead: str,
    sections: Sequence[tuple[str, str, str]],
    config: dict,
    found: Sequence[str] = (),
    *,
    tell_command: bool = True,
) -> None:
    """Write the page. lead: what was asked; found: what came out, a sentence each; names in backticks become code.

    sections: (heading, one sentence on how to read it, HTML). tell_command: show what the process was started with;
    not where flags hold what the page must not.
    """
    parts = [f"<section><h2>{html.escape(head)}</h2><p class='note'>{_prose(note)}</p>{body}</section>"
             for head, note, body in sections]  # fmt: skip
    came_out = f"<ul class='found'>{''.join(f'<li>{_prose(one)}</li>' for one in found)}</ul>" if found else ""
    settings, line = html.escape(json.dumps(config, indent=2)), _command_line() if tell_command else ""
    write_atomic(
        path,
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p class='lead'>{_prose(lead)}</p>{came_out}{''.join(parts)}"
        f"<section><h2>Settings</h2>{line}<details><summary>All settings (config.json)</summary>"
        f"<pre>{settings}</pre></details></section><script>{SCRIPT}</script></body></html>\n",
    )


def _prose(text: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _command_line() -> str:
    """Return the command that this process was started with, where it is one."""
    if (name := program()) is None:
        return ""
    line = shlex.join(["python", "-m", name, *sys.argv[1:]])
    return f"<p class='note'>This page was written by</p><pre class='command'>{html.escape(line)}</pre>"
