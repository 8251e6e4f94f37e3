"""`dpo-jax recipe aif`: AI feedback, the second step of Zephyr (Tunstall et al. 2023, section 3), in stages.

draws.jsonl          for each prompt who answers it, and under which principle
answers/{n}.jsonl    what writer n of the pool writes
responses.jsonl      the prompts with their responses; dropped.jsonl: those with too few
judged/{what}.jsonl  what the judge says, by aspect
data.jsonl           UltraFeedback's schema
pairs.jsonl          by the rule, for `dpo-jax dpo`
beside.jsonl         what a second judge says of the same responses (--beside); .agreement.json: how far the two agree
report.json          which model wins how often; report.md
replies/             of writers and judge, by a hash of all that decides them
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dpo_jax.commands.pairs import pairs
from dpo_jax.commands.recipes.chain import perform
from dpo_jax.commands.recipes.second_judge import SecondJudge
from dpo_jax.complete.asking import writer_pool as pool
from dpo_jax.complete.asking.answers import Answerer, answers
from dpo_jax.config import AIFRun, JudgeRun, PairsRun, WriterConfig
from dpo_jax.config.bases import takes_timeout
from dpo_jax.data.rows.dialogues import CUT
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.rows.preferences import parse_prompt
from dpo_jax.data.sources.files import read_rows
from dpo_jax.errors import InputError, naming
from dpo_jax.files.folder import write_atomically, write_json
from dpo_jax.files.jsonl import read_lines, write_lines, write_once
from dpo_jax.files.log import ProgressBar, say
from dpo_jax.files.stages import Figures, Stage
from dpo_jax.judge.asked import feedback
from dpo_jax.judge.asked.judge_prompts import JudgePrompt, our_prompt
from dpo_jax.judge.asked.judge_reward import PREFIX, prompt_of, read_judge, without_dashes
from dpo_jax.judge.asked.judging import Item, Judgement, judge as put, one_score, warn_of_family
from dpo_jax.judge.rewards.file_of_judgements import by_function, deciding, write_judgements
from dpo_jax.judge.rewards.functions import ModelReward, RewardFunction, check_reward
from dpo_jax.mesh import make_mesh
from dpo_jax.report import feedback as feedback_report
from dpo_jax.weights.opened import open_checkpoint


def recipe(run: AIFRun) -> Path:
    """The `recipe aif` command; returns its folder. See the module for the stages. Raises `InputError`."""
    return perform("aif", run, lambda run, out: AIF(run, out).stages(), feedback_report.show, found="report.json")


class AIF:
    """The stages."""

    def __init__(self, run: AIFRun, out: Path, *, later: Path | None = None):
        """`later`: a model that is made before the recipe begins, and need not be there yet.

        Raises `InputError` for a pool or judge that is none, and options that cannot be kept to; nothing is asked yet.
        """
        self._run, self._out = run, out
        self._pool = pool.read_pool(run.pool)
        if len(self._pool) < run.samples:
            raise InputError(
                f"--pool {run.pool}: {len(self._pool)} writers, and each prompt is answered by --samples {run.samples}"
                " different ones; name more, or ask for fewer"
            )
        self._principles = pool.read_principles(run.principles, run.settled.language)
        self._function: RewardFunction | None = None
        self._judge = self._judge_run()
        self._asker: Answerer | None = None
        if self._judge.function is not None:
            with self._named_judge():
                self._function = check_reward(self._judge.function, self._judge)
            if self._function is not None:
                self._refuse("scores as a function", "judge_batch_size", "judge_dtype")
            self._prompts: dict[str, JudgePrompt | None] = {"score": None}
        elif self._judge.settled.ask == "list":
            asked = {"language": run.settled.language, "templates": run.templates}
            self._prompts = dict(feedback.feedback_prompts(run.settled.aspects, critique=run.critique, **asked))
        else:
            self._prompts = {self._judge.settled.ask: prompt_of(self._judge)}
        self._beside = None
        if run.beside is not None:
            timeout = run.reward_timeout if takes_timeout(run.beside) else None
            self._beside = SecondJudge(run.beside, out, run.mesh, partial(check_model, later=later), timeout)
        self._warned = False
        if self._judge.function is None:
            with self._named_judge():
                self._asker = self._answerer(self._judge, later)
        self._writers: dict[str, Answerer] = {}
        for writer in self._pool:
            if writer.responses is None:
                with self._named_writer(writer):
                    self._writers[writer.name] = self._answerer(writer, later)

    def _refuse(self, judges: str, *names: str) -> None:
        """Refuse options that were given and have no effect beside a judge that does what `judges` says."""
        for name in names:
            given = getattr(self._run, name)
            if given is not None and given is not True:  # the critique is asked for where nothing is given
                raise InputError(f"--{name} has no effect with --judge {self._run.judge}, which {judges}")

    @contextmanager
    def _named_judge(self) -> Iterator[None]:
        """Errors by the names that options have here: a function calls itself --reward, a file's have no dashes."""
        judge = self._run.judge
        try:
            yield
        except InputError as error:
            told = str(error).removeprefix(f"--reward {judge}: ") if self._judge.function else without_dashes(error)
            raise InputError(f"--judge {judge}: {told}") from error

    @contextmanager
    def _named_writer(self, writer: WriterConfig) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            raise InputError(f"--pool {self._run.pool}: writer {writer.name}: {without_dashes(error)}") from error

    def _judge_run(self) -> JudgeRun:
        run, of_lists = self._run, ["aspects", "critique", "templates", "repair"]
        # --reward_timeout may be of --beside alone.
        elsewhere = takes_timeout(run.beside) and not takes_timeout(run.judge)
        if run.principles != "ours":
            of_lists.append("language")
        if not run.judge.startswith(PREFIX):
            self._refuse("gives one score and is asked nothing", *of_lists)
            told: dict[str, Any] = {
                "reward_timeout": None if elsewhere else run.reward_timeout,
                "batch_size": run.settled.judge_batch_size,
            }
            dtype = run.settled.judge_dtype
            return JudgeRun(data=run.prompts, out=run.out, function=run.judge, dtype=dtype, **told)  # pyright: ignore
        waits = () if elsewhere else ("reward_timeout",)
        self._refuse("has options of its own", *waits, "judge_batch_size", "judge_dtype")
        found = read_judge(run.judge, "--judge")
        asked = found.settled.ask
        if found.prompts is None and asked == "list":
            if run.rule == "ultrafeedback_binarized" and not run.critique:
                raise InputError(f"--rule {run.rule} takes the overall score of the critique: leave --critique on")
            for name, instead in (("language", "--language"), ("scale", "five grades")):
                if getattr(found, name) is not None:
                    raise InputError(f"--judge {run.judge}: {name} has no effect with ask: list ({instead})")
        elif found.prompts is not None or asked == "pair":
            raise InputError(
                f"--judge {run.judge}: asks for list, rating, expected or checklist here, and without prompts"
                " (--templates FILE)"
            )
        else:
            self._refuse(f"asks {asked} and gives one score: they take ask: list", *of_lists)
        return found

    def _mesh(self) -> Mesh:
        return make_mesh(self._run.mesh.data, self._run.mesh.fsdp, self._run.mesh.tensor)

    def _answerer(self, options: WriterConfig | JudgeRun, later: Path | None) -> Answerer:
        """Raises `InputError` for a URL or a model that is none."""
        check_model(options.model, later)
        return Answerer(options, self._out / "replies", self._mesh)

    def stages(self) -> list[Stage]:
        """All of them, in order."""
        out, run = self._out, self._run
        draws, responses, data = out / "draws.jsonl", out / "responses.jsonl", out / "data.jsonl"
        files = [writer.responses for writer in self._pool if writer.responses is not None]
        told = [run.principles] if run.principles not in ("ours", "none") else []
        stages = [Stage("draws", (run.prompts, run.pool, *files, *told), draws, self._draw)]
        written = []
        for number, writer in enumerate(self._pool, 1):
            path = out / "answers" / f"{number}.jsonl"
            source = str(writer.model or writer.responses or writer.endpoint.url)
            work = partial(self._write, writer, path)
            stages.append(Stage(f"{writer.name} writes", (draws, source), path, work))
            written.append(path)
        stages.append(Stage("responses", (draws, *written), responses, partial(self._gather, written)))
        judge = self._judge
        who = str(judge.function or judge.model or judge.endpoint.url)
        asked = [run.judge.removeprefix(PREFIX)] if judge.function is None else []
        judged = []
        for name in self._prompts:
            path = out / "judged" / f"{name}.jsonl"
            inputs = (responses, who, *asked, *([run.templates] if run.templates else []))
            stages.append(Stage(f"judged: {name}", inputs, path, partial(self._rate, name, path)))
            judged.append(path)
        stages.append(Stage("UltraFeedback's schema", (responses, *judged), data, self._assemble))
        stages.append(Stage("pairs", (data,), out / "pairs.jsonl", self._pair))
        made = [data, out / "pairs.jsonl"]
        if self._beside is not None:
            stages.append(self._beside.stage(data))
            made.append(self._beside.agreement)
        stages.append(Stage("report", tuple(made), out / "report.json", self._report))
        return stages

    # ---------------------------------------------------------------- what the pool writes

    def _draw(self) -> Figures:
        run, rows, lacking = self._run, [], 0
        files = {w.name: pool.read_responses(w.responses) for w in self._pool if w.responses is not None}
        for number, row in read_rows(run.prompts):
            with naming(f"{run.prompts}: row {number}"):
                found, _ = parse_prompt(row)
            messages = [message.as_dict() for message in found]
            able = [bool(files[w.name].get(pool.as_key(messages))) if w.name in files else True for w in self._pool]
            who = pool.drawn(self._pool, able, run.samples, self._principles, f"{run.seed} {number}")
            if who is None:
                lacking += 1
                continue
            source = row.get("source")
            told = {"source": source} if isinstance(source, str) else {}
            rows.append({"row": number, **told, "messages": messages, "completions": who})
        if not rows:
            raise InputError(
                f"{run.prompts}: no prompt has {run.samples} writers with a response; look at the files of {run.pool}"
            )
        write_lines(self._out / "draws.jsonl", rows)
        return {"prompts": len(rows), "fewer writers than --samples": lacking}

    def _write(self, writer: WriterConfig, path: Path) -> Figures:
        draws = [
            (row, one)
            for row in read_lines(self._out / "draws.jsonl")
            for one in row["completions"]
            if one["model"] == writer.name
        ]
        told = ""
        if writer.responses is not None:
            file = pool.read_responses(writer.responses)
            key = f"{self._run.seed} {writer.name}"
            found = [pool.from_file(file, row["messages"], f"{key} {row['row']}") for row, _ in draws]
        else:
            # One model under two names draws twice; with one seed both would write the same.
            same = [one.name for one in self._pool if replace(one, name=writer.name, weight=writer.weight) == writer]
            seed = self._run.seed + same.index(writer.name)
            questions = [pool.question(row["messages"], one["custom_system_prompt"], seed) for row, one in draws]
            asker = self._writers[writer.name]
            with self._named_writer(writer), ProgressBar(writer.name, len(questions)) as bar:
                # A model that runs into its limit has written, up to there: it is rated, and stands in no pair.
                found = answers(asker, questions, bar.update, cut_allowed=writer.model is not None)
            told = asker.told
            asker.close()
        rows = []
        for (row, _), answer in zip(draws, found, strict=True):
            beside = {"fault": answer.fault, "finish_reason": answer.finish_reason}
            beside = {name: value for name, value in beside.items() if value is not None}
            rows.append({"row": row["row"], "response": answer.text, **beside})
        write_lines(path, rows)
        faults = Counter(row["fault"] for row in rows if "fault" in row)
        if cut := sum(row.get("finish_reason") == CUT for row in rows):
            faults["of them cut at their limit"] = cut
        whole = sum("fault" not in row for row in rows)
        return {"responses": whole, **faults} | ({"cost": told} if told else {})

    def _gather(self, written: Sequence[Path]) -> Figures:
        """A response that is missing leaves its row with fewer; UltraFeedback's templates take four, and others two."""
        found = {
            (writer.name, row["row"]): row
            for writer, path in zip(self._pool, written, strict=True)
            for row in read_lines(path)
        }
        least = 4 if self._run.templates is not None else 2
        kept, dropped = [], []
        for row in read_lines(self._out / "draws.jsonl"):
            made = [one | found[one["model"], row["row"]] for one in row["completions"]]
            whole = [{k: v for k, v in one.items() if k != "row"} for one in made if "fault" not in one]
            if len(whole) < least:
                dropped.append(row | {"dropped": [f"{one['model']}: {one.get('fault', 'whole')}" for one in made]})
            else:
                kept.append(row | {"completions": whole})
        write_lines(self._out / "dropped.jsonl", dropped)
        if not kept:
            raise InputError(f"{self._out}: no prompt has {least} whole responses; dropped.jsonl says why")
        write_lines(self._out / "responses.jsonl", kept)
        return {"prompts": len(kept), "dropped": len(dropped)}

    # ---------------------------------------------------------------- what the judge says

    def _rate(self, name: str, path: Path) -> Figures:
        judge, prompt = self._judge, self._prompts[name]
        items = [
            Item(
                row["row"],
                tuple(Message(m["role"], m["content"]) for m in row["messages"]),
                tuple(one["response"] for one in row["completions"]),
            )
            for row in read_lines(self._out / "responses.jsonl")
        ]
        if judge.function is None and not self._warned:
            self._warned = True
            models = {writer.endpoint.model or writer.model or writer.name for writer in self._pool}
            warn_of_family(str(judge.model or judge.endpoint.model), models)

        def settings() -> dict[str, Any]:
            function = self._opened_function() if prompt is None else None
            weights = None if self._asker is None else self._asker.weights
            return deciding(judge, prompt, items, function=function, weights=weights)

        with self._named_judge():
            judged = partial(self._judgements, prompt=prompt)
            rows = write_once(path, settings, lambda file: write_judgements(file, items, judged, name))
        told = "" if self._asker is None else self._asker.told
        return {"unparsed": sum(row["unparsed"] for row in rows)} | ({"judge": told} if told else {})

    def _judgements(self, items: Sequence[Item], prompt: JudgePrompt | None) -> list[Judgement]:
        """`prompt`: None of a function."""
        judge = self._judge
        if prompt is None:
            return by_function(items, self._opened_function(), self._run.judge)
        assert self._asker is not None, "whoever is asked by a prompt"
        return put(items, prompt, self._asker, seed=judge.seed, criteria=judge.criteria)

    def _opened_function(self) -> RewardFunction:
        if self._function is None:
            setting: dict[str, Any] = {"batch_size": self._judge.batch_size, "dtype": self._judge.dtype}
            self._function = ModelReward(str(self._judge.function), raw=False, mesh=self._mesh(), **setting)
        return self._function

    @property
    def prompt_to_compare(self) -> JudgePrompt | None:
        """What `compared` asks: this project's prompt for pairs of a judge that asks `list`, under --templates too."""
        prompt = next(iter(self._prompts.values()))
        if prompt is not None and prompt.ask == "list":
            return our_prompt("pair", self._run.settled.language)
        return prompt

    def compared(self, items: Sequence[Item]) -> list[Judgement]:
        """Of two responses each: a verdict by the judge's scores; one that asks `list` is asked for pairs."""
        with self._named_judge():
            return self._judgements(items, self.prompt_to_compare)

    def _assemble(self) -> Figures:
        if self._asker is not None:
            self._asker.close()
        judged = {name: read_lines(self._out / "judged" / f"{name}.jsonl") for name in self._prompts}
        rows = [
            feedback.completed(row, {name: found[i] for name, found in judged.items()}, self._prompts)
            for i, row in enumerate(read_lines(self._out / "responses.jsonl"))
        ]
        write_lines(self._out / "data.jsonl", rows)
        without = sum(one["fine-grained_score"] is None for row in rows for one in row["completions"])
        return {"rows": len(rows), "responses without a score": without}

    def _pair(self) -> Figures:
        run, path = self._run, self._out / "pairs.jsonl"
        told = {"rule": run.rule, "ties": run.ties, "repair": run.repair, "seed": run.seed}
        pairs(PairsRun(data=str(self._out / "data.jsonl"), out=str(path), **told))  # pyright: ignore
        return {"pairs": len(read_lines(path))}

    def _report(self) -> Figures:
        data, made = (read_lines(self._out / f"{name}.jsonl") for name in ("data", "pairs"))
        figures = feedback_report.figures(data, made)
        figures["judge"] = self._run.judge
        figures["prompts"] = [prompt.name for prompt in self._prompts.values() if prompt is not None]
        cut = sum(one.get("finish_reason") == CUT for row in data for one in row["completions"])
        figures["responses cut at their limit, in no pair"] = cut
        figures["dropped prompts"] = len(read_lines(self._out / "dropped.jsonl"))
        figures["unparsed questions"] = {
            name: sum(row["unparsed"] for row in read_lines(self._out / "judged" / f"{name}.jsonl"))
            for name in self._prompts
        }
        scores = [one["fine-grained_score"] for row in data for one in row["completions"]]
        if same := one_score(scores):
            figures["one score"] = (
                f"{same[1]:.0%} of the scores are {same[0]:g}: this judge tells responses hardly apart"
            )
            say(figures["one score"])
        if self._beside is not None:
            figures["agreement"] = self._beside.told()
        write_atomically(self._out / "report.md", feedback_report.markdown(figures))
        write_json(self._out / "report.json", figures, ensure_ascii=False)
        return {"pairs": len(made)}


def check_model(model: str | None, later: Path | None) -> None:
    """Raises `InputError` for what is no model; one in `later` need not be there yet."""
    if model is not None:
        place = Path(model).expanduser().absolute()
        if later is None or not place.is_relative_to(later):
            open_checkpoint(model)
