"""What completes words of `dpo-jax` in a shell, written as a script of the shell itself: it answers at once."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, get_args, get_origin

from dpo_jax.config.command_line.help import VOICE, shown
from dpo_jax.config.command_line.shipped import load, shipped
from dpo_jax.config.command_line.words import BENCH, COMMANDS, GROUPS, ONLINE, PLAN, PLANNED
from dpo_jax.config.sections import LINEAR_LAYERS
from dpo_jax.config.training.dpo import Loss
from dpo_jax.config.values import negated

_BASH = """\
# Completion of dpo-jax, printed by `dpo-jax completion {shell}`.
{before}_dpo_jax() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" word="${{COMP_WORDS[1]}}" about="" place=2 at=$(( COMP_CWORD - 1 ))
  local options="" values="" several="" name="" passed=0 prefix="" each
  case "$word" in {groups}) word="$word ${{COMP_WORDS[2]}}"; place=3;; esac
  case "$word" in {about}) about="${{COMP_WORDS[2]}}";; esac
  for each in "${{COMP_WORDS[@]}}"; do
    [ "$each" = {online} ] || continue
    [ "$word" != dpo ] || word="dpo {online}"
    [ "$about" != dpo ] || about="dpo {online}"
  done
  case "$current" in
    =) current="";;
    --*=*) name="${{current%%=*}}"; prefix="$name="; current="${{current#*=}}";;
  esac
  while [ -z "$name" ] && (( at >= place )); do
    case "${{COMP_WORDS[at]}}" in --[a-z]*) name="${{COMP_WORDS[at]}}";; =) ;; *) passed=$(( passed + 1 ));; esac
    at=$(( at - 1 ))
  done
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then
    values="{words} --help --version"
  elif (( COMP_CWORD < place )); then
    case "$word" in
{second}
    esac
  else
    for each in "$word" "$about"; do
      case "$each" in
{options}
      esac
      case "$each $name" in
{values}
      esac
    done
    if [ -z "$name" ]; then
      case "$word $passed ${{COMP_WORDS[place]}}" in
{places}
      esac
    elif (( passed )) && [ -z "$several" ]; then
      values="$options"
    fi
  fi
  case "$prefix$current" in -*) [ -n "$prefix" ] || values="$options";; esac
  COMPREPLY=( $(compgen -P "$prefix" -W "$values" -- "$current") )
}}
complete -o default -F _dpo_jax dpo-jax
"""
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"

_FISH = """\
# Completion of dpo-jax, printed by `dpo-jax completion fish`.
function __dpo_jax
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l word "$words[2]"
    set -l about ''
    set -l place 3
    set -l options
    set -l values
    set -l several ''
    set -l name ''
    set -l prefix ''
    set -l passed 0
    if test (count $words) -lt 2
        printf '%s\\n' {words} --help --version
        return
    end
    if contains -- $word {groups}
        if test (count $words) -lt 3
            switch $word
{second}
            end
            printf '%s\\n' $values
            return
        end
        set word "$word $words[3]"
        set place 4
    else if contains -- $word {about}
        set about "$words[3]"
    end
    if contains -- {online} $words
        test "$word" = dpo; and set word 'dpo {online}'
        test "$about" = dpo; and set about 'dpo {online}'
    end
    if string match -qr '^--[^=]+=' -- $current
        set name (string replace -r '=.*' '' -- $current)
        set prefix "$name="
    end
    set -l at (count $words)
    while test -z "$name" -a $at -ge $place
        if string match -qr '^--[a-z]' -- $words[$at]
            set name $words[$at]
        else
            set passed (math $passed + 1)
        end
        set at (math $at - 1)
    end
    for each in $word $about
        switch $each
{options}
        end
        switch "$each $name"
{values}
        end
    end
    if test -z "$name"
        switch "$word $passed $words[$place]"
{places}
        end
    else if test $passed -gt 0 -a -z "$several"
        set values $options
    end
    if string match -q -- '-*' "$current"; and test -z "$prefix"
        set values $options
    end
    test (count $values) -eq 0; or printf "$prefix%s\\n" $values
