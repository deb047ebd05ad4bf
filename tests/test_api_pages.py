"""Pages of the API hold the docstrings."""

import subprocess
import sys
from pathlib import Path

from strategies import ClientHalf

ROOT = Path(__file__).parents[1]


def test_pages_of_a_package_hold_the_docstrings_of_its_modules(tmp_path):
    line = [sys.executable, "docs/api.py", str(tmp_path), "strategies.base"]
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    modules = {path.stem for path in (ROOT / "strategies" / "base").glob("*.py")} - {"__init__"}
    assert {page.stem for page in (tmp_path / "strategies" / "base").iterdir()} == modules
    page = (tmp_path / "strategies" / "base" / "client.html").read_text()
    for line in filter(None, map(str.strip, ClientHalf.__doc__.splitlines())):
        assert line in page
    assert "<h6" in page  # sections in Google's style: Args, Returns, Attributes
