"""Options of judges."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from dpo_jax.config.bases import AsksRewards, WritesTexts
from dpo_jax.config.names import RunOptions
from dpo_jax.config.options import Count, NotNegative, Options, Positive, Within, not_given, part, require, require_day
from dpo_jax.config.sections import FilesConfig, SampleConfig

DECIDE_NO_REPLY = (
    *("key_variable", "concurrency", "per_minute", "timeout", "attempts", "longest_wait"),
    *("price_in", "price_out", "budget"),
)
"""Options of an endpoint that may differ when a run goes on: no reply depends on them."""


@dataclass(frozen=True, kw_only=True)
class EndpointConfig(Options, prefix="endpoint."):
    """An OpenAI-compatible endpoint: POST {url}/chat/completions. The key comes from the environment alone."""

    url: str | None = None
    """Such as https://api.openai.com/v1 or http://127.0.0.1:8000/v1."""
    model: str | None = not_given(needs="url")
    """What the endpoint calls the model."""
    key_variable: str | None = not_given("OPENAI_API_KEY", needs="url")
    """Environment variable that holds the key; without one nothing is sent. The key stands in no file and no log."""
    concurrency: Count | None = not_given(8, needs="url")
    """Requests in flight at once."""
    per_minute: Positive | None = not_given(needs="url")
    """Most requests that are begun in a minute. Not given: no limit but the server's."""
    timeout: Positive | None = not_given(120.0, needs="url")
    """Seconds for one attempt, all of it."""
    attempts: Count | None = not_given(6, needs="url")
    """Of one request, where a fault may pass: no connection, time-out, 429, 5xx, a body that is cut or no JSON."""
    longest_wait: Positive | None = not_given(120.0, needs="url")
    """Seconds: the longest wait between two attempts; a server that asks for more ends the command."""
    temperature: NotNegative | None = not_given(0.0, needs="url")
    """Of the answers."""
    top_p: Positive | None = not_given(1.0, needs="url")
    """Of the answers."""
    max_tokens: Count | None = not_given(1024, needs="url")
    """Longest answer. One that was cut gives no verdict."""
    stream: bool | None = not_given(False, needs="url")
    """Ask for the answer piece by piece."""
    price_in: NotNegative | None = not_given(needs="url")
    """Price of a million tokens of prompts, in the currency of `budget`."""
    price_out: NotNegative | None = not_given(needs="url")
    """Price of a million tokens of answers."""
    budget: Positive | None = not_given(needs="url")
    """Most that all answers may cost, those of runs before included. What would go beyond is not asked: the command
    ends, and goes on with a larger budget."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.url is None or self.model, "endpoint.model is missing: what the endpoint calls the model")
        priced = self.price_in is not None and self.price_out is not None
        require(self.budget is None or priced, "endpoint.budget needs endpoint.price_in and endpoint.price_out")
        name = self.settled.key_variable
        require(
            re.fullmatch(r"[A-Za-z_]\w{0,63}", name, re.ASCII),
            "endpoint.key_variable is the name of an environment variable, and not the key itself",
        )


@dataclass(frozen=True, kw_only=True)
class AsksOne(WritesTexts):
    """A command that asks an endpoint, or a model of this machine."""

    model: str | None = None
    """One of this machine: a Hugging Face folder, a hub id, a .gguf file, a run of ours, or smollm2."""
    template: str | None = not_given(needs="model")
    """Chat template of --model. Not given: its tokenizer's own."""
    date: str | None = not_given(needs="model")
    """Day (YYYY-MM-DD) that the chat template of --model writes where it writes today's."""
    batch_size: Count = 8
    """Questions at once, of a model on this machine."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of a model on this machine."""
    endpoint: EndpointConfig = part(EndpointConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_day(self.date, "--date")


@dataclass(frozen=True, kw_only=True)
class JudgeRun(AsksOne, AsksRewards, metaclass=RunOptions):
    """Judge responses, row by row: `dpo-jax judge`.

    --data holds a prompt and one response or several: pairs, lists, the layouts of docs/data.md. The judge is one of
    --endpoint.url, --model, --function and people: --sheet writes a page for them, and --read what they said.
    """

    data: FilesConfig = part(FilesConfig)
    out: str | None = None
    """JSONL file to write: scores, verdicts and replies of each row, in order; an interrupted one is gone on with."""
    sheet: str | None = None
    """HTML file to write, instead of judging: the two responses of each row side by side, in an order drawn by the
    seed, for people to choose from; it needs no server."""
    read: tuple[str, ...] = ()
    """CSV files of verdicts, from that page or filled in by hand (item,verdict,rater): the judge is what most people
    say."""
    ask: Literal["rating", "expected", "pair", "list", "checklist"] | None = not_given("rating")
    """rating: a score for each response. expected: likewise, from the probabilities of the first token. pair: which of
    two is better, asked in both orders. list: all in one prompt, shuffled. checklist: --criteria, met or not."""
    prompts: str | None = None
    """File of prompts, read as they are: FastChat's judge_prompts.jsonl, UltraFeedback's templates. Not given: ours."""
    prompt_name: str | None = not_given(needs="prompts")
    """Which of them."""
    language: Literal["en", "zh"] | None = not_given("en")
    """Of our prompts."""
    scale: Annotated[int, Within(2, 100, "[]")] | None = None
    """Highest score of our prompts, the lowest being 1. Not given: 10 for rating, 5 for expected and list."""
    criteria: tuple[str, ...] = ()
    """What a checklist asks, a text each."""
    agreement: bool = False
    """Also compare the verdicts with those of the data (choices, ranks, scores, votes): OUT.agreement.json."""
    function: str | None = None
    """A judge without a prompt: whatever --reward of `dpo-jax ppo` takes but judge:FILE.yaml."""
    cache: str | None = None
    """Folder of replies, by a hash of all that decides them. Not given: OUT.replies."""
    seed: int = 0
    """Of the order of lists, and of questions that are asked again."""
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    """refuse: a bad row stops the command. skip: leave them out, counted by reason."""
    sample: SampleConfig = part(SampleConfig, without=("beams", "length_penalty"), max_new_tokens=512, temperature=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        judges = (self.endpoint.url, self.model, self.function, self.read or None)
        given = sum(x is not None for x in judges)
        if self.sheet is not None:
            require(not given, "--sheet is for people: --endpoint.url, --model, --function and --read judge themselves")
            require(self.out is None, "--out has no effect with --sheet, which names the file to write")
            require(not self.agreement, "--agreement has no effect with --sheet; give it with --read")
        else:
            require(
                given == 1,
                "give one judge: --endpoint.url URL, --model MODEL, --function FUNCTION or --read VERDICTS.csv",
            )
            require(self.out is not None, "--out is missing: the JSONL file to write")
        require(self.prompts is None or self.prompt_name, "--prompts needs --prompt_name: which prompt of the file")
        require(self.prompts is None or self.ask is None, "--ask has no effect with --prompts, which say what is asked")
        require(self.prompts is None or self.language is None, "--language has no effect with --prompts")
        require(self.prompts is None or self.scale is None, "--scale has no effect with --prompts")
        ask = self.settled.ask
        silent = "sheet" if self.sheet is not None else "read" if self.read else "function" if self.function else None
        if silent is not None:
            for name in ("ask", "prompts", "language", "scale", "template", "date", "cache"):
                require(getattr(self, name) is None, f"--{name} has no effect with --{silent}, which asks nothing")
        self._refuse_of_models()
        nested = self.function is not None and self.function.startswith("judge:")
        require(not nested, "--function judge:FILE.yaml: give the file's options instead")
        self.check_limits(self.function)
        scaled = ask in ("rating", "expected", "list")
        require(self.scale is None or scaled, f"--scale has no effect with --ask {ask}")
        require(ask != "expected" or (self.scale or 5) <= 9, "--ask expected reads one token: --scale is at most 9")
        require(ask == "checklist" or not self.criteria, f"--criteria has no effect with --ask {ask}")
        require(ask != "checklist" or self.criteria, "--ask checklist needs --criteria: a text for each criterion")

    def _refuse_of_models(self) -> None:
        """What only a model of this machine takes, with another judge."""
        other = next((n for n in ("sheet", "read", "function") if getattr(self, n)), None)
        other = "endpoint.url" if self.endpoint.url is not None else other
        idle = [] if other is None else ["sample"] if other == "function" else ["sample", "batch_size", "dtype", "mesh"]
        for name in idle:
            require(not self.given(name), f"--{name} has no effect with --{other}: it is of a model on this machine")


@dataclass(frozen=True, kw_only=True)
class PairsRun(Options, metaclass=RunOptions):
    """Preference pairs out of scored lists, by a named rule: `dpo-jax pairs`.

    --data holds a prompt and several responses with a score each (or --scores has them), or UltraFeedback's schema, its
    aspects averaged; for --rule corrupt right solutions, as for `dpo-jax sft`.
    """

    data: FilesConfig = part(FilesConfig)
    out: str
    """JSONL file to write: pairs with their scores, as `dpo-jax dpo` and `dpo-jax reward` read them."""
    rule: Literal["zephyr", "ultrafeedback_binarized", "best_worst", "all", "corrupt"] = "zephyr"
    """zephyr: the best against a random one that scores lower. ultrafeedback_binarized: the best by overall_score
    against a random other one. best_worst: best against worst. all: every pair of different scores. corrupt: a right
    solution against itself with one place made wrong (Smaug), its edit distance beside it."""
    corrupt: Literal["number", "step"] | None = not_given("number", rule=("corrupt",))
    """number: one number becomes another of as many digits. step: two neighbouring steps change places."""
    scores: str | None = None
    """What `dpo-jax judge` wrote of --data: its scores, by the number of the row, in place of the rows' own."""
    ties: Literal["draw", "strict"] = "draw"
    """What a shared best score does. draw: the seed chooses one. strict: it drops the row."""
    repair: Literal["ultrafeedback"] | None = None
    """Apply UltraFeedback's published repair to overall scores of 10 that contradict their aspects."""
    seed: int = 0
    """Of the draws; a row's depend on it and on the row's number alone."""
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    """refuse: a bad row stops the command. skip: leave them out, counted by reason."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rule != "corrupt" or self.ties == "draw", "--ties has no effect with --rule corrupt")
        own = self.rule in ("ultrafeedback_binarized", "corrupt")
        require(self.scores is None or not own, f"--scores has no effect with --rule {self.rule}")
        overall = self.rule == "ultrafeedback_binarized"
        require(self.repair is None or overall, f"--repair has no effect with --rule {self.rule}: it reads the aspects")