end
complete -c dpo-jax -a '(__dpo_jax)'
"""

_NAMES: Mapping[str, tuple[str, ...]] = {"dpo.loss": get_args(Loss), "lora.targets": LINEAR_LAYERS}
"""Values of options that are texts for another reason: several stand in one, or it is refused with a reason."""


class _Case(NamedTuple):
    """A branch of a shell's `case`."""

    keys: tuple[str, ...]
    """What leads to it; `*` is any text."""
    name: str
    """The variable that words are added to."""
    words: tuple[str, ...]
    """These words."""
    several: bool = False
    """Whether more of them may follow the first."""

    def bash(self) -> str:
        """For bash and zsh."""
        keys = "|".join("*".join(f"'{part}'" if part else "" for part in key.split("*")) for key in self.keys)
        value = f'{self.name}="${self.name} {" ".join(self.words)}"' + ("; several=1" if self.several else "")
        return f"        {keys}) {value};;"

    def fish(self) -> str:
        """For fish."""
        more = "; set several 1" if self.several else ""
        keys, words = " ".join(f"'{key}'" for key in self.keys), " ".join(self.words)
        return f"            case {keys}\n                set -a {self.name} {words}{more}"


def script(shell: str) -> str:
    """The completion script of a shell, "bash", "zsh" or "fish": commands, their options, the values that can be
    counted (behind a blank or `=`), the recipes that a command takes, and files.
    """
    groups = {group: tuple(word.split()[1] for word in COMMANDS if word.startswith(f"{group} ")) for group in GROUPS}
    second = [_Case((f"{group}{'' if shell == 'fish' else ' *'}",), "values", names) for group, names in groups.items()]
    tables = {"second": second, "options": list(_options()), "values": list(_values()), "places": list(_places())}
    parts = {
        name: "\n".join(getattr(case, "fish" if shell == "fish" else "bash")() for case in cases)
        for name, cases in tables.items()
    }
    parts |= {"words": " ".join(dict.fromkeys(word.split()[0] for word in COMMANDS)), "online": ONLINE}
    if shell == "fish":
        return _FISH.format(groups=" ".join(GROUPS), about=f"{PLAN} {BENCH}", **parts)
    before = _ZSH if shell == "zsh" else ""
    return _BASH.format(shell=shell, before=before, groups="|".join(GROUPS), about=f"{PLAN}|{BENCH}", **parts)


def _options() -> Iterator[_Case]:
    for word, command in COMMANDS.items():
        names = [
            f"--{name}"
            for one in shown(command.options)
            for name in (one.name, *([negated(one.name)] * (one.kind is bool)))
        ]
        spoken = [] if command.silent else [f"--{name}" for name in VOICE if f"--{name}" not in names]
        more = [ONLINE] if f"{word} {ONLINE}" in COMMANDS else []
        yield _Case((word,), "options", (*names, *more, *spoken, "--help"))


def _values() -> Iterator[_Case]:
    for word, command in COMMANDS.items():
        by_choices: dict[tuple[tuple[str, ...], bool], list[str]] = {}
        for one in shown(command.options):
            named = next((names for end, names in _NAMES.items() if f".{one.name}".endswith(f".{end}")), ())
            if choices := one.choices or named or (("true", "false") if one.kind is bool else ()):
                several = get_origin(one.kind) is tuple
                by_choices.setdefault((choices, several), []).append(f"{word} --{one.name}")
        for (choices, several), keys in by_choices.items():
            yield _Case(tuple(keys), "values", choices, several)


def _places() -> Iterator[_Case]:
    """What may stand, without an option's name, behind a word: `word`, how many stand there, the first of them."""
    by_class: dict[type, list[str]] = {}
    for name in shipped():
        by_class.setdefault(type(load(name)), []).append(name)
    for word, command in COMMANDS.items():
        if command.recipe:
            yield from _first([word], by_class.get(command.options, ()))
        for place in (one for one in shown(command.options) if command.positional[:1] == (one.name,)):
            yield from _first([word], place.choices)
    for word, about in PLANNED.items():
        planned = [COMMANDS[name].options for name in about]
        plain = [name for name in about if " " not in name]
        yield from _first([word], [*plain, *(name for cls in planned for name in by_class.get(cls, ()))])
    yield _Case(("configs 1 show", "configs 1 copy"), "values", tuple(shipped()))


def _first(words: Iterable[str], names: Iterable[str]) -> Iterator[_Case]:
    if found := tuple(names):
        yield _Case(tuple(f"{word} 0 *" for word in words), "values", found)
