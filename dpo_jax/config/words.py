"""The words of the command line: what each takes, and who does its work. `cli.py` reads them.

(One file, though long: it is one table, with a few lines to each word.)
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One word of the command line."""

    options: str
    """Dataclass of `dpo_jax.config` that holds its options, by name."""
    function: str
    """`module:function` that takes an instance of it."""
    help: str
    """One line for `dpo-jax --help`."""
    unused: tuple[str, ...] = ()
    """Options of shared sections that this command has no use for: refused, and left out of its help."""
    lists: tuple[str, ...] = ()
    """Options after which several words may stand; they are joined by commas."""
    repeated: tuple[str, ...] = ()
    """Options of several words that may be given several times; elsewhere the last one counts."""
    positional: tuple[str, ...] = ()
    """Options whose values may stand, without a name, right behind the word."""
    recipe: bool = False
    """Whether a CONFIG.py may stand before the options."""
    silent: bool = False
    """Whether it says nothing but its result, so that --quiet and --json mean nothing."""


PLAN, BENCH = "plan", "bench"
"""Commands that are about another: its CONFIG.py or its word stands first, and its options may follow."""
ONLINE = "--online"
"""The switch that makes `dpo` another command, wherever it stands among its options."""
PLANNED = {
    BENCH: ("sft", "reward", "dpo", "ppo", "grpo"),
    PLAN: ("sft", "reward", "dpo", f"dpo {ONLINE}", "ppo", "grpo", "distill"),
}
"""Commands that these two are about."""
GROUPS = {"recipe": "recipes", "mt-bench": "steps of mt-bench"}
"""The first words of commands of two words, such as `dpo-jax recipe NAME` -> what their second words are called."""

_DISTRIBUTED = ("auto", "coordinator", "processes", "process_id", "start_within", "lost_after", "stuck_after")
_ELSEWHERE = ("log.wandb", "push_to_hub")
_NO_LOADER = ("data.shuffle", "data.workers")
_NO_SAMPLES = ("train.sample_every", "train.sample_prompts", "train.sample_tokens")
"""A reward model writes nothing."""
_NOT_SFT = ("train.layout", "data.max_prompt_length")
_NOT_PPO = (
    "data.buckets",
    "data.workers",
    "sample.stop_strings",
    "sample.beams",
    "sample.length_penalty",
)
_JUDGED = ("reward", "safety_reward", "reward_timeout", "reward_memory", "reward_weights")
"""Who judges a stage of a recipe is said of the recipe."""
_NOT_REJECTION = (
    "train.layout",
    "train.eval_every",
    "train.stop_after",
    "checkpoint.best",
    "data.kind",
    "data.separator",
    "data.documents",
    "data.max_prompt_length",
    "sample.temperature",
    "sample.beams",
    "sample.length_penalty",
    "log.wandb",
)


_NOT_LIVE = tuple(
    f"sample.{name}"
    for name in ("repetition_penalty", "no_repeat_ngram", "logit_bias", "min_new_tokens", "beams", "length_penalty")
)
_NO_BEAMS = ("sample.beams", "sample.length_penalty")
_FIXED_DRAW = tuple(f"sample.{name}" for name in ("temperature", "top_k", "top_p", "min_p", "beams", "length_penalty"))


def _inside(section: str, *names: str) -> tuple[str, ...]:
    """Options of the run of a recipe's stage: those that the recipe sets, and others that mean nothing there."""
    several = ["data.columns", *(f"distributed.{name}" for name in _DISTRIBUTED)]
    every = (
        "model",
        "data.files",
        "out",
        "eval_data",
        "checkpoint.best",
        "train.eval_every",
        "train.stop_after",
        "ignore_config_keys",
        *_ELSEWHERE,
        *several,
        *names,
    )
    return tuple(f"{section}.{name}" for name in dict.fromkeys(every))


