"""Reports in a real browser, at the widths of a desktop and of a phone: nothing is cut, overlapping or empty."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from dpo_jax.report import html

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium"),
]

LOOK = """
<script>
addEventListener("load", () => {
  const faults = [], wide = innerWidth, box = (one) => one.getBoundingClientRect();
  const named = (one) => one.tagName + " " + one.textContent.trim().slice(0, 40);
  if (document.documentElement.scrollWidth > wide) faults.push("the page is wider than the window");
  for (const one of document.querySelectorAll("h1, h2, p, figure, svg, .table")) {
    const { left, right, width, height } = box(one);
    if (width < 20 || height < 10) faults.push("empty: " + named(one));
    if (left < 0 || right > wide + 1) faults.push("cut: " + named(one));
  }
  for (const one of document.querySelectorAll("svg")) {
    if (one.querySelectorAll("path, use").length < 10) faults.push("nothing is drawn: " + named(one.parentElement));
  }
  for (const one of document.querySelectorAll("td, th")) {
    if (one.scrollWidth > one.clientWidth + 1) faults.push("cut: " + named(one));
  }
  for (const one of document.querySelectorAll("table")) if (!one.querySelector("td")) faults.push("an empty table");
  const blocks = [...document.body.children].filter((one) => !["SCRIPT", "STYLE", "PRE"].includes(one.tagName));
  blocks.slice(1).forEach((one, i) => {
    if (box(one).top < box(blocks[i]).bottom - 1) faults.push("overlap: " + named(blocks[i]) + " / " + named(one));
  });
  const figures = [...document.querySelectorAll("figure")];
  figures.forEach((one, i) => figures.slice(i + 1).forEach((other) => {
    const [a, b] = [box(one), box(other)];
    const apart = a.right <= b.left + 1 || b.right <= a.left + 1 || a.bottom <= b.top + 1 || b.bottom <= a.top + 1;
    if (!apart) faults.push("two figures overlap");
  }));
  const said = document.createElement("pre");
  said.id = "faults";
  said.textContent = JSON.stringify({ wide, faults });
  document.body.append(said);
});
</script>
"""


def browse(*words: str) -> str:
    common = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"]
    done = subprocess.run([CHROMIUM, *common, *words], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of a run, with options and long names; and one with texts, as judgements and demo have them."""
    folder = tmp_path_factory.mktemp("reports")
    names = ("loss", "eval_loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "grad_norm")
    rows = [{"step": i, **{name: 0.6931471 - 1e-7 * i * len(name) for name in names}} for i in range(1, 61)]
    options = {"model": "/somewhere/" + "a-long-name/" * 12, "data": {"files": "pairs.jsonl", "max_length": 1024}}
    lengths = {"chosen": np.arange(40), "rejected": np.arange(20, 90)}
    parts = [
        html.final_section(rows),
        html.training_section(rows),
        html.Section("Data", "/data/" + "x" * 120, plots=(html.lengths_plot("Lengths", lengths),)),
        html.options_section(options),
    ]
    html.write_report(folder / "run.html", "DPO run", "/models/" + "y" * 150 + ", aligned.", parts)
    prompt, answer = "What is the shortest way?", "word " * 120 + "unbroken" * 30
    texts = html.Table(
        ("step", "prompt", "response", "score"), [(i, prompt, answer, 0.5) for i in range(3)], ("prompt", "response")
    )
    curve = html.Series("win rate", list(range(8)), [0.1 * i for i in range(8)], ([0.0] * 8, [0.8] * 8))
    shown = [
        html.Section("Samples", "Texts.", table=texts),
        html.Section("Win rate", plots=(html.Plot("Wins", (curve,)),)),
    ]
    html.write_report(folder / "texts.html", "Judgements of answers", "Both models.", shown)
    return {path.stem: path for path in folder.glob("*.html")}


@pytest.mark.parametrize(("width", "device"), [(1280, "desktop"), (412, "phone")])
@pytest.mark.parametrize("name", ["run", "texts"])
def test_nothing_is_cut_overlapping_or_empty(
    reports: dict[str, Path], name: str, width: int, device: str, tmp_path: Path
) -> None:
    looked = tmp_path / "looked.html"
    looked.write_text(reports[name].read_text().replace("</body>", LOOK + "</body>"))
    dom = browse(f"--window-size={width},900", "--virtual-time-budget=5000", "--dump-dom", looked.as_uri())
    (said,) = re.findall(r'<pre id="faults">(.*?)</pre>', dom, re.DOTALL)
    found = json.loads(said)
    assert found["faults"] == [], device
    assert abs(found["wide"] - width) <= 100, "the window has the width that it was asked for"
    picture = tmp_path / f"{name}-{device}.png"
    browse(f"--window-size={width},1600", f"--screenshot={picture}", reports[name].as_uri())
    pixels = imread(picture)
    assert pixels.shape[1] == width
    assert pixels[:800].std() > 0.02, "something is to be seen on the first screen"
