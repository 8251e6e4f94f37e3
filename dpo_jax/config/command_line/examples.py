"""What `--help` shows first: lines to type for each command, and the options that most runs need."""

_ENDPOINT = "--endpoint.url http://127.0.0.1:8000/v1 --endpoint.model M"

EXAMPLES: dict[str, tuple[str, ...]] = {
    "demo": ("demo", "demo --fast --out /tmp/demo"),
    "dpo": (
        "dpo --model smollm2 --data pairs.jsonl --holdout 0.1 --out runs/first --lora.rank 16"
        " --optimizer.learning_rate 1e-4",
        "dpo zephyr_ddpo --model M --data pairs.jsonl --out runs/zephyr",
    ),
    "dpo --online": (
        "dpo --online --model runs/sft --data prompts.jsonl --reward runs/rm --train.steps 100 --out runs/online",
    ),
    "lm-eval": ("lm-eval --model runs/first --tasks gsm8k --out lm_eval.json",),
    "sft": (
        "sft --model smollm2 --data dialogues.jsonl --holdout 0.05 --out runs/sft",
        "sft --model smollm2 --data texts.txt --data.kind text --out runs/pretrained",
    ),
    "reward": ("reward --model smollm2 --data comparisons.jsonl --holdout 0.1 --out runs/rm",),
    "ppo": (
        "ppo --model runs/sft --data prompts.jsonl --reward runs/rm --train.steps 100 --out runs/ppo",
        "ppo --model runs/sft --data prompts.jsonl --reward reward.py:score --train.steps 100 --out runs/mine",
    ),
    "grpo": ("grpo --model runs/sft --data problems.jsonl --reward numeric:answer --train.steps 100 --out runs/grpo",),
    "distill": ("distill --model runs/small --teacher runs/large --data prompts.jsonl --out runs/distilled",),
    "rejection": ("rejection --model runs/sft --data prompts.jsonl --reward runs/rm --out runs/best",),
    "gatt": ("gatt --model smollm2 --data questions.jsonl --out runs/gatt",),
    "recipe frontier": ("recipe frontier --out runs/frontier",),
    "recipe llama2_chat": (
        "recipe llama2_chat smollm2_chat --sft_data sft.jsonl --helpful_data pairs.jsonl --prompts prompts.jsonl"
        " --out runs/chat",
    ),
    "recipe llama3": (
        "recipe llama3 llama3_rounds --model M --sft_data dialogues.jsonl --preferences comparisons.jsonl"
        " --prompts prompts.jsonl --judge runs/judge --out runs/llama3",
    ),
    "recipe iterative_rpo": (
        "recipe iterative_rpo iterative_rpo_rounds --model M --prompts problems.jsonl --out runs/rpo",
    ),
    "recipe dsft": (
        f"recipe dsft --prompts seeds.jsonl --out runs/dsft {_ENDPOINT}",
        "recipe dsft --prompts seeds.jsonl --out runs/dsft --model smollm2 --write.turns 2",
    ),
    "recipe zephyr": (
        "recipe zephyr zephyr --model M --seeds seeds.jsonl --prompts prompts.jsonl --pool pool.yaml"
        " --judge judge:judge.yaml --out runs/zephyr",
    ),
    "recipe aif": ("recipe aif --prompts prompts.jsonl --pool pool.yaml --judge judge:judge.yaml --out runs/aif",),
    "generate": (
        'generate --model runs/first --prompt "Name three colours."',
        "generate --model runs/first --prompts prompts.jsonl --out responses.jsonl --samples 4",
    ),
    "chat": ("chat --model runs/first", "chat --model runs/first --against smollm2"),
    "serve": ("serve --model runs/first --port 8000",),
    "eval": ("eval --model runs/first --reference smollm2 --data held_out.jsonl --out eval.json",),
    "logps": ("logps --model runs/first --data held_out.jsonl --out logps.jsonl",),
    "score": ("score --model runs/rm --data held_out.jsonl --out scores.jsonl",),
    "mt-bench answer": ("mt-bench answer --model runs/dpo --questions question.jsonl --out model_answer/ours.jsonl",),
    "mt-bench judge": (
        f"mt-bench judge --questions question.jsonl --answers model_answer/ours.jsonl --out single.jsonl {_ENDPOINT}",
    ),
    "mt-bench show": ("mt-bench show --judgments single.jsonl",),
    "safety": ("safety --data responses.jsonl --category type",),
    "win-rate": ("win-rate --answers ours.json --against theirs.json --judgments annotations.json",),
    "judge": (
        "judge --data answers.jsonl --out scores.jsonl --ask rating --model smollm2",
        f"judge --data pairs.jsonl --out verdicts.jsonl --ask pair {_ENDPOINT}",
    ),
    "average": ("average --models runs/seed0 runs/seed1 runs/seed2 --to averaged",),
    "pairs": ("pairs --data scored.jsonl --out pairs.jsonl --rule zephyr",),
    "convert": (
        "convert --from runs/first --to first.gguf --format gguf --dtype q8_0",
        "convert --from model.gguf --to folder",
    ),
    "extend-vocab": ("extend-vocab --model M --to models/zh --data texts.jsonl --pieces 10000",),
    "prepare": ("prepare --data pairs.jsonl --to data/prefs --splits train=0.98,test=0.02",),
    "plan": (
        "plan zephyr_ddpo --topology v5e:4x4 --model_shape llama2_7b",
        "plan dpo --topology a100:8 --model_shape llama2_7b --lora.rank 16",
    ),
    "bench": ("bench zephyr_ddpo --model_shape llama3_1b",),
    "inspect": ("inspect --model smollm2 --data pairs.jsonl",),
    "report": ("report runs/beta_0.1 runs/beta_0.5 --out compared.html",),
    "configs": ("configs", "configs show zephyr_ddpo", "configs copy zephyr_ddpo --to mine.py"),
    "completion": (
        "completion bash > ~/.local/share/bash-completion/completions/dpo-jax",
        "completion zsh > ~/.dpo-jax.zsh && echo 'source ~/.dpo-jax.zsh' >> ~/.zshrc",
        "completion fish > ~/.config/fish/completions/dpo-jax.fish",
    ),
}

