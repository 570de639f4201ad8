import re
import subprocess
import sys
from pathlib import Path

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
