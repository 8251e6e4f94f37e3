"""What AI feedback costs beside its endpoint: `python benchmarks/ai_feedback.py --prompts 500 --in_flight 16`.

`dpo-jax recipe aif` runs in a process of its own against a server on loopback that plays four writers and a judge and
has the faults of real ones: 429 with Retry-After, 500, dropped connections, cut bodies, refusals, replies without a
reading, reasoning before the verdict. Every `--every`-th request fails once. Printed: requests, requests a second, how
many were in flight, how often the most often answered one was answered, and the peak memory of the command.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import chat_server  # noqa: E402 - it lies beside the tests

FAULTS = ("429", "500", "drop", "truncated", "503", "no choices")
WRITERS = ("one", "two", "three", "four")


def answer(body: dict[str, Any]) -> str | dict[str, Any]:
    """Of a writer or the judge; some of each are of no use."""
    lot = int(chat_server.identity(body)[:8], 16) % 50
    if lot == 0:
        return {"content": None, "refusal": "I cannot help with that."}
    text = body["messages"][-1]["content"]
    if body["model"] != "judge":
        return f"<think>hm</think>{body['model']} says what there is to say. " * (3 + lot % 5)
    if lot == 1:
        return "I had rather not choose."
    if "<answer>" in text:
        return f"<think>so</think>Say more.\n\nRating: [[{1 + lot % 10}]]"
    count = text.count("<Text ")
    kinds = "Type: 1\nRationale: it holds\n" if "Kinds of" in text else ""
    return "\n\n".join(f"Text {i}\n{kinds}Rating: {1 + (lot + i) % 5}\nRationale: so" for i in range(1, count + 1))


def main() -> None:
    """Run it and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--in_flight", type=int, default=16)
    parser.add_argument("--every", type=int, default=20, help="every so many requests one fails once")
    parser.add_argument("--pause", type=float, default=0.02, help="seconds that the server takes for an answer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, chat_server.serving(answer) as server:

        def faults(body: dict[str, Any], times: int) -> str | None:
            lot = int(chat_server.identity(body)[8:16], 16)
            return FAULTS[lot % len(FAULTS)] if times == 1 and lot % options.every == 0 else None

        server.faults, server.pause = faults, options.pause
        place = Path(folder)
        prompts = [json.dumps({"prompt": f"What follows from number {i}, and why?"}) for i in range(options.prompts)]
        (place / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
        told = f"url: '{server.url}', concurrency: {options.in_flight}"
        pool = [f"- {{name: {name}, endpoint: {{{told}, model: {name}}}}}" for name in WRITERS]
        (place / "pool.yaml").write_text("\n".join(pool) + "\n")
        (place / "judge.yaml").write_text(f"ask: list\nendpoint: {{{told}, model: judge, stream: true}}\n")
        words = ["--prompts", "prompts.jsonl", "--pool", "pool.yaml", "--judge", "judge:judge.yaml", "--out", "out"]
        command = [sys.executable, "-m", "dpo_jax", "recipe", "aif", *words]
        start = time.monotonic()
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - start
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        report = json.loads((place / "out" / "report.json").read_text())
    requests = sum(server.asked.values())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # of Linux in KiB
    print(f"{options.prompts} prompts: {report['responses']} responses, {report['pairs']} pairs in {seconds:.1f} s")
    print(f"{requests} requests, {requests / seconds:.0f} a second, {server.most_in_flight} in flight at most")
    print(f"answered most often: {max(server.answered.values())} time(s); peak memory {peak:.0f} MiB")
    print(f"unparsed questions: {report['unparsed questions']}")


if __name__ == "__main__":
    main()
