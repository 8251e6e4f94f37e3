"""The words of the command line: what each takes, and who does its work. `cli.py` reads them.

(One file, though long: it is one table, with a few lines to each word.)
"""

from dataclasses import dataclass

from dpo_jax import config as c


@dataclass(frozen=True)
class Command:
    """One word of the command line."""

    options: type
    """Dataclass that holds its options."""
    function: str
    """`module:function` of `dpo_jax.commands` that takes an instance of it."""
    help: str
    """One line for `dpo-jax --help`."""
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

COMMANDS = {
    "demo": Command(c.DemoRun, "demo:demo", "the whole thing on a real 135M Llama in minutes on a CPU"),
    "dpo": Command(
        c.DPORun, "dpo:train", "align a model with preference pairs", lists=("data", "eval_data"), recipe=True
    ),
    "sft": Command(
        c.SFTRun,
        "sft:train",
        "fine-tune a model on dialogues or instructions",
        lists=("data", "eval_data"),
        recipe=True,
    ),
    "reward": Command(
        c.RewardRun, "reward:train", "train a reward model on comparisons", lists=("data", "eval_data"), recipe=True
    ),
    "ppo": Command(
        c.PPORun,
        "ppo:train",
        "let a model learn from rewards of what it writes: PPO with a value model, and its relatives",
        repeated=("reward",),
        recipe=True,
    ),
    "grpo": Command(
        c.GRPORun,
        "ppo:train",
        "the same without a value model: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO, REINFORCE++, ReMax",
        repeated=("reward",),
        recipe=True,
    ),
    "rejection": Command(
        c.RejectionRun,
        "rejection:train",
        "let a model learn from the best of K of its own responses",
        repeated=("reward",),
        recipe=True,
    ),
    f"dpo {ONLINE}": Command(
        c.OnlineDPORun,
        "online_dpo:train",
        "the same with pairs of what the model writes itself, judged as it learns: online DPO, XPO, Nash-MD's sampler",
        repeated=("reward",),
        recipe=True,
    ),
    "distill": Command(
        c.DistillRun,
        "distill:train",
        "let a student learn a teacher's distribution of each next token, on its own responses: GKD",
        recipe=True,
    ),
    "recipe frontier": Command(
        c.FrontierRun,
        "recipes.frontier:recipe",
        "reward against KL for DPO, PPO, best-of-n and SFT on chosen: one plot, one table",
    ),
    "gatt": Command(c.GattRun, "gatt:gatt", "make instructions hold for whole dialogues: Ghost Attention", recipe=True),
    "recipe llama2_chat": Command(
        c.Llama2ChatRun,
        "recipes.llama2_chat:recipe",
        "Llama 2-Chat: SFT, reward models, rounds of rejection sampling, PPO",
        recipe=True,
    ),
    "recipe llama3": Command(
        c.Llama3Run,
        "recipes.llama3:recipe",
        "Llama 3's rounds: reward model, best of K, SFT on them, DPO on the newest pairs, averaging",
        recipe=True,
    ),
    "recipe iterative_rpo": Command(
        c.IterativeRPORun,
        "recipes.iterative_rpo:recipe",
        "rounds of DPO + NLL on a model's own right answers against its wrong ones",
        recipe=True,
    ),
    "recipe dsft": Command(
        c.DSFTRun,
        "recipes.dsft:recipe",
        "dialogues for distilled SFT: a teacher answers, refines instructions, plays both sides; filters",
        recipe=True,
    ),
    "recipe zephyr": Command(
        c.ZephyrRun,
        "recipes.zephyr:recipe",
        "Zephyr: a teacher's dialogues, distilled SFT, AI feedback, distilled DPO, one report",
        recipe=True,
    ),
    "recipe aif": Command(
        c.AIFRun,
        "recipes.aif:recipe",
        "AI feedback: a pool of writers answers, a judge rates, UltraFeedback's schema and pairs come out",
        recipe=True,
    ),
    "generate": Command(c.GenerateRun, "generate:generate", "answer prompts"),
    "chat": Command(c.ChatRun, "chat:chat", "talk to a model in the terminal"),
    "serve": Command(
        c.ServeRun,
        "serve:serve",
        "an OpenAI-compatible endpoint: /v1/chat/completions, /v1/completions, /v1/models",
        repeated=("model",),
    ),
    "eval": Command(
        c.EvalRun, "eval:evaluate", "reward accuracy, margins, perplexity, KL, repetition, tables per rating and source"
    ),
    "logps": Command(c.LogpsRun, "logps:logps", "log-probabilities of chosen and rejected, one JSON object a row"),
    "score": Command(c.ScoreRun, "score:score", "the reward of every response, one JSON object a row"),
    "mt-bench answer": Command(
        c.MTBenchAnswerRun,
        "mt_bench_answer:answer",
        "a model's answers to MT-Bench's questions, as FastChat writes them",
    ),
    "mt-bench judge": Command(
        c.MTBenchJudgeRun, "mt_bench_judge:judge", "judge such answers one by one or in pairs, as FastChat does"
    ),
    "mt-bench show": Command(
        c.MTBenchShowRun,
        "mt_bench:show",
        "means and win rates by model, turn and category, from FastChat's judgement files",
    ),
    "lm-eval": Command(
        c.LmEvalRun, "lm_eval:lm_eval", "tasks of lm-evaluation-harness: TruthfulQA, GSM8K and the like, or your own"
    ),
    "safety": Command(
        c.SafetyRun,
        "safety:safety",
        "what a model refuses, and whether it should; violations and helpfulness by category",
    ),
    "win-rate": Command(
        c.WinRateRun, "win_rate:win_rate", "how often one model's answers beat another's: intervals, length-controlled"
    ),
    "judge": Command(
        c.JudgeRun,
        "judge:judge",
        "judge responses by an endpoint, a model of this machine or a function: rating, pair, list, checklist",
    ),
    "average": Command(
        c.AverageRun,
        "average:average",
        "several models of one shape into one: uniform, weighted, exponential moving average",
    ),
    "pairs": Command(
        c.PairsRun,
        "pairs:pairs",
        "preference pairs by a named rule: zephyr, ultrafeedback_binarized, best_worst, all, corrupt",
    ),
    "convert": Command(c.ConvertRun, "convert:convert", "Hugging Face safetensors <-> orbax, GGUF -> either"),
    "extend-vocab": Command(
        c.ExtendVocabRun,
        "extend_vocab:extend_vocab",
        "Chinese pieces for a Llama 2 tokenizer, and rows for them in the model",
        recipe=True,
    ),
    "prepare": Command(
        c.PrepareRun,
        "prepare:prepare",
        "any preference, dialogue or text file -> a TFDS dataset, split, validated, counted",
    ),
    PLAN: Command(
        c.PlanRun,
        "plan:plan",
        "does it fit, what does it move, how long does it take: a training step on devices that are not here",
    ),
    BENCH: Command(
        c.BenchRun,
        "bench:bench",
        "step time, tokens/s, MFU, memory, loader, sampler and checkpoints on what is here, beside the plan's",
    ),
    "inspect": Command(
        c.InspectRun, "inspect:inspect", "tokens of some rows with the loss mask coloured", lists=("data",)
    ),
    "report": Command(
        c.ReportRun,
        "report:report",
        "several runs on one page: curves over each other, options that differ",
        positional=("runs",),
        silent=True,
    ),
    "configs": Command(
        c.ConfigsRun,
        "configs:configs",
        "the recipes that come with the package: `configs show NAME`, `configs copy NAME`",
        positional=("action", "name"),
        silent=True,
    ),
    "completion": Command(
        c.CompletionRun,
        "completion:completion",
        "what lets a shell complete commands, options and values: `completion bash`, `completion zsh`",
        positional=("shell",),
        silent=True,
    ),
}
