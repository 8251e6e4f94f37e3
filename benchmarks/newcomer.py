"""What a newcomer types, as README.md has it, on a clean clone in a fresh environment: seconds for each step.

    python benchmarks/newcomer.py [--folder DIR] [--fast] [--json FILE]

The set-up line and the block under "Your first run" are read from README.md itself, so that a step which the README
leaves out shows here as a failure. The rows of pairs.jsonl are written by this script; the last step loads
runs/first/model with transformers and PyTorch, which are installed for it. It needs a package index and no accelerator.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("runs/first/model")
tokenizer = AutoTokenizer.from_pretrained("runs/first/model")
chat = [{"role": "user", "content": "Name a fruit."}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=12)[0][inputs["input_ids"].shape[1]:]))
"""


def steps(readme: str, *, fast: bool) -> list[tuple[str, str]]:
    """Name and command line of each step, in the README's order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    setup, first = blocks[0].strip(), next(block for block in blocks if "dpo-jax inspect" in block)
    found = [("set-up", setup.removesuffix("&& dpo-jax demo").strip(" &"))]
    found.append(("demo --fast" if fast else "demo", "dpo-jax demo" + " --fast" * fast))
    for line in first.strip().splitlines():
        found.append((line.split()[1], line))
    return [*found, ("PyTorch", "pip install --quiet torch"), ("load in transformers", f"python -c '{LOAD}'")]


def rows(path: Path, count: int, seed: int) -> None:
    """Preferences of someone's own: short answers over long-winded ones."""
    draw = random.Random(seed)
    things = ("apple", "river", "engine", "poem", "bridge", "cloud", "chess", "violin", "bread", "planet")
    with path.open("w") as file:
        for _ in range(count):
            thing, number = draw.choice(things), draw.randint(2, 99)
            prompt = f"Say something about a {thing} and the number {number}."
            chosen = f"A {thing} and {number}: enough said."
            rejected = f"Well, as for a {thing}, one might say a great many things, and as for {number}, even more."
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="where the clone is made. Not given: a temporary folder")
    parser.add_argument("--fast", action="store_true", help="the smaller demo")
    parser.add_argument("--json", type=Path, help="the seconds as a file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        clone = (options.folder or Path(temporary)) / "dpo_jax"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        rows(clone / "pairs.jsonl", 64, 0)
        rows(clone / "held_out.jsonl", 16, 1)
        took: dict[str, float] = {}
        for name, line in steps((clone / "README.md").read_text(), fast=options.fast):
            entered = line if name == "set-up" else f". .venv/bin/activate && {line}"
            begun = time.perf_counter()
            done = subprocess.run(
                ["bash", "-c", entered], cwd=clone, input="Name a fruit.\n", text=True, capture_output=True, check=False
            )
            took[name] = round(time.perf_counter() - begun, 1)
            print(f"{name:<22} {took[name]:8.1f} s", flush=True)
            if done.returncode:
                print(f"$ {line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}", file=sys.stderr)
                return 1
    print(f"{'all':<22} {sum(took.values()):8.1f} s")
    if options.json:
        options.json.write_text(json.dumps(took, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
