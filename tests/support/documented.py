"""Programs that the documents show, as files of their own."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def programs(page: str) -> dict[str, str]:
    """Name -> code of each Python block of a page that opens with `# NAME.py`."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
