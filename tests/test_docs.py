"""What the pages say can be typed and opened: commands with their flags, links, and every file in the README's tree."""

import contextlib
import importlib
import os
import re
import shlex
from pathlib import Path

import jax
import pytest

from jaxforget import command

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


def commands_of(page: Path) -> list[str]:
    """Return the command lines of a page: those that are indented, joined where they go on."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    found = re.findall(r"^    .*?python -m ((?:train|eval|benchmarks)\..*)$", text, re.MULTILINE)
    return [line.removesuffix('"') if line.count('"') % 2 else line for line in found]  # it stood in quotes


# docs/experiments.md is a diary: its commands were those of their day.
TYPED = sorted({one for page in PAGES if page.name != "experiments.md" for one in commands_of(page)})


def test_pages_have_commands():
    assert len(TYPED) > 30 and "train.unlearn" in TYPED


@pytest.mark.parametrize("line", TYPED)
def test_a_command_can_be_typed(line, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)  # else it would be moved
    monkeypatch.setattr(command, "launched", lambda launch, config: contextlib.nullcontext())  # it needs the devices
    name, *flags = (word for word in shlex.split(line, comments=True) if word != "...")
    module = importlib.import_module(name)
    given = []
    command.main(given.append, module.PRESETS, flags)
    assert len(given) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / path)) if path else page
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, link


def test_the_tree_of_the_readme_names_every_file():
    """But for tables of one file a row: model families and unlearning methods."""
    tree = (ROOT / "README.md").read_text().partition("## Tree")[2]
    for top in ("jaxforget", "train", "eval", "benchmarks"):
        for path in sorted((ROOT / top).rglob("*.py")):
            home = path.parent.name
            if path.name.startswith("__") or home in ("models", "unlearning", "bias", "compose", "speed"):
                continue
            package = re.search(rf"^  {home}/ (.*?)(?=^  \S|^\S)", tree, re.MULTILINE | re.DOTALL)
            assert re.search(rf"\b{path.name}", package[1] if package else tree), path.relative_to(ROOT)
