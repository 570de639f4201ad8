"""What several test files call."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_tool(monkeypatch, name: str, *arguments) -> None:
    """Runs tools/NAME.py in this process, as the command line would."""
    monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
