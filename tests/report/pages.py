"""What every page must be: one file that loads nothing, with tables that sort and plots that say what they show."""

import re
from html.parser import HTMLParser

LOADS = {"src", "srcset", "data", "action", "poster", "background"}  # attributes that a browser fetches
EMPTY = {"meta", "br", "hr", "input", "wbr"}


class Page(HTMLParser):
    """Problems, tables and plots of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.problems, self.tables, self.plots, self.open = [], [], [], []
        self.feed(text)
        self.problems += [f"unclosed {tag}" for tag in self.open]

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        if tag in ("link", "iframe", "object", "embed", "base"):
            self.problems.append(f"<{tag}>")
        for name, value in attributes:
            fetched = name in LOADS or name.split(":")[-1] == "href" or (name == "style" and "url(" in value)
            if fetched and not value.startswith(("#", "data:")):
                self.problems.append(f"<{tag} {name}={value}>")
        if tag == "table":
            self.tables.append({"heads": [], "buttons": 0, "rows": []})
        elif tag == "th":
            self.tables[-1]["heads"].append(known)
        elif tag == "button":
            self.tables[-1]["buttons"] += 1
        elif tag == "tr" and self.open[-1] == "tbody":
            self.tables[-1]["rows"].append([])
        elif tag == "td":
            self.tables[-1]["rows"][-1].append("")
        elif tag == "svg":
            self.plots.append(known)
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, text):
        if self.open and self.open[-1] == "style" and re.search(r"@import|url\((?!['\"]?(#|data:))", text):
            self.problems.append("a style that loads")
        elif self.open and self.open[-1] == "td":
            self.tables[-1]["rows"][-1][-1] += text


def check(text: str) -> Page:
    """Assert it of a page; return what is in it."""
    page = Page(text)
    assert not page.problems
    assert not re.search(r"https?:", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
    assert re.search(r"<h1>.+?</h1><p class='lead'>.+?</p>", text)
    for table in page.tables:
        assert table["heads"] and table["buttons"] == len(table["heads"])
        assert all(head["aria-sort"] == "none" for head in table["heads"])
        assert table["rows"] and {len(row) for row in table["rows"]} == {len(table["heads"])}
        assert not [one for row in table["rows"] for one in row if re.search(r"\d\.\d{9}|\bnan\b|\binf\b|None", one)]
    for plot in page.plots:
        assert plot["role"] == "img" and re.search("across: .+; up: .+", plot["aria-label"]), plot["aria-label"]
    return page
