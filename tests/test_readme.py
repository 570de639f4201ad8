import re
import subprocess
import sys
from pathlib import Path

from detection.cli import VERBS
from detection.config import recipe_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_runs():
    (example,) = [text for text in EXAMPLES if "import backbones" in text]
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "('c5', 256, 32)" in done.stdout


def test_every_file_that_the_readme_names_exists():
    named = set(re.findall(r"(?:tools|configs|backbones|detection|results)/[\w/]+\.\w+", README))
    assert len(named) > 6
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_command_on_a_page_has_a_verb_and_a_recipe_that_exist():
    pages = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]
    pages += (ROOT / "configs").glob("*.yaml")
    commands = []
    for page in pages:
        lines = re.findall(
            r"(?:hoyer-det|--module detection) ([a-z-]+)(?: ([\w./:]+))?", page.read_text(encoding="utf-8")
        )
        commands += [(page.name, verb, argument) for verb, argument in lines]
    assert len(commands) > 20
    assert [command for command in commands if command[1] not in VERBS] == []
    recipes = [command for command in commands if command[1] in ("train", "check-data", "compare", "summary")]
    names = {*recipe_names(), "RECIPE", "NAME", ""}
    assert [each for each in recipes if each[2] not in names and not re.search("[./:]", each[2])] == []


def test_the_tree_names_what_is_there():
    (tree,) = re.findall(r"```text\n(backbones/.*?)```", README, flags=re.DOTALL)
    for package in ("backbones", "detection"):
        (lines,) = re.findall(rf"^{package}/.*\n((?:  .*\n)+)", tree, flags=re.MULTILINE)
        names = [line.strip().partition("   ")[0] for line in lines.splitlines()]
        named = set(re.findall(r"[a-z]\w*(?:\.py|/)", " ".join(names)))
        there = {path.name for path in (ROOT / package).glob("[a-z]*.py")}
        there |= {f"{path.name}/" for path in (ROOT / package).iterdir() if path.is_dir() and path.name[0] not in "_."}
        assert named == there, package
