"""Vicuna's 80 questions, answered by SmolLM2-135M before and after DPO, and judged on this machine.

    python benchmarks/vicuna_questions.py --data ../shared/data --out OUT                  trains judge and DPO, too
    python benchmarks/vicuna_questions.py --data ../shared/data --out OUT --after RUN      answers of a finished run

Questions, judge prompts: FastChat's files, as they are. References of coding and math: those of `scored4_en`. Each
model answers at FastChat's temperatures, up to --tokens new tokens; the judge scores each answer (single-v1,
single-math-v1) and compares the two in both orders (pair-v2, pair-math-v1).

Judge: no reply of SmolLM2-135M as it comes has a reading, so it is taught by SFT on FastChat's own prompts: PandaLM's
responses, scored from 1 to 10 by how many of their comparisons people let them win, and its pairs in both orders. A
tenth of PandaLM's instructions is kept from it: how often it says there what people say, in both orders, stands under
the table. It is a small model that knows short answers; its figures compare with no published ones.

After: --after, or a DPO run on `dpo_en` (LoRA, --dpo_steps steps of 8 pairs). What is finished is not made again. OUT
gets table.md, results.json with the seconds of each command, and the plots of `mt-bench show` in single/.
"""

import argparse
import contextlib
import json
import random
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import arithmetic
import reward_models as sources
import zephyr_small

Row = dict[str, Any]
KEPT = 10
"""One of so many of PandaLM's instructions is kept from the judge."""
SIDES = ("before", "after")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with vicuna_questions, judge_prompts, ...")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--after", help="a finished run, or any model, in place of a DPO run of this command")
    parser.add_argument("--dpo_steps", type=int, default=40, help="of 8 pairs each")
    parser.add_argument("--judge_steps", type=int, default=40, help="of 8 judgements each")
    parser.add_argument("--tokens", type=int, default=1024, help="longest answer")
    parser.add_argument("--agreement", type=int, default=60, help="pairs of PandaLM that the judge is tried on")
    return parser.parse_args()


class Commands:
    """Runs commands once, and knows how long each took."""

    def __init__(self, out: Path):
        self._out, self._file = out, out / "seconds.json"
        self.seconds: dict[str, float] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def once(self, name: str, words: str) -> None:
        """What the command prints stands in NAME.txt. Ends the program where it fails."""
        from dpo_jax import cli

        if name not in self.seconds:
            start = time.monotonic()
            with (self._out / f"{name}.txt").open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
                code = cli.main(shlex.split(words))
            if code:
                sys.exit(code)
            self.seconds[name] = round(time.monotonic() - start, 1)
            self._file.write_text(json.dumps(self.seconds, indent=1) + "\n")


def kept(data: Path) -> set[str]:
    """PandaLM's instructions that are kept from the judge."""
    return set(sorted(zephyr_small.rated_by_people(data))[::KEPT])


def lessons(data: Path, prompts: Path) -> list[Row]:
    """Dialogues of a judge that says what people say, in FastChat's words: as many scores as comparisons."""
    from dpo_jax.data.sources.questions import Answers, Question
    from dpo_jax.judge.asked.mt_bench import Match, Prompts, requests

    single, paired = (Prompts(str(prompts), "en", pairs=pairs) for pairs in (False, True))
    kinds: tuple[list[Row], list[Row]] = ([], [])

    def told(question: Any, reply: str) -> Row:
        return {"messages": [*map(dict, question.messages), {"role": "assistant", "content": reply}]}

    others = kept(data)
    for n, (asked, found) in enumerate(zephyr_small.rated_by_people(data).items()):
        if asked in others:
            continue
        question = Question(n, "generic", (asked,))
        answers: Answers = {name: {n: (text,)} for name, (text, _) in found.items()}
        for name, (_, share) in found.items():
            [one] = requests(Match(question, 1, (name,)), single, answers, {})
            kinds[0].append(told(one, f"Rating: [[{1 + round(9 * share)}]]"))
        names = random.Random(asked).sample(list(found), 2)
        if found[names[0]][1] != found[names[1]][1]:
            better = names[0] if found[names[0]][1] > found[names[1]][1] else names[1]
            match = Match(question, 1, tuple(names))
            for order, one in zip(match.orders(), requests(match, paired, answers, {}), strict=True):
                kinds[1].append(told(one, f"[[{'AB'[order.index(better)]}]]"))
    for some in kinds:
        random.Random(0).shuffle(some)
    return [row for both in zip(*kinds, strict=False) for row in both]


