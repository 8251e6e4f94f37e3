"""`dpo-jax chat`: talk to a model in the terminal, or to two side by side."""

import secrets
import sys
from pathlib import Path

from dpo_jax.commands.serve import talker_of
from dpo_jax.complete.serving.talker import Question, Talker, stream
from dpo_jax.config import ChatRun
from dpo_jax.data.rows.messages import Message
from dpo_jax.errors import InputError
from dpo_jax.files.jsonl import write_lines
from dpo_jax.files.log import say
from dpo_jax.sample.live import Settings

_HELP = (
    "/system TEXT sets the system prompt (alone: none), /reset forgets the dialogue, /undo the last turn, /save FILE "
    "writes it as JSONL, /quit ends; [length] behind a response: --sample.max_new_tokens cut it"
)


class _Dialogue:
    """What was said between the user and one model."""

    def __init__(self, talker: Talker, run: ChatRun):
        self.talker, self._run = talker, run
        self.turns: list[Message] = []
        self._new = run.sample.max_new_tokens

    def messages(self, system: str | None) -> list[Message]:
        return [*([Message("system", system)] if system else []), *self.turns]

    def answer(self, system: str | None, seed: int) -> None:
        """Print what the model says to its last turn, as it comes, and remember it."""
        sample = self._run.sample
        prompt = self.talker.chat.prompt_ids(self.messages(system))
        room = self.talker.longest - len(prompt)
        if room < 1:
            raise InputError(
                f"the dialogue has {len(prompt)} tokens, and the model takes {self.talker.longest}: /reset"
            )
        off = Settings(1)
        settings = Settings(
            min(self._new, room),
            temperature=sample.temperature,
            top_k=off.top_k if sample.top_k is None else sample.top_k,
            top_p=off.top_p if sample.top_p is None else sample.top_p,
            min_p=off.min_p if sample.min_p is None else sample.min_p,
            stop_tokens=(*self.talker.terminators, *sample.stop_tokens),
        )
        question = Question(prompt, settings, lambda _: None, seed=seed, stop_strings=sample.stop_strings)
        text, reason = "", None
        try:
            for piece in stream(self.talker, question):
                print(piece.text, end="", flush=True)
                text, reason = text + piece.text, piece.finish_reason
        except KeyboardInterrupt:
            reason = "interrupted"
        print(f" [{reason}]" if reason not in ("stop", None) else "", flush=True)
        self.turns.append(Message("assistant", text))


class _Chat:
    """The dialogues, and what the user's words mean."""

    def __init__(self, run: ChatRun):
        names = [run.model] if run.against is None else [run.model, run.against]
        self.dialogues = [_Dialogue(talker_of(name, run), run) for name in names]
        self.system, self._run, self._said = run.system, run, 0

    def close(self) -> None:
        for dialogue in self.dialogues:
            dialogue.talker.close()

    def take(self, line: str) -> bool:
        """One line of the user. False: the end. Raises `InputError`; the dialogue is then as before."""
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if word == "/quit":
            return False
        if word == "/system":
            self.system = rest or None
            say("the system prompt is set" if rest else "no system prompt")
        elif word == "/reset":
            for dialogue in self.dialogues:
                dialogue.turns.clear()
            say("the dialogue is forgotten" + (", the system prompt stays" if self.system else ""))
        elif word == "/undo":
            if not self.dialogues[0].turns:
                raise InputError("/undo: nothing was said yet")
            for dialogue in self.dialogues:
                del dialogue.turns[-2:]
            say("the last turn is forgotten")
        elif word == "/save":
            self._save(rest)
        elif word in ("/help", "/?"):
            print(_HELP)
        elif word.startswith("/") and word[1:].isalpha():
            raise InputError(f"{word} is no command; {_HELP}")
        elif line.strip():
            self._say(line)
        return True

    def _say(self, line: str) -> None:
        seed = secrets.randbelow(2**32) if self._run.seed is None else (self._run.seed + self._said) % 2**32
        for dialogue in self.dialogues:
            before = list(dialogue.turns)
            dialogue.turns.append(Message("user", line))
            try:
                if len(self.dialogues) > 1:
                    print(f"--- {dialogue.talker.model}")
                dialogue.answer(self.system, seed)
            except InputError:
                dialogue.turns = before
                raise
        self._said += 1

    def _save(self, file: str) -> None:
        if not file:
            raise InputError("/save needs a file: /save dialogue.jsonl")
        path = Path(file).expanduser()
        if path.exists():
            raise InputError(f"{path}: is there already; give /save another name")
        rows = [
            {"model": d.talker.model, "messages": [m.as_dict() for m in d.messages(self.system)]}
            for d in self.dialogues
        ]
        write_lines(path, rows)
        print(f"{path}: {len(rows)} dialogue{'s' if len(rows) > 1 else ''}")


def chat(run: ChatRun) -> None:
    """The `chat` command: until /quit or the end of the input."""
    talk, shown = _Chat(run), sys.stdin.isatty()
    if shown:
        say(_HELP)
    try:
        while True:
            try:
                line = input("> " if shown else "")
            except EOFError:
                return
            try:
                if not talk.take(line):
                    return
            except InputError as problem:
                if not shown:
                    raise InputError(str(problem)) from problem
                say(f"error: {problem}", "error")
    finally:
        talk.close()
