"""The page of a run: what it shows, and that a browser shows it."""

import html
import json
import math
import re
import shutil
import subprocess

import pages
import pytest

from jaxforget.report import terms
from jaxforget.report.page import cell, figure, plots, table, write_page

ROWS = [
    {"name": "alpha", "accuracy": 9.5, "accuracy_ci95": 0.25, "change": "+66 %", "gap": 0.2, "gap_low": 0.1,
     "gap_high": 0.3, "note": "short", "seconds": 12345678},
    {"name": "beta <b>", "accuracy": 10.25, "accuracy_ci95": 0.5, "change": "−5 %", "gap": None, "note": None,
     "seconds": 1.5e-7},
    {"name": "gamma", "accuracy": -3.0, "accuracy_ci95": 0.0, "change": None, "gap": 0.123456789012, "gap_low": 0.05,
     "gap_high": 0.2, "note": "a note that is long enough to need several lines", "seconds": 950},
    {"name": "delta", "accuracy": math.nan, "change": "+7.5 %", "gap": 1e-3, "note": "medium", "seconds": 1200},
]  # fmt: skip
FIELDS = ("name", "accuracy", "change", "gap", "gap_low", "gap_high", "absent", "note", "seconds")


def draw(axes):
    for name in ("first & last", "second"):
        axes.plot([0, 1], [1, 2], label=name)
    axes.set(xlabel="step", ylabel="loss (nats)", title="A curve")
    axes.legend(loc="center")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    wide = [{**row, **{f"column_{n}": n / 7 for n in range(30)}} for row in ROWS]
    sections = [
        ("Table", "How `alpha` < beta is read.", table(ROWS, FIELDS, lambda row: row["name"] == "alpha")),
        ("Wide", "More than fits.", table(wide, (*FIELDS, *(f"column_{n}" for n in range(30))))),
        ("Plots", "Two.", plots(figure(draw), figure(draw, width=12.0))),
    ]
    write_page(path, "A <page>", "What was asked?", sections, {"out": "runs/" + "x" * 200}, ["`alpha` came out."])
    return path


def test_numbers_are_for_people():
    assert [cell(x) for x in (None, math.nan, math.inf, True, 1234567, 12345.678, 0.123456789, 3e-7, "a", (0.123456, 2))
            ] == ["–", "–", "–", "yes", "1,234,567", "12,346", "0.1235", "3e-07", "a", "0.1235, 2"]  # fmt: skip
    assert [cell(1.5678, x) for x in (None, 0.0, 1e-12, 3e-5, 0.00123, 0.123, 4.0, 4321.9)] == [
        "1.568", "1.568", "1.568", "1.568 ±3e-05", "1.5678 ±0.0012", "1.57 ±0.12", "1.6 ±4.0", "2 ±4,322"
    ]  # fmt: skip


def test_a_page_is_one_file_that_explains_itself(page):
    text = page.read_text()
    found = pages.check(text)
    assert len(found.tables) == 2 and len(found.plots) == 2
    # Without the ends of the interval, and what is absent.
    names, accuracy, change, gap, note, _ = zip(*found.tables[0]["rows"])
    assert names == ("alpha", "beta <b>", "gamma", "delta")
    assert accuracy == ("9.50 ±0.25", "10.25 ±0.50", "-3", "–") and change[0] == "+66 %" and note[1] == "–"
    assert gap == ("0.2 [0.1, 0.3]", "–", "0.1235 [0.05, 0.2]", "0.001")
    assert found.plots[0]["aria-label"] == (
        "Plot. A curve; across: step; up: loss (nats); shown: first & last, second"
    )
    assert "<title>A &lt;page&gt;</title>" in text and "How <code>alpha</code> &lt; beta" in text
    assert "<li><code>alpha</code> came out.</li>" in text and terms.meaning("accuracy") in text
    assert "±: half of the 95 % interval" in text and text.count("<tr class='mark'>") == 1


@pytest.mark.parametrize("broken", [
    "<img src='x.png'>", "<script src='x.js'></script>", "<link href='x.css'>", "<a href='https://x.org'>x</a>",
    "<style>p { background: url(x.png) }</style>", "<svg role='img' aria-label='Plot. across: x'></svg>",
    "<table><thead><tr><th>name</th></tr></thead><tbody><tr><td>1</td></tr></tbody></table>", "<div>",
])  # fmt: skip
def test_the_check_of_pages_can_fail(page, broken):
    with pytest.raises(AssertionError):
        pages.check(page.read_text().replace("</body>", f"{broken}</body>"))