_LENGTH = ("train.epochs", "train.batch_size", "optimizer.learning_rate", "lora.rank")
NEEDED: dict[str, tuple[str, ...]] = {
    "dpo": ("holdout", "dpo.loss", "dpo.beta", *_LENGTH),
    "sft": ("holdout", *_LENGTH, "data.max_length", "data.kind"),
    "reward": ("holdout", "reward.margin", *_LENGTH, "data.max_length"),
    "ppo": ("train.steps", "train.batch_size", "sample.max_new_tokens", "ppo.kl_coefficient", *_LENGTH),
    "grpo": ("train.steps", "ppo.preset", "ppo.group_size", "sample.max_new_tokens", *_LENGTH),
    "distill": ("teacher", "distill.on_policy", "distill.beta", "train.steps", "sample.max_new_tokens", *_LENGTH),
    "rejection": ("rejection.samples", "rejection.iterations", "sample.max_new_tokens", *_LENGTH),
    "plan": ("topology", "model_shape"),
    "generate": ("prompt", "prompts", "out", "samples"),
    "chat": ("against", "system"),
    "judge": ("ask", "model", "endpoint.url", "endpoint.model"),
    "": (
        "model",
        "data",
        "reward",
        "eval_data",
        "holdout",
        "train.steps",
        *_LENGTH,
        "data.max_length",
        "sample.max_new_tokens",
        "sample.temperature",
        "endpoint.url",
        "endpoint.model",
        "dtype",
        "batch_size",
        "mesh.fsdp",
    ),
}
"""Options of a command, then of every command, in the order in which people ask for them."""
