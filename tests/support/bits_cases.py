"""The runs that `same_bits.py` compares: every command of the command line, with what it does on the way."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """Commands that run one after another in one folder.

    Attributes:
      label: begins with the command's word.
      commands: each a line of words; `@NAME` is a file of the inputs.
      between: changes the folder before the last command.
      stdout: whether what was printed is the result.
    """

    label: str
    commands: tuple[str, ...]
    between: Callable[[Path], None] | None = None
    stdout: bool = False


def interrupt(folder: Path) -> None:
    """Take the finished run `out` back to what a kill after its step 2 leaves: nothing of steps 3 and 4 but rows."""
    out = folder / "out"
    shutil.rmtree(out / "checkpoints" / "4")
    shutil.rmtree(out / "model")
    marker = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(marker | {"finished": False}, indent=2) + "\n")


_LOOP = "--train.batch_size 4 --optimizer.learning_rate 1e-2 --checkpoint.every 2"
_SHORT = "--data.max_length 96 --data.buckets 1"
_PAIRS = f"--model @model --data @pairs.jsonl {_LOOP} --train.steps 3 {_SHORT} --out out"
_SAMPLED = f"--model @model --data @prompts.jsonl {_LOOP} --train.steps 2 --data.max_length 64 --out out"
_LETTERS = "--reward @mine.py:letters"
_STAGE = "--{0}.train.steps 2 --{0}.train.batch_size 4 --{0}.optimizer.learning_rate 1e-2 --{0}.lora.rank 2"
_ROOM = "--{0}.data.max_length 56 --{0}.data.buckets 1"

CASES = (
    # dpo
    Case("dpo", (f"dpo {_PAIRS} --eval_data @eval.jsonl --train.eval_every 2",)),
    Case(
        "dpo lora bfloat16 accumulate",
        (f"dpo {_PAIRS} --lora.rank 2 --train.dtype bfloat16 --train.accumulate 2 --optimizer.schedule cosine",),
    ),
    Case("dpo live reference", (f"dpo {_PAIRS} --dpo.reference live --train.layout separate --holdout 0.25",)),
    Case(
        "dpo reference from the cache",
        (f"dpo {_PAIRS} --reference @rm2", f"dpo {_PAIRS} --reference @rm2".replace("--out out", "--out again")),
    ),
    Case("dpo resumed", (f"dpo {_PAIRS} --train.steps 4 --checkpoint.keep 3",) * 2, between=interrupt),
    *(
        Case(f"dpo {loss}", (f"dpo {_PAIRS} --dpo.loss {loss} --dpo.beta 0.3",))
        for loss in ("kto", "ipo", "simpo", "orpo")
    ),
    # sft
    Case(
        "sft chat",
        (
            f"sft --model @model --data @chat.jsonl --eval_data @chat_eval.jsonl {_LOOP} --train.steps 3 {_SHORT}"
            " --out out",
        ),
    ),
    Case(
        "sft text packed",
        (
            f"sft --model @model --data @text.txt --data.kind text --data.separator blank_line {_LOOP} --train.steps 3"
            " --data.max_length 64 --out out",
        ),
    ),
    Case(
        "sft lora packing, then its run and its adapter read",
        (
            f"sft --model @model --data @chat.jsonl {_LOOP} --train.steps 2 --lora.rank 2 --data.packing"
            " --data.max_length 96 --out out",
            "convert --from out --to merged",
            "generate --model out/adapter --prompts @prompts.jsonl --out adapter.jsonl --sample.max_new_tokens 6"
            " --sample.temperature 0",
        ),
    ),
    # reward
    Case(
        "reward margin, then its run scores",
        (
            f"reward --model @model --data @rated.jsonl --mix_data @safety.jsonl --mix 0.2 --holdout 0.25 {_LOOP}"
            f" --train.steps 3 --lora.rank 2 --reward.margin small --reward.multi_class safety:0.5=safe,unsafe {_SHORT}"
            " --out out",
            f"score --model out --data @eval.jsonl --out scores.jsonl {_SHORT}",
        ),
    ),
    Case(
        "reward ranked lists",
        (
            f"reward --model @model --data @ranked.jsonl {_LOOP} --train.steps 2 --reward.centering 0.01 {_SHORT}"
            " --out out",
        ),
    ),
    # ppo, rejection, gatt
    Case(
        "ppo gae reward model",
        (f"ppo {_SAMPLED} --reward @rm --sample.max_new_tokens 6 --ppo.minibatches 2 --ppo.epochs 2",),
    ),
    Case(
        "ppo stopped value lora",
        (f"ppo {_SAMPLED} {_LETTERS} --sample.max_new_tokens 6 --ppo.value stopped --lora.rank 2 --ppo.kl_target 1",),
    ),
    Case("ppo grpo", (f"ppo {_SAMPLED} {_LETTERS} --sample.max_new_tokens 6 --ppo.advantage grpo --ppo.group_size 4",)),
    Case("grpo dapo", (f"grpo {_SAMPLED} {_LETTERS} --sample.max_new_tokens 6 --ppo.preset dapo --ppo.group_size 4",)),
    Case(
        "grpo gspo in rows, epochs, int8 sampler",
        (
            f"grpo {_SAMPLED} {_LETTERS} --sample.max_new_tokens 6 --ppo.preset gspo --ppo.group_size 4 --ppo.epochs 2"
            " --sample.weights int8 --train.layout separate",
        ),
    ),
    Case(
        "dpo online xpo",
        (
            f"dpo --online {_SAMPLED} {_LETTERS} --sample.max_new_tokens 6 --online.opponent reference"
            " --online.exploration 1e-3 --lora.rank 2",
        ),
    ),
    Case(
        "distill",
        (f"distill --teacher @rm2 {_SAMPLED} --sample.max_new_tokens 6 --distill.on_policy 1 --distill.beta 0.5",),
    ),
    Case(
        "rejection",
        (
            f"rejection {_SAMPLED} {_LETTERS} --eval_data @heldout.jsonl --rejection.samples 3 --rejection.iterations 2"
            " --rejection.temperatures 0.7 1.2 --sample.max_new_tokens 6 --sample_batch_size 8 --data.buckets 1",
        ),
    ),
    Case(
        "gatt",
        (
            f"gatt --model @model --data @prompts.jsonl {_LOOP} --train.steps 2 --data.max_length 512 --data.buckets 1"
            " --gatt.instructions @instructions.jsonl --gatt.dialogues 4 --gatt.turns 2 --gatt.train_turns every"
            " --gatt.eval_dialogues 2 --sample.max_new_tokens 3 --sample_batch_size 2 --lora.rank 2 --out out",
        ),
    ),
    # what does not train
    Case(
        "generate greedy, sampled, beams",
        (
            "generate --model @model --prompts @prompts.jsonl --out greedy.jsonl --sample.temperature 0"
            " --sample.max_new_tokens 8",
            "generate --model @model --prompts @prompts.jsonl --out sampled.jsonl --samples 3 --seed 5 --batch_size 4"
            " --sample.max_new_tokens 8 --sample.top_k 20 --sample.top_p 0.9",
            "generate --model @model --prompts @heldout.jsonl --out beams.jsonl --sample.beams 3"
            " --sample.length_penalty 0.5 --sample.max_new_tokens 6",
        ),
    ),
    Case(
        "generate one prompt", ("generate --model @model --prompt film --raw --sample.max_new_tokens 8",), stdout=True
    ),
    Case(
        "eval of a policy",
        (
            f"eval --model @model --reference @rm2 --data @eval.jsonl --samples 3 --sample.max_new_tokens 6"
            f" --out e.json {_SHORT}",
        ),
        stdout=True,
    ),
    Case(
        "eval of a reward model",
        (f"eval --model @rm --judge @rm --data @eval.jsonl --out e.json --report e.html {_SHORT}",),
        stdout=True,
    ),
    Case("logps", (f"logps --model @model --data @eval.jsonl --out logps.jsonl {_SHORT}",)),
    Case("score", (f"score --model @rm --data @ranked.jsonl --out scores.jsonl --copy {_SHORT}",)),
    Case(
        "convert, and every format read",
        (
            "convert --from @model --to orbax --format orbax",
            "convert --from orbax --to back",
            "convert --from @model.gguf --to of_gguf --dtype bfloat16",
            f"logps --model orbax --data @eval.jsonl --out logps.jsonl {_SHORT}",
        ),
    ),
    Case(
        "extend-vocab",
        ("extend-vocab --model @spm --to out --data @chinese.jsonl --pieces 60 --pad_to_multiple_of 8",),
        stdout=True,
    ),
    Case(
        "prepare, and its set read",
        (
            "prepare --data @pairs.jsonl --to set --splits train=0.7,test=0.3 --tokenizer @model",
            "inspect --model @model --data tfds:set:test --rows 2",
        ),
        stdout=True,
    ),
    Case(
        "inspect",
        (
            f"inspect --model @model --data @pairs.jsonl --rows 2 {_SHORT.partition(' --data.buckets')[0]}",
            "inspect --model @model --data @chat.jsonl --kind dialogues --rows 2",
        ),
        stdout=True,
    ),
    Case("plan", ("plan @plan.py --topology v5e:2x2 --cache cache --out plan.json",)),
    # several stages
    Case("demo", ("demo --fast --model @model --out out",)),
    Case(
        "recipe frontier",
        (
            "recipe frontier --model @model --out out --lora.rank 2 --recipe.size fast --recipe.prompts 8"
            " --recipe.samples 3 --recipe.unseen 4 --recipe.unseen_samples 2 --recipe.best_of 4 --recipe.new_tokens 6"
            " --recipe.batch_size 8 --recipe.points 2 --recipe.dpo_beta 0.1 --recipe.dpo_steps 2 --recipe.sft_steps 2"
            " --recipe.ppo_kl_coefficient 0.05 --recipe.ppo_steps 2 --recipe.ppo_batch_size 8"
            " --recipe.learning_rate 2e-2",
        ),
    ),
    Case(
        "recipe llama2_chat",
        (
            "recipe llama2_chat --model @model --sft_data @chat_eval.jsonl --helpful_data @rated.jsonl --prompts"
            " @more.jsonl --judge @mine.py:letters --safety_data @safety.jsonl --safety_judge @mine.py:short --out"
            " out --recipe.rounds 1 --recipe.pair_samples 8 --recipe.pair_batch_size 8 --recipe.heldout 0.5 "
            + " ".join(_STAGE.format(name) for name in ("sft", "helpful", "safety", "rejection", "ppo"))
            + " "
            + " ".join(_ROOM.format(name) for name in ("sft", "helpful", "safety", "rejection"))
            + " --helpful.data.max_prompt_length 40 --safety.data.max_prompt_length 40 --helpful.reward.margin small"
            " --ppo.sample.stop_tokens "
            + " ".join(map(str, range(260, 300)))
            + " --rejection.rejection.samples 2 --rejection.sample.max_new_tokens 6 --rejection.sample_batch_size 8"
            " --ppo.ppo.epochs 1 --ppo.ppo.value stopped --ppo.sample.max_new_tokens 6 --ppo.data.max_length 56"
            " --ppo.data.max_prompt_length 40",
        ),
    ),
    Case(
        "recipe llama3",
        (
            "recipe llama3 --model @model --prompts @sums.jsonl --judge @mine.py:letters --sft_data @chat_eval.jsonl"
            " --preferences @pairs.jsonl --out out --rounds 2 --average_over train.seed=1 --pair_samples 6"
            " --batch_size 16 --heldout 0.4 --rejection.rejection.samples 6 --rejection.sample.max_new_tokens 8"
            " --rejection.sample_batch_size 16 --rejection.sample.stop_strings e o r t a "
            + " ".join(_STAGE.format(name) for name in ("sft", "reward", "rejection", "dpo"))
            + " "
            + " ".join(_ROOM.format(name) for name in ("sft", "reward", "rejection", "dpo"))
            + " --reward.data.max_prompt_length 40 --dpo.data.max_prompt_length 40",
        ),
    ),
    Case(
        "recipe iterative_rpo",
        (
            "recipe iterative_rpo --model @model --prompts @sums.jsonl --eval_prompts @sums.jsonl --out out --rounds 2"
            " --samples 8 --pairs_per_prompt 3 --temperatures 1.0 1.2 --batch_size 16 --answer_pattern ([ae])"
            " --sample.max_new_tokens 8 --sample.stop_strings i o r t --dpo.data.max_prompt_length 40 "
            + _STAGE.format("dpo")
            + " "
            + _ROOM.format("dpo"),
        ),
    ),
    Case(
        "recipe zephyr",
        (
            "generate --model @rm2 --prompts @prompts.jsonl --out other.jsonl --sample.stop_strings a e i o",
            "recipe zephyr --model @model --seeds @heldout.jsonl --prompts @prompts.jsonl --pool @pool.yaml --judge"
            " length --out out --heldout 0.3 --batch_size 4 --sample.max_new_tokens 6 --dsft.model @rm2"
            " --dsft.sample.max_new_tokens 8 --dsft.sample.stop_strings a e i o --sample.stop_strings a e i o"
            " --dsft.write.rounds 0 --dsft.filter.near None"
            " --dsft.filter.least_characters 1 --dsft.filter.most_characters 1000 --aif.samples 2"
            " --aif.principles none "
            + " ".join(_STAGE.format(name) for name in ("sft", "dpo"))
            + " "
            + " ".join(_ROOM.format(name) for name in ("sft", "dpo"))
            + " --dpo.data.max_prompt_length 40",
        ),
    ),
    # what judges and compares
    Case(
        "judge, pairs of what it scored",
        (
            "judge --data @ranked.jsonl --out judged.jsonl --function @mine.py:letters",
            "judge --data @ranked.jsonl --out read.jsonl --model @model --template chatml --ask rating"
            " --sample.max_new_tokens 4",
            "pairs --data @ranked.jsonl --out zephyr.jsonl --rule zephyr",
            "pairs --data @ranked.jsonl --out all.jsonl --rule all",
        ),
    ),
    Case(
        "mt-bench answered and shown",
        (
            "mt-bench answer --model @model --questions @question.jsonl --out a.jsonl --sample.max_new_tokens 6"
            " --model_id a",
            "mt-bench answer --model @rm2 --questions @question.jsonl --out b.jsonl --sample.max_new_tokens 6"
            " --model_id b",
            "mt-bench show --judgments @judgment.jsonl --questions @question.jsonl --json",
        ),
        stdout=True,
    ),
    Case(
        "safety, win-rate",
        (
            "generate --model @model --prompts @prompts.jsonl --out a.jsonl --sample.max_new_tokens 6",
            "generate --model @rm2 --prompts @prompts.jsonl --out b.jsonl --sample.max_new_tokens 6",
            "win-rate --answers a.jsonl --against b.jsonl --judge @mine.py:letters --judgments v.json --out w.json",
            "safety --data a.jsonl --safety_reward length --threshold 12 --reward length --rows rows.jsonl --out"
            " s.json",
        ),
        stdout=True,
    ),
    Case("average", ("average --models @model @rm2 --weights 0.25 0.75 --to out",)),
    Case("configs", ("configs", "configs show smollm2_hh_dpo", "configs copy llama2_ppo --to mine.py"), stdout=True),
    Case("completion", ("completion bash",), stdout=True),
)
