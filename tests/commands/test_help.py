"""What a user sees first: help, errors of flags, completion."""

import importlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import running

from jaxforget import command

NAMES = sorted(f"{top}.{path.stem}" for top in ("train", "eval") for path in (running.REPO / top).glob("[a-z]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_a_command_does(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        command.main(module.run, module.PRESETS, ["--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert " ".join(module.Config.__doc__.split()) in said
    for preset, make in module.PRESETS.items():
        assert f"{preset}: {' '.join(make.__doc__.split())}" in said
    assert "--mesh" in said and "--out" in said


def test_help_needs_neither_flax_nor_orbax_nor_transformers():
    """They take most of the time in which help would be there."""
    asked = """
import sys, train.unlearn
from jaxforget import command
try:
    command.main(train.unlearn.run, train.unlearn.PRESETS, ["--help"])
finally:
    print({"flax", "orbax", "transformers", "datasets", "matplotlib", "scipy"} & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", asked], cwd=running.REPO, capture_output=True, text=True)
    assert done.stderr == "set()\n"


def test_a_reader_who_has_gone_is_no_failure_of_ours():
    """As in `train.forget --help | head -1`."""
    process = running.start("train.forget", "--help")
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=300)) == ("", 1)


def test_every_command_is_a_program():
    scripts = tomllib.loads((running.REPO / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == dict.fromkeys(NAMES, "jaxforget.command:script")


def test_a_program_runs_the_command_of_its_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/some/where/bin/train.forget", "--preset", "large"])
    with pytest.raises(SystemExit) as stop:
        command.script()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: unknown --preset 'large'; valid presets are default\n"


def test_a_shell_completes_flags_and_presets(tmp_path):
    if not shutil.which("bash"):
        pytest.skip("there is no bash")
    process = running.run("train.forget", "--tyro-print-completion", "bash")
    (tmp_path / "completion").write_text(process.stdout)
    asked = """
source completion
function=$(complete -p train.forget | sed 's/.*-F \\([^ ]*\\).*/\\1/')
for words in "--ens" "--preset ''"; do
    eval "COMP_WORDS=(train.forget $words)"; COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    $function train.forget "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"; echo "${COMPREPLY[@]}"
done
"""
    done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["--ensemble", "default"], done.stderr


@pytest.mark.parametrize(("columns", "left_out"), ((50, 2), (200, 0)))
def test_a_table_cuts_nothing_short(monkeypatch, capsys, columns, left_out):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    name = "a_name_that_is_rather_long"
    row = {"name": name, "loss": 1.2345, "loss_ci95": 0.012, "steps": 123456, "verdict": "harmed what was to be kept"}
    command.print_table([row], ["name", "loss", "steps", "verdict"], "title")
    said = re.sub("\x1b[^m]*m", "", capsys.readouterr().out)
    assert "…" not in said and name in said and "1.234 ±0.012" in said
    assert max(map(len, said.splitlines())) <= columns
    assert ("123,456" in said) == (not left_out)
    assert (f"{left_out} more columns in results.json" in said) == bool(left_out)
