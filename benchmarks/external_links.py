"""Whether the pages that README.md, CONTRIBUTING.md and docs/ link to are still there. Needs a network.

python benchmarks/external_links.py     exit code 1, and a line for each, where some are gone
"""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LOCAL = re.compile(r"https?://(127\.0\.0\.1|localhost|\[::1\])")


def links() -> dict[str, list[str]]:
    """Address -> the pages that link to it. Those in code blocks are examples and are left out."""
    found: dict[str, list[str]] = {}
    for page in PAGES:
        text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for address in re.findall(r"\]\((https?://[^)\s]+)\)|<(https?://[^>\s]+)>", text):
            url = next(filter(None, address))
            if not LOCAL.match(url):
                found.setdefault(url, []).append(page.relative_to(ROOT).as_posix())
    return found


def fault(url: str) -> str | None:
    """What is wrong with an address, or None. Pages that refuse programs (401, 403, 429) are there."""
    try:
        answer = httpx.get(url, follow_redirects=True, timeout=30, headers={"User-Agent": "Mozilla/5.0 (link check)"})
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error}"
    return None if answer.is_success or answer.status_code in (401, 403, 429) else str(answer.status_code)


def main() -> int:
    found = links()
    with ThreadPoolExecutor(8) as pool:
        faults = {url: what for url, what in zip(found, pool.map(fault, found), strict=True) if what}
    for url, what in faults.items():
        print(f"{what}: {url} ({', '.join(found[url])})")
    print(f"{len(found)} links, {len(faults)} of them gone")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
