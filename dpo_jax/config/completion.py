"""What completes words of `dpo-jax` in a shell, written as a script of the shell itself: it answers at once."""

from collections.abc import Iterable

from dpo_jax import config
from dpo_jax.config.help import VOICE, shown
from dpo_jax.config.shipped import shipped
from dpo_jax.config.values import negated
from dpo_jax.config.words import COMMANDS, GROUPS, ONLINE

_SCRIPT = """\
# Completion of dpo-jax, printed by `dpo-jax completion {shell}`.
{before}_dpo_jax() {{
  local word="${{COMP_WORDS[1]}}" current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
  local options="" values="" place=2
  case "$word" in {groups}) word="$word ${{COMP_WORDS[2]}}"; place=3;; esac
  case " ${{COMP_WORDS[*]}} " in *" {online} "*) word="$word {online}";; esac
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then
    values="{words} --help --version"
  elif (( COMP_CWORD < place )); then
    case "${{COMP_WORDS[1]}}" in
{second}
    esac
  else
    case "$word" in
{options}
    esac
    case "$word $before" in
{values}
    esac
    if (( COMP_CWORD == place )); then
      case "$word" in
{recipes}
      esac
    fi
  fi
  case "$current" in -*) values="$options" ;; esac
  COMPREPLY=( $(compgen -W "$values" -- "$current") )
}}
complete -o default -F _dpo_jax dpo-jax
"""
_BEFORE = {"bash": "", "zsh": "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"}


def script(shell: str) -> str:
    """The completion script of a shell, "bash" or "zsh": commands, their options, the values that can be counted, the
    shipped recipes, and files."""
    groups = {group: [word.split()[1] for word in COMMANDS if word.startswith(f"{group} ")] for group in GROUPS}
    options, values, recipes = [], [], []
    for word, command in COMMANDS.items():
        every = list(shown(getattr(config, command.options), command.unused))
        names = [f"--{name}" for one in every for name in (one.name, *([negated(one.name)] * (one.kind is bool)))]
        spoken = [] if command.silent else [f"--{name}" for name in VOICE if f"--{name}" not in names]
        more = [ONLINE] if f"{word} {ONLINE}" in COMMANDS else []
        options.append(_case([word], "options", [*names, *more, *spoken, "--help"]))
        if command.positional:
            places = [one for one in every if one.name == command.positional[0]]
            recipes += [_case([word], "values", one.choices) for one in places]
        by_choices: dict[tuple[str, ...], list[str]] = {}
        for one in every:
            if one.choices:
                by_choices.setdefault(one.choices, []).append(f"{word} --{one.name}")
        values += [_case(keys, "values", choices) for choices, keys in by_choices.items()]
    taking = [word for word, command in COMMANDS.items() if command.recipe]
    recipes.append(_case([*taking, "plan", "bench"], "values", shipped()))
    return _SCRIPT.format(
        shell=shell,
        before=_BEFORE[shell],
        groups="|".join(GROUPS),
        online=ONLINE,
        words=" ".join(dict.fromkeys(word.split()[0] for word in COMMANDS)),
        second="\n".join(_case([group], "values", names) for group, names in groups.items()),
        options="\n".join(options),
        values="\n".join(values),
        recipes="\n".join(recipes),
    )


def _case(keys: Iterable[str], name: str, words: Iterable[str]) -> str:
    patterns = "|".join(f"'{key}'" for key in keys)
    return f'      {patterns}) {name}="{" ".join(words)}";;'
