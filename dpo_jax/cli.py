"""The command line: words in, one frozen dataclass of `config/` out, handed to the function that does the work.

Nothing here computes anything, and nothing here imports JAX: `dpo-jax --help` and a mistyped option answer at once.
`config/command_line/help.py` draws the help of a command, `config/values.py` reads the values.
"""

import contextlib
import dataclasses
import difflib
import importlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, get_origin

from dpo_jax import __version__, config, voice
from dpo_jax.commands.config_keys import without_keys_of
from dpo_jax.config.command_line import shipped, yaml_file
from dpo_jax.config.command_line.help import VOICE, help_text
from dpo_jax.config.command_line.words import BENCH, COMMANDS, GROUPS, ONLINE, PLAN, PLANNED
from dpo_jax.config.names import ELSEWHERE, OTHERWISE, option
from dpo_jax.config.options import left_out
from dpo_jax.config.values import built, greedy, negated
from dpo_jax.errors import BAD_INPUT, DoesNotFit, InputError, SharedError, Stopped, full_disk, naming

PROGRAM = "dpo-jax"
OK, DOES_NOT_FIT, INTERRUPTED, BROKEN_PIPE = 0, 3, 130, 141
GUESS_CUTOFF = 0.5

_CONFIG: dict[str, str] = dict.fromkeys((PLAN, BENCH), " CONFIG|COMMAND")  # where it must be given

# Options that exclude each other: one given on the command line replaces the other of a CONFIG.py.
_EXCLUSIVE = (("train", "steps", "epochs"), ("optimizer", "warmup_steps", "warmup_ratio"))
_BESIDE = {"warmup_ratio": ("warmup_min",)}  # what goes with one that is replaced


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0, 2 for bad input (one line on stderr), 3 for a plan that does not fit,
    130 for Ctrl-C and 143 for SIGTERM, a training run's too, which has saved all and said so."""
    args = list(sys.argv[1:] if argv is None else argv)
    # Else transformers says, before anything else, that it misses PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    voice.spell_out()
    voice.talk("json" if "--json" in args else "lines")  # for what is wrong before the command is known
    try:
        return _run(args)
    except InputError as error:
        return _failed(BAD_INPUT, " ".join(str(error).split()), shared=isinstance(error, SharedError))
    except DoesNotFit as answer:
        voice.say(f"{PROGRAM}: {answer}", "error", code=DOES_NOT_FIT)
        return DOES_NOT_FIT
    except Stopped as stopped:  # and it has said so
        return stopped.code
    except KeyboardInterrupt:
        return _failed(INTERRUPTED, "interrupted", kind="", shared=True)
    except BrokenPipeError:  # the reader of our output went away (`dpo-jax inspect ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if reason := full_disk(error):
            path = getattr(error, "filename", None)
            where = "" if path is None else f"{path}: "
            mend = "free space and run the same command again: what was whole is kept"
            return _failed(BAD_INPUT, f"{where}cannot be written ({reason}); {mend}")
        if (together := _together()) is not None:
            together.leave_after(error)
        raise


def _failed(code: int, line: str, *, kind: str = "error: ", shared: bool = False) -> int:
    """Say `line`, and on which host it is true where others work too; but not of what is `shared` by all of them."""
    together = _together()
    where = together.here() if together and not shared else ""
    with contextlib.suppress(OSError):  # stderr may be a file on the disk that is full
        voice.say(f"{PROGRAM}: {kind}{where}{line}", "error", code=code)
    if together is not None:
        together.leave(code, line)
    return code


def _together() -> Any:
    """The module that knows of other processes of this run, where the command has come so far that there are some."""
    return sys.modules.get("dpo_jax.processes.distributed")