def test_a_legend_covers_nothing():
    """It stands outside of the axes, in a figure that grew by its height."""
    with_legend = figure(draw)
    without = figure(lambda axes: (draw(axes), axes.get_legend().remove()))
    high, low = (float(re.search(r'height="([\d.]+)pt"', svg)[1]) for svg in (with_legend, without))
    assert high > low
    axes, legend = (with_legend.index(f'<g id="{name}">') for name in ("axes_1", "legend_1"))
    inside = with_legend[axes:legend]
    assert inside.count("<g") == inside.count("</g>")  # the axes are closed before the legend begins
    frame = re.search(r'<g id="patch_2">\s*<path d="M [\d.]+ ([\d.]+)', with_legend)
    texts = re.findall(r'translate\([\d.]+ ([\d.]+)\) scale', with_legend[legend:])
    assert frame and texts and min(map(float, texts)) > float(frame[1])


def test_terms_fill_their_sentences():
    assert terms.meaning("forget_nll") .startswith("Mean loss on the forget set in nats, a token or")
    assert "guess home town" in terms.meaning("leakage_home_town")
    assert "random draw" in terms.meaning("test_sampled_eo_max")  # the first that fits
    assert terms.meaning("tofu_forget_truth_ratio_t1") != terms.meaning("tofu_retain_truth_ratio_t1")
    assert terms.meaning("name") is None
    for text in terms.MEANINGS.values():
        assert text.endswith(".") and len(text.split()) > 1


# What a reader does: look at the page on a telephone, and press headings.
READER = """
addEventListener("load", () => {
  const table = document.querySelector("table"), order = [], errors = [];
  addEventListener("error", event => errors.push(event.message));
  const press = (at, times) => {
    const button = table.tHead.rows[0].cells[at].querySelector("button");
    for (let n = 0; n < times; n++) button.click();
    order.push([...table.tBodies[0].rows].map(row => row.cells[0].textContent[0]).join("")
      + " " + [...table.tHead.rows[0].cells].map(head => head.getAttribute("aria-sort")[0]).join(""));
  };
  for (let at = 0; at < 6; at++) { press(at, 1); press(at, 1); }
  const wide = document.querySelectorAll("table")[1], plot = document.querySelector("svg");
  const first = wide.tBodies[0].rows[0].cells[0], before = first.getBoundingClientRect().left;
  wide.parentNode.scrollLeft = 500;
  const button = table.querySelector("button");
  button.focus();
  parent.postMessage(JSON.stringify({order, errors, inner: innerWidth, page: document.documentElement.scrollWidth,
    wide: wide.scrollWidth, moved: first.getBoundingClientRect().left - before,
    plot: plot.getBoundingClientRect().width, focused: document.activeElement === button,
    loaded: performance.getEntriesByType("resource").length}), "*");
});
"""
# A window is never narrower than 500 pixels; a frame is.
FRAME = """<!doctype html><pre id="said"></pre><script>
addEventListener("message", event => document.getElementById("said").textContent = event.data);
</script><iframe src="copy.html" width="390" height="844" style="border: 0"></iframe>"""


@pytest.fixture(scope="module")
def seen(page, tmp_path_factory):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium to open the page with")
    home = tmp_path_factory.mktemp("browser")
    copy = home / "copy.html"
    copy.write_text(page.read_text().replace("</body>", f"<script>{READER}</script></body>"))
    (home / "frame.html").write_text(FRAME)
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home / 'profile'}", "--dump-dom",
         "--enable-logging=stderr", "--hide-scrollbars", "--virtual-time-budget=2000",
         (home / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    said = re.search('<pre id="said">(.+?)</pre>', done.stdout, re.DOTALL)
    if said is None:
        pytest.skip(f"Chromium does not open pages here: {done.stderr[-200:]}")
    assert "CONSOLE" not in done.stderr
    return json.loads(html.unescape(said[1]))


def test_a_narrow_screen_shows_the_page(seen):
    assert seen["inner"] == 390 and seen["page"] <= 390
    assert seen["wide"] > 1000 and abs(seen["moved"]) < 1  # the table scrolls in its box, its first column stays
    assert 200 < seen["plot"] <= 390


def test_nothing_is_loaded_and_nothing_fails(seen):
    assert seen["loaded"] == 0 and not seen["errors"]


def test_headings_sort_by_value(seen):
    """By name, accuracy, change, gap, note, seconds: up, then down; what is missing stays last."""
    assert seen["focused"]  # headings are buttons, so that the keyboard reaches and presses them
    assert seen["order"] == [
        "abdg annnnn", "gdba dnnnnn",
        "gabd nannnn", "bagd ndnnnn",
        "bdag nnannn", "adbg nndnnn",
        "dgab nnnann", "agdb nnndnn",
        "gdab nnnnan", "adgb nnnndn",
        "bgda nnnnna", "adgb nnnnnd",
    ]  # fmt: skip
