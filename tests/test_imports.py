"""Imports go one way: a package knows those that stand before it in ORDER, and no other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Packages of one row do not know each other.
ORDER = (
    ("errors",),
    ("checks", "choice", "files"),
    ("data", "models", "report"),
    ("training",),
    ("metrics",),
    ("sisa", "fairness", "privacy", "debiasing", "influence", "unlearning"),
    ("launch",),
    ("command",),
    ("train",),
    ("eval",),
    ("benchmarks",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
FILES = [path for top in ("jaxforget", "train", "eval", "benchmarks") for path in sorted((ROOT / top).rglob("*.py"))]


def package_of(module: str) -> str | None:
    """Return the part of this project that a module belongs to: a package of jaxforget, or train, eval, benchmarks."""
    top, _, rest = module.partition(".")
    if top == "jaxforget":
        return rest.partition(".")[0] or None
    return top if top in RANK else None


def imported(tree: ast.AST):
    """Yield (line, module) of every import that a program makes, those inside functions too, but none of types."""
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    typing = {id(inner) for guard in guards for inner in ast.walk(guard)}
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are written in full"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def upward(path: Path, text: str) -> list[str]:
    """Return the imports of a file that do not go down."""
    mine = package_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    found = []
    for line, module in imported(ast.parse(text)):
        other = package_of(module)
        if other is not None and other != mine and (mine is None or RANK[other] >= RANK[mine]):
            found.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    return found


def test_every_file_is_ranked():
    names = {package_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in FILES}
    assert names - {"__init__"} == set(RANK)


def test_imports_go_down():
    assert [found for path in FILES for found in upward(path, path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "line",
    (
        "from jaxforget.training.step import make_step",
        "from jaxforget import command",
        "import train.lm",
        "def late():\n    from jaxforget.sisa import ledger",
    ),
)
def test_an_upward_import_is_found(line):
    assert len(upward(ROOT / "jaxforget" / "models" / "hub.py", line)) == 1
    assert len(upward(ROOT / "jaxforget" / "influence" / "study.py", line)) == (0 if "training" in line else 1)
    assert upward(ROOT / "benchmarks" / "memory.py", line) == []
