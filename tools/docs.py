"""README.md from nbs/index.ipynb, and a site of HTML pages of all notebooks in _docs/. Needs neither Quarto nor a network.

    python tools/docs.py readme docs
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))      # tests load this file by its path
from website.build import docs
from website.readme import readme, write_readme

__all__ = ["docs", "readme", "write_readme"]

if __name__ == "__main__":
    todo = sys.argv[1:] or ["readme", "docs"]
    for name in todo: {"readme": write_readme, "docs": docs}[name]()