def _run(args: list[str]) -> int:
    if args[:1] == ["help"]:
        args = [*args[1:], "--help"]
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return OK if args else BAD_INPUT
    if args[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return OK
    if args[0] in GROUPS and args[1:2] in ([], ["-h"], ["--help"]):
        print(_overview(names_of(args[0]), args[0]))
        return OK if args[1:] else BAD_INPUT
    args = split_recipe_name(args)
    if args[0] not in COMMANDS:
        kind = "option" if args[0].startswith("-") else "command"
        known = ", ".join(COMMANDS)
        raise InputError(
            f"unknown {kind} {args[0]}{_guess(args[0], COMMANDS)}; commands are {known} ({PROGRAM} --help)"
        )
    command = COMMANDS[args[0]]
    if {"-h", "--help"} & set(args):
        _show_help(args[0], args[1:])
        return OK
    _, how = _split_voice(args[0], args[1:])
    voice.talk(how)
    voice.listen()
    options = parse(args[0], args[1:])
    module, function = command.function.split(":")
    with without_keys_of(options):
        getattr(importlib.import_module(f"dpo_jax.commands.{module}"), function)(options)
    return OK


def _split_voice(word: str, args: Sequence[str]) -> tuple[list[str], voice.Mode]:
    """The words without --quiet and --json, and how the command is to talk. Raises `InputError`.

    Where a command has one of them as an option of its own (`win-rate --json` prints its result so), it keeps it.
    """
    own = [] if word in _CONFIG else option_names(word)
    kept: list[str] = []
    on: dict[str, bool] = {}
    rest = list(args)
    while rest:
        token = rest.pop(0)
        name, equals, value = token.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        switch = name.removeprefix("no_")
        if not token.startswith("--") or switch not in VOICE:
            kept.append(token)
            continue
        if COMMANDS[word].silent:
            raise InputError(f"{token} has no effect in {PROGRAM} {word}, which says nothing but its result")
        if switch in own:
            kept.append(token)
            on[switch] = name == switch and (value or (rest[:1] or ["true"])[0]) != "false"
            continue
        if not equals and rest[:1] in (["true"], ["false"]):
            equals, value = "=", rest.pop(0)
        if equals and (value not in ("true", "false") or name != switch):
            raise InputError(f"--{switch} is a switch: --{switch}, or --{switch} true or false, not {token}")
        on[switch] = value != "false" and name == switch
    said: list[voice.Mode] = [how for how in ("quiet", "json") if on.get(how)]
    if len(said) > 1:
        raise InputError("--quiet or --json: one of them, for --quiet leaves no progress to write as JSON")
    return kept, said[0] if said else "lines"


def names_of(group: str) -> dict[str, str]:
    """Second word of each command of a group, such as `recipe` -> both words, as in `COMMANDS`."""
    return {word.removeprefix(f"{group} "): word for word in COMMANDS if word.startswith(f"{group} ")}


def split_recipe_name(args: Sequence[str]) -> list[str]:
    """["recipe", NAME, ...] as ["recipe NAME", ...], and ["dpo", ..., "--online", ...] as ["dpo --online", ...].

    Other words as they are. Raises `InputError` for unknown names.
    """
    if args and f"{args[0]} {ONLINE}" in COMMANDS and ONLINE in args:
        return [f"{args[0]} {ONLINE}", *(word for word in args[1:] if word != ONLINE)]
    if not args or args[0] not in GROUPS:
        return list(args)
    group, known, name = args[0], names_of(args[0]), args[1] if len(args) > 1 else ""
    if name not in known:
        raise InputError(
            f"unknown {group} {name}{_guess(name, known)}; {GROUPS[group]} are {', '.join(known)}"
            f" ({PROGRAM} {group} --help)"
        )
    return [known[name], *args[2:]]


def _overview(words: Mapping[str, str] | None = None, first: str = "") -> str:
    """The words of the command line, or those that may follow `first`, with what they do."""
    shown = {word: word for word in COMMANDS} if words is None else words
    width = max(map(len, shown))
    lines = [f"  {name:<{width}}  {COMMANDS[word].help}" for name, word in shown.items()]
    command = f"{PROGRAM} {first} NAME" if first else f"{PROGRAM} COMMAND"
    return "\n".join(
        [
            f"usage: {command} [OPTIONS]",
            "",
            *lines,
            "",
            f"{command} --help lists the options; {PROGRAM} --version",
        ]
    )


def parse(word: str, args: Sequence[str], *, open_ended: bool = False) -> Any:
    """The options of command `word`: an instance of its dataclass. Raises `InputError` for what does not parse.

    `open_ended`: what a CONFIG.py leaves to the command line may be missing. --quiet and --json decide nothing here.
    """
    words, _ = _split_voice(word, args)
    if word in _CONFIG:
        return _parse_about(word, words)
    return _parse(word, words, open_ended=open_ended)


def _parse(word: str, args: list[str], *, open_ended: bool = False) -> Any:
    default, args = _split_recipe(word, args)
    cls, names = COMMANDS[word].options, option_names(word)
    given = greedy(_given(word, args, names), names)
    if default is None:
        missing = [name for name, required in names.items() if required and name not in given]
        if open_ended:
            given |= {name: [config.ON_COMMAND_LINE] for name in missing}
        elif missing:
            raise InputError(f"missing {' and '.join('--' + m for m in missing)} ({PROGRAM} {word} --help)")
    else:
        default = _give_way(default, set(given))
    options = built(cls, given, default, f"({PROGRAM} {word} --help)")
    left_open = [] if open_ended else list(_left_open(options, names))
    if left_open:
        raise InputError(f"missing {' and '.join(left_open)}: the CONFIG leaves that to the command line")
    return options


def _left_open(options: Any, names: dict[str, bool]) -> Iterator[str]:
    for prefix, field in _walk(type(options)):
        value = getattr(reduce(getattr, prefix.split(".")[:-1], options), field.name)
        name = option(prefix + field.name)
        if value in (config.ON_COMMAND_LINE, (config.ON_COMMAND_LINE,)) and name.removeprefix("--") in names:
            yield name


def _given(word: str, args: list[str], names: dict[str, bool]) -> dict[str, list[str]]:
    """The options among the words of the command line -> the words after each. Raises `InputError`."""
    command = COMMANDS[word]
    plain = itertools.takewhile(lambda token: not _is_option(token), args)
    said = [(f"--{name}", [token]) for name, token in zip(command.positional, plain, strict=False)]
    for token in args[len(said) :]:
        if _is_option(token):
            spelled, equals, value = token.partition("=")
            said.append((spelled, [value] if equals else []))
        elif not said:
            raise InputError(f"Unrecognized options: {token} ({PROGRAM} {word} --help)")
        else:
            said[-1][1].append(token)
    fields = dataclasses.fields(command.options)
    one_file = {"data", "eval_data", "mix_data"} - {field.name for field in fields if get_origin(field.type) is tuple}
    for spelled, words in said:
        name = spelled.lstrip("-").replace("-", "_")
        if name in command.lists and words:
            words[:] = [",".join(words)]
        elif name in one_file and len(words) > 1:
            raise InputError(
                f"{spelled} takes one source in {PROGRAM} {word}, and {words[1]} is a second: run it for each, or"
                " give a folder or a quoted pattern ('part-*.jsonl') of files that are laid out alike"
            )
    given: dict[str, list[str]] = {}
    for spelled, words in said:
        name = _check_name(word, spelled, names)
        before = given.pop(name, [])  # the last one counts, of a switch and what switches it off, too
        given[name] = before + words if name in command.repeated else words
    return given


def _split_recipe(word: str, args: list[str]) -> tuple[Any, list[str]]:
    """The `config` of a leading CONFIG.py, or None; and the other words."""
    if not COMMANDS[word].recipe or not args or args[0].startswith("-"):
        return None, args
    path, cls = args[0], COMMANDS[word].options
    loaded = _load(path)
    if not isinstance(loaded, cls):
        others = [name for name, command in COMMANDS.items() if type(loaded) is command.options and command.recipe]
        if others:
            raise InputError(f"{path}: is for {PROGRAM} {' or '.join(others)}, not for {PROGRAM} {word}")
        raise InputError(
            f"{path}: must define `config`, a dpo_jax.config.{cls.__name__}; it is {type(loaded).__name__}"
        )
    return loaded, args[1:]


def _load(path: str) -> Any:
    """The options in a CONFIG.py, in a YAML file, or in the shipped recipe of that name. Raises `InputError`."""
    if not path.endswith(yaml_file.SUFFIXES):
        return shipped.load(path)
    word, words = yaml_file.words_of(path)
    known = [name for name, command in COMMANDS.items() if command.recipe]
    if word not in known:
        raise InputError(f"{path}: `command: {word}` is none that takes a CONFIG; those are {', '.join(known)}")
    with naming(path):
        return _parse(word, words, open_ended=True)


def _parse_about(word: str, args: list[str]) -> Any:
    """Options of `plan` or `bench`, and in `training` those of the command that they are about."""
    if not args or args[0].startswith("-"):
        example = " --topology v5e:4x4" if word == PLAN else ""
        raise InputError(f"missing CONFIG.py: {PROGRAM} {word} CONFIG.py{example} ({PROGRAM} {word} --help)")
    about, theirs = args[0], []
    named, known = f"{about} {ONLINE}" if ONLINE in args else about, PLANNED[word]
    if named in COMMANDS and named not in known:
        raise InputError(f"{named} cannot be planned; a {word} is about {', '.join(known)}, or a CONFIG.py of these")
    if named in known:
        about, args = named, [token for token in args if token != ONLINE]
    else:
        loaded, theirs = _load(about), [about]
        words = [name for name in known if type(loaded) is COMMANDS[name].options]
        if not words:
            kinds = ", ".join(known)
            raise InputError(
                f"{about}: {type(loaded).__name__} cannot be planned; a {word} takes a CONFIG.py of {kinds}, or one of"
                " these words"
            )
        (about,) = words
    names, others = option_names(word), option_names(about)
    own: list[str] = []
    within = theirs
    for token in args[1:]:
        if _is_option(token):
            name = token.partition("=")[0].lstrip("-").replace("-", "_")
            if name not in names and name not in others:
                guess = _guess(name, [*names, *others], "--")
                raise InputError(f"unknown option {token}{guess} ({PROGRAM} {word} --help, {PROGRAM} {about} --help)")
            within = own if name in names else theirs
        within.append(token)
    training = _parse(about, theirs, open_ended=True)
    return dataclasses.replace(_parse(word, own), training=training)


def _give_way(default: Any, given: set[str], prefix: str = "") -> Any:
    """A CONFIG.py's options without those that others, given on the command line, exclude."""
    for section, *pair in _EXCLUSIVE:
        for name, other in (pair, pair[::-1]):
            if f"{prefix}{section}.{name}" in given and f"{prefix}{section}.{other}" not in given:
                gone = dict.fromkeys((other, *_BESIDE.get(other, ())))
                part = dataclasses.replace(getattr(default, section), **gone)
                default = dataclasses.replace(default, **{section: part})
    for field in dataclasses.fields(default):
        if hasattr(getattr(default, field.name), "train"):  # the run of a recipe's stage
            part = _give_way(getattr(default, field.name), given, f"{prefix}{field.name}.")
            default = dataclasses.replace(default, **{field.name: part})
    return default


def option_names(word: str) -> dict[str, bool]:
    """Every option of a command, with underscores and without dashes -> whether it must be given."""
    command, names = COMMANDS[word], {}
    for prefix, field in _walk(command.options):
        if prefix + field.name not in left_out(command.options):
            name = option(prefix + field.name).removeprefix("--")
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            required |= field.default == config.ON_COMMAND_LINE
            names[name] = required
            if field.type is bool:
                names[negated(name)] = False
    return names


def _walk(cls: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from _walk(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix, field


def _is_option(token: str) -> bool:
    return token.startswith("-") and token.lstrip("-")[:1].isalpha()


def _check_name(word: str, token: str, names: dict[str, bool]) -> str:
    """The option's name as in `names`; raises `InputError` with the nearest name when there is none."""
    name = token.partition("=")[0].lstrip("-").replace("-", "_")
    section, _, own = name.rpartition(".")
    of_rows = section == "data" and "data.columns" in names and name not in names and own != "files"
    if name in left_out(COMMANDS[word].options) or (of_rows and own in config.DataConfig.__dataclass_fields__):
        raise InputError(f"--{name} has no effect in {PROGRAM} {word}: leave it out")
    if name not in names or not token.startswith("--") or token.startswith("---"):
        spelled = token.partition("=")[0]
        raise InputError(f"unknown option {spelled}{_guess(name, names, '--')} ({PROGRAM} {word} --help)")
    return name


def _guess(word: str, known: Any, prefix: str = "") -> str:
    """`; did you mean X?` for the nearest known word, or what another library's word is called here, or nothing."""
    here = [name for name in ELSEWHERE.get(word, ()) if name in known]
    if here or (prefix and word in OTHERWISE):
        told = [f"here that is {prefix}{name}" for name in here[:1]] + [OTHERWISE.get(word, "")]
        return f"; {', '.join(filter(None, told))}"
    near = [name for name in known if name.rpartition(".")[2] == word][:1]  # the option without its section
    near = near or difflib.get_close_matches(word, list(known), n=1, cutoff=GUESS_CUTOFF)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _show_help(word: str, args: list[str]) -> None:
    default, _ = _split_recipe(word, args)
    command = COMMANDS[word]
    about = _CONFIG.get(word, " [CONFIG]" if command.recipe else "")
    places = "".join(f" [{place.upper()}]" for place in command.positional)
    usage = f"{PROGRAM} {word}{about}{places} [OPTIONS]"
    print(help_text(usage, word, command, default))