COMMANDS = {
    "demo": Command(
        "DemoRun", "dpo_jax.commands.demo:demo", "the whole thing on a real 135M Llama in minutes on a CPU"
    ),
    "dpo": Command(
        "DPORun",
        "dpo_jax.commands.dpo:train",
        "align a model with preference pairs",
        lists=("data", "eval_data"),
        recipe=True,
    ),
    "sft": Command(
        "SFTRun",
        "dpo_jax.commands.sft:train",
        "fine-tune a model on dialogues or instructions",
        unused=_NOT_SFT,
        lists=("data", "eval_data"),
        recipe=True,
    ),
    "reward": Command(
        "RewardRun",
        "dpo_jax.commands.reward:train",
        "train a reward model on comparisons",
        unused=_NO_SAMPLES,
        lists=("data", "eval_data"),
        recipe=True,
    ),
    "ppo": Command(
        "PPORun",
        "dpo_jax.commands.ppo:train",
        "let a model learn from rewards of what it writes: PPO with a value model, and its relatives",
        unused=_NOT_PPO,
        repeated=("reward",),
        recipe=True,
    ),
    "grpo": Command(
        "GRPORun",
        "dpo_jax.commands.ppo:train",
        "the same without a value model: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO, REINFORCE++, ReMax",
        unused=_NOT_PPO,
        repeated=("reward",),
        recipe=True,
    ),
    "rejection": Command(
        "RejectionRun",
        "dpo_jax.commands.rejection:train",
        "let a model learn from the best of K of its own responses",
        unused=_NOT_REJECTION,
        repeated=("reward",),
        recipe=True,
    ),
    f"dpo {ONLINE}": Command(
        "OnlineDPORun",
        "dpo_jax.commands.online_dpo:train",
        "the same with pairs of what the model writes itself, judged as it learns: online DPO, XPO, Nash-MD's sampler",
        unused=(
            "data.buckets",
            "data.workers",
            "sample.stop_strings",
            "sample.beams",
            "sample.length_penalty",
            "dpo.ties",
            "dpo.reference",
            "dpo.mask_format_tokens",
            "dpo.ld_alpha",
            "dpo.reference_sync_steps",
            "dpo.reference_mixup_alpha",
        ),
        repeated=("reward",),
        recipe=True,
    ),
    "distill": Command(
        "DistillRun",
        "dpo_jax.commands.distill:train",
        "let a student learn a teacher's distribution of each next token, on its own responses: GKD",
        unused=(
            "train.layout",
            "train.eval_every",
            "train.stop_after",
            "checkpoint.best",
            "eval_data",
            "data.buckets",
            "data.workers",
            "sample.stop_strings",
            "sample.beams",
            "sample.length_penalty",
        ),
        recipe=True,
    ),
    "recipe frontier": Command(
        "FrontierRun",
        "dpo_jax.commands.recipes.frontier:recipe",
        "reward against KL for DPO, PPO, best-of-n and SFT on chosen: one plot, one table",
    ),
    "gatt": Command(
        "GattRun",
        "dpo_jax.commands.gatt:gatt",
        "make instructions hold for whole dialogues: Ghost Attention",
        unused=(
            "train.eval_every",
            "train.stop_after",
            "train.layout",
            "checkpoint.best",
            "data.kind",
            "data.train_on",
            "data.separator",
            "data.documents",
            "data.max_prompt_length",
            "sample.beams",
            "sample.length_penalty",
            *_ELSEWHERE,
            *(f"distributed.{name}" for name in _DISTRIBUTED),
        ),
        recipe=True,
    ),
    "recipe llama2_chat": Command(
        "Llama2ChatRun",
        "dpo_jax.commands.recipes.llama2_chat:recipe",
        "Llama 2-Chat: SFT, reward models, rounds of rejection sampling, PPO",
        unused=(
            *_inside("sft", *_NOT_SFT, "holdout"),
            *_inside("helpful", *_NO_SAMPLES, "mix_data", "mix", "holdout"),
            *_inside("safety", *_NO_SAMPLES, "mix_data", "holdout"),
            *_inside(
                "rejection",
                *_JUDGED,
                "rejection.pool_from",
                *_NOT_REJECTION,
            ),
            *_inside(
                "ppo",
                *_JUDGED,
                "reward_aggregation",
                "environment",
                "environment_turns",
                "environment_tokens",
                "environment_errors",
                "eval_samples",
                "eval_pass",
                *_NOT_PPO,
            ),
        ),
        recipe=True,
    ),
    "recipe llama3": Command(
        "Llama3Run",
        "dpo_jax.commands.recipes.llama3:recipe",
        "Llama 3's rounds: reward model, best of K, SFT on them, DPO on the newest pairs, averaging",
        unused=(
            *_inside("sft", *_NOT_SFT, "holdout"),
            *_inside("reward", *_NO_SAMPLES, "mix_data", "mix", "holdout", "reward.margin", "reward.margin_scale"),
            *_inside(
                "rejection",
                *_JUDGED,
                *(f"rejection.{name}" for name in ("pool", "pool_from", "student", "iterations")),
                *_NOT_REJECTION,
            ),
            *_inside("dpo", "reference", "holdout"),
        ),
        recipe=True,
    ),
    "recipe iterative_rpo": Command(
        "IterativeRPORun",
        "dpo_jax.commands.recipes.iterative_rpo:recipe",
        "rounds of DPO + NLL on a model's own right answers against its wrong ones",
        unused=(
            *_inside("dpo", "reference", "holdout"),
            *(f"sample.{name}" for name in ("temperature", "beams", "length_penalty")),
        ),
        recipe=True,
    ),
    "recipe dsft": Command(
        "DSFTRun",
        "dpo_jax.commands.recipes.dsft:recipe",
        "dialogues for distilled SFT: a teacher answers, refines instructions, plays both sides; filters",
        unused=_NO_BEAMS,
        recipe=True,
    ),
    "recipe zephyr": Command(
        "ZephyrRun",
        "dpo_jax.commands.recipes.zephyr:recipe",
        "Zephyr: a teacher's dialogues, distilled SFT, AI feedback, distilled DPO, one report",
        unused=(
            *(f"dsft.{name}" for name in ("prompts", "out", "ignore_config_keys", *_NO_BEAMS)),
            *_inside("sft", *_NOT_SFT, "holdout"),
            *(f"aif.{name}" for name in ("prompts", "pool", "judge", "out", "ignore_config_keys")),
            *_inside("dpo", "reference", "holdout"),
            *_NO_BEAMS,
        ),
        recipe=True,
    ),
    "recipe aif": Command(
        "AIFRun",
        "dpo_jax.commands.recipes.aif:recipe",
        "AI feedback: a pool of writers answers, a judge rates, UltraFeedback's schema and pairs come out",
        recipe=True,
    ),
    "generate": Command("GenerateRun", "dpo_jax.commands.generate:generate", "answer prompts"),
    "chat": Command("ChatRun", "dpo_jax.commands.chat:chat", "talk to a model in the terminal", unused=_NOT_LIVE),
    "serve": Command(
        "ServeRun",
        "dpo_jax.commands.serve:serve",
        "an OpenAI-compatible endpoint: /v1/chat/completions, /v1/completions, /v1/models",
        unused=(
            *_NOT_LIVE,
            *(f"sample.{name}" for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")),
            "sample.stop_tokens",
            "sample.stop_strings",
        ),
        repeated=("model",),
    ),
    "eval": Command(
        "EvalRun",
        "dpo_jax.commands.eval:evaluate",
        "reward accuracy, margins, perplexity, KL, repetition, tables per rating and source",
        unused=_NO_LOADER,
    ),
    "logps": Command(
        "LogpsRun",
        "dpo_jax.commands.logps:logps",
        "log-probabilities of chosen and rejected, one JSON object a row",
        unused=_NO_LOADER,
    ),
    "score": Command(
        "ScoreRun",
        "dpo_jax.commands.score:score",
        "the reward of every response, one JSON object a row",
        unused=_NO_LOADER,
    ),
    "mt-bench answer": Command(
        "MTBenchAnswerRun",
        "dpo_jax.commands.mt_bench_answer:answer",
        "a model's answers to MT-Bench's questions, as FastChat writes them",
        unused=_FIXED_DRAW,
    ),
    "mt-bench judge": Command(
        "MTBenchJudgeRun",
        "dpo_jax.commands.mt_bench_judge:judge",
        "judge such answers one by one or in pairs, as FastChat does",
        unused=(*_FIXED_DRAW, "endpoint.temperature", "endpoint.top_p"),
    ),
    "mt-bench show": Command(
        "MTBenchShowRun",
        "dpo_jax.commands.mt_bench:show",
        "means and win rates by model, turn and category, from FastChat's judgement files",
    ),
    "lm-eval": Command(
        "LmEvalRun",
        "dpo_jax.commands.lm_eval:lm_eval",
        "tasks of lm-evaluation-harness: TruthfulQA, GSM8K and the like, or your own",
    ),
    "safety": Command(
        "SafetyRun",
        "dpo_jax.commands.safety:safety",
        "what a model refuses, and whether it should; violations and helpfulness by category",
    ),
    "win-rate": Command(
        "WinRateRun",
        "dpo_jax.commands.win_rate:win_rate",
        "how often one model's answers beat another's: intervals, length-controlled",
    ),
    "judge": Command(
        "JudgeRun",
        "dpo_jax.commands.judge:judge",
        "judge responses by an endpoint, a model of this machine or a function: rating, pair, list, checklist",
        unused=_NO_BEAMS,
    ),
    "average": Command(
        "AverageRun",
        "dpo_jax.commands.average:average",
        "several models of one shape into one: uniform, weighted, exponential moving average",
    ),
    "pairs": Command(
        "PairsRun",
        "dpo_jax.commands.pairs:pairs",
        "preference pairs by a named rule: zephyr, ultrafeedback_binarized, best_worst, all, corrupt",
    ),
    "convert": Command(
        "ConvertRun",
        "dpo_jax.commands.convert:convert",
        "Hugging Face safetensors <-> orbax, GGUF -> either",
    ),
    "extend-vocab": Command(
        "ExtendVocabRun",
        "dpo_jax.commands.extend_vocab:extend_vocab",
        "Chinese pieces for a Llama 2 tokenizer, and rows for them in the model",
        recipe=True,
    ),
    "prepare": Command(
        "PrepareRun",
        "dpo_jax.commands.prepare:prepare",
        "any preference, dialogue or text file -> a TFDS dataset, split, validated, counted",
    ),
    PLAN: Command(
        "PlanRun",
        "dpo_jax.commands.plan:plan",
        "does it fit, what does it move, how long does it take: a training step on devices that are not here",
        unused=("training",),
    ),
    BENCH: Command(
        "BenchRun",
        "dpo_jax.commands.bench:bench",
        "step time, tokens/s, MFU, memory, loader, sampler and checkpoints on what is here, beside the plan's",
        unused=("training",),
    ),
    "inspect": Command(
        "InspectRun",
        "dpo_jax.commands.inspect:inspect",
        "tokens of some rows with the loss mask coloured",
        lists=("data",),
        unused=(*_NO_LOADER, "data.buckets"),
    ),
    "report": Command(
        "ReportRun",
        "dpo_jax.commands.report:report",
        "several runs on one page: curves over each other, options that differ",
        positional=("runs",),
        silent=True,
    ),
    "configs": Command(
        "ConfigsRun",
        "dpo_jax.commands.configs:configs",
        "the recipes that come with the package: `configs show NAME`, `configs copy NAME`",
        positional=("action", "name"),
        silent=True,
    ),
    "completion": Command(
        "CompletionRun",
        "dpo_jax.commands.completion:completion",
        "what lets a shell complete commands, options and values: `completion bash`, `completion zsh`",
        positional=("shell",),
        silent=True,
    ),
}