def write_files(options: argparse.Namespace, out: Path) -> None:
    """The judge's lessons, what it is tried on, and the references."""
    data = options.data
    questions = {row["turns"][0].strip(): row for row in sources.lines(data / "vicuna_questions" / "question.jsonl")}
    references = []
    for row in sources.lines(data / "scored4_en" / "vicuna_eval.jsonl"):
        if (asked := questions.get(row["prompt"].strip())) and row.get("reference"):
            choice = {"index": 0, "turns": [row["reference"]]}
            references.append({"question_id": asked["question_id"], "model_id": "reference", "choices": [choice]})
    sources.write(out / "references.jsonl", references)
    sources.write(out / "lessons.jsonl", lessons(data, data / "judge_prompts" / "fastchat_judge_prompts.jsonl"))
    others = kept(data)
    tried = [row for row in sources.pandalm(data) if row["prompt"] in others]
    random.Random(0).shuffle(tried)
    sources.write(out / "tried.jsonl", tried[: options.agreement])


def main() -> None:
    """Train, answer, judge and show."""
    options = arguments()
    out, data = options.out.resolve(), options.data.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tried.jsonl").exists():
        write_files(options, out)
    commands, model = Commands(out), options.model
    questions = data / "vicuna_questions" / "question.jsonl"
    prompts = data / "judge_prompts" / "fastchat_judge_prompts.jsonl"
    lora = "--lora.rank 16 --optimizer.warmup_ratio 0.1 --train.batch_size 8 --checkpoint.every 10 --checkpoint.keep 1"
    sft = f"--optimizer.learning_rate 5e-4 --optimizer.schedule cosine --train.steps {options.judge_steps}"
    commands.once(
        "judge", f"sft --model {model} --data {out}/lessons.jsonl --out {out}/judge {lora} {sft} --data.max_length 768"
    )
    if options.after is None:
        dpo = f"--optimizer.learning_rate 1e-4 --optimizer.schedule linear --train.steps {options.dpo_steps}"
        pairs = data / "dpo_en" / "pairs.jsonl"
        commands.once("dpo", f"dpo --model {model} --data {pairs} --out {out}/dpo {lora} {dpo} --data.max_length 256")
    tried = f"judge --data {out}/tried.jsonl --out {out}/tried.verdicts.jsonl --model {out}/judge --agreement"
    commands.once("tried", f"{tried} --prompts {prompts} --prompt_name pair-v2 --sample.max_new_tokens 16")
    for side, folder in zip(SIDES, (model, options.after or out / "dpo"), strict=True):
        words = f"mt-bench answer --model {folder} --questions {questions} --out {out}/model_answer/{side}.jsonl"
        commands.once(f"answer_{side}", f"{words} --batch_size 16 --sample.max_new_tokens {options.tokens}")
    answers = " ".join(f"{out}/model_answer/{side}.jsonl" for side in SIDES)
    asked = f"--questions {questions} --answers {answers} --references {out}/references.jsonl --prompts {prompts}"
    read: dict[str, int] = {}
    for name, mode in (("single", "single"), ("pair", "pairwise-baseline --baseline before")):
        words = f"mt-bench judge --model {out}/judge {asked} --mode {mode} --out {out}/{name}.jsonl"
        commands.once(f"judged_{name}", f"{words} --sample.max_new_tokens 16")
        rows = list(sources.lines(out / f"{name}.jsonl"))
        read[name] = sum(
            row.get("score") != -1 and "error" not in (row.get("g1_winner"), row.get("g2_winner")) for row in rows
        )
        if not read[name]:
            continue
        show = f"mt-bench show --judgments {out}/{name}.jsonl --questions {questions} --out {out}/{name}"
        commands.once(f"shown_{name}", show + (" --models before after" if name == "single" else " --baseline before"))
    told: Row = {name: json.loads((out / name / "summary.json").read_text()) for name, count in read.items() if count}
    told["judge"] = json.loads((out / "tried.verdicts.jsonl.agreement.json").read_text())
    told |= {"read": read, "seconds": commands.seconds, "device": arithmetic.device()}
    sources.write(out / "results.json", [told])
    text = table(out, told)
    (out / "table.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def table(out: Path, told: Row) -> str:
    """What `mt-bench show` printed, what the judge is worth, and how long it took."""
    lines = [(out / f"shown_{name}.txt").read_text().strip() for name, count in told["read"].items() if count]
    lines += [f"{name}: no reply has a reading" for name, count in told["read"].items() if not count]
    judge, said = told["judge"], "no verdict has a reading"
    if "accuracy" in judge:
        said = "it says what people say in {:.3f} ({:.3f} to {:.3f}), a tie counted as wrong".format(*judge["accuracy"])
    if "flip_share" in judge:
        said += "; {:.3f} ({:.3f} to {:.3f}) of its verdicts flip with the order".format(*judge["flip_share"])
    lines.append(f"Judge, on {judge['pairs']} pairs of PandaLM that it has not seen: {said}.")
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in told["seconds"].items())
    return "\n\n".join([*lines, f"{spent} on {told['device']}."]) + "\n"


if __name__ == "__main__":
    main()
