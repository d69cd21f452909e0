"""``fastkd recipes``, ``losses``, ``env`` and ``completion``: commands that only print."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path

from fastkd.cli import COMMANDS, parsers
from fastkd.losses.registry import (
    FEATURE_LOSSES,
    LOGIT_LOSSES,
    PROJECTORS,
    Loss,
    Projector,
    find_loss,
    has_temperature,
    options_of,
)
from fastkd.utils.io import printable

_BRACES = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"  # up to three levels
_FRACTION = re.compile(rf"\\frac\s*{_BRACES}\s*{_BRACES}")
_LATEX = {
    r":math:`([^`]*)`": r"\1",
    r"\.\. math::\s*": "    ",
    r"\((\w+)\) / \((\w+)\)": r"(\1/\2)",
    rf"\\overline\s*{_BRACES}": r"mean(\1)",
    r"\\langle": "<",
    r"\\rangle": ">",
    r"\\(left|right|Big|big|mathrm|quad|qquad)(?![a-z])": "",
    r"\\(cdot|odot)": "*",
    r"\\ne(?![a-z])": "!=",
    r"\\\|": "|",
    r"\\[,;! ]|\\\\": " ",
    r"\\([a-z]+)": r"\1",  # sum, log, tau, ...
    r"&=": "=",
    r"([_^])\{([^{}]*)\}": r"\1(\2)",
    r"[{}]|\\": "",
    r"(?<=\S) {2,}": " ",
}
_AIM = re.compile(r"# Aims at: (\d[\d.]* %)")  # in a recipe's first comment; not in all


def configure_recipes(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd recipes``."""
    parser.usage = "fastkd recipes [NAME] [--schema]"
    parser.epilog = """examples:
  fastkd recipes
  fastkd recipes lift_softkd_spectral > mine.yaml"""
    parser.add_argument("name", nargs="?", metavar="NAME", help="recipe to print")
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON schema of a recipe, for editors"
    )
    parser.set_defaults(run=_recipes)


def configure_losses(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd losses``."""
    parser.usage = "fastkd losses [NAME]"
    parser.epilog = """examples:
  fastkd losses
  fastkd losses spectral"""
    parser.add_argument("name", nargs="?", metavar="NAME", help="loss or projector to explain")
    parser.set_defaults(run=_losses)


def configure_env(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd env``."""
    parser.usage = "fastkd env [--variables]"
    parser.epilog = """examples:
  fastkd env
  fastkd env --variables"""
    parser.add_argument(
        "--variables", action="store_true", help="list the environment variables that fastkd reads"
    )
    parser.set_defaults(run=_env)


def configure_completion(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastkd completion``."""
    parser.usage = "fastkd completion {bash,zsh,fish}"
    parser.epilog = """examples:
  eval "$(fastkd completion bash)"     # in ~/.bashrc
  eval "$(fastkd completion zsh)"      # in ~/.zshrc
  fastkd completion fish | source      # in ~/.config/fish/config.fish"""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="shell of the script")
    parser.set_defaults(run=_completion)


def _env(options: argparse.Namespace) -> int:
    from fastkd.ops.environment import report, variables

    print(variables() if options.variables else report())
    return 0


def _completion(options: argparse.Namespace) -> int:
    _, commands = parsers()
    print(_fish(commands) if options.shell == "fish" else _bash(commands, options.shell))
    return 0


def _bash(commands: Mapping[str, argparse.ArgumentParser], shell: str) -> str:
    """A completion function of bash, which zsh can load, too."""
    cases = []
    for name, parser in commands.items():
        for action in parser._actions:
            keys = "|".join(f"{name}:{flag}" for flag in action.option_strings or [""])
            if values := _values(action):
                cases.append(f'{keys}) words="{" ".join(values)}" ;;')
        known = " ".join(flag for action in parser._actions for flag in action.option_strings)
        cases.append(f'{name}:*) flags="{known}" ;;')
    # "command:flag" comes before "command:*", and the first case that matches is taken.
    lines = "\n    ".join(cases)
    zsh = "autoload -U compinit bashcompinit && compinit && bashcompinit\n"
    return f"""{zsh if shell == "zsh" else ""}_fastkd() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" words flags
  [[ "$COMP_CWORD" -eq 2 ]] && previous=""
  case "${{COMP_WORDS[1]}}:$previous" in
    {lines}
  esac
  [[ "$COMP_CWORD" -eq 1 ]] && words="{" ".join(commands)}"
  [[ "$current" == -* ]] && words="$flags"
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _fastkd fastkd"""


def _fish(commands: Mapping[str, argparse.ArgumentParser]) -> str:
    """One line of fish's ``complete`` per command and flag."""
    lines = []
    for name, parser in commands.items():
        first = "-f -n __fish_use_subcommand"
        lines.append(f"complete -c fastkd {first} -a {name} -d '{COMMANDS[name][1]}'")
        for action in parser._actions:
            words = [f"-l {flag[2:]}" for flag in action.option_strings if flag[1] == "-"]
            if values := _values(action):
                words.append(f"-a '{' '.join(values)}'")
            within = f"-n '__fish_seen_subcommand_from {name}'"
            lines += [f"complete -c fastkd {within} {' '.join(words)}"] * bool(words)
    return "\n".join(lines)


def _values(action: argparse.Action) -> list[str]:
    """The words that may follow a flag, as far as they are known."""
    from fastkd.cli.flags import choices_of
    from fastkd.config import Recipe

    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    if action.dest == "recipe":
        return Recipe.names()
    return choices_of(action.dest) if action.dest in Recipe.model_fields else []


def _recipes(options: argparse.Namespace) -> int:
    from fastkd.config import Recipe

    if options.schema:
        print(json.dumps(Recipe.json_schema(), indent=1))
    elif options.name is not None:
        text = Recipe.path(options.name).read_text(encoding="utf-8", errors="backslashreplace")
        print(printable(text, lines=True), end="")
    else:
        for name in Recipe.names():
            print(f"{name:<26} {_aim_and_title(Recipe.path(name))}")
    return 0


def _aim_and_title(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    aim = _AIM.search(text)
    return f"{aim[1] if aim else '-':>8}  {text.splitlines()[0].lstrip('# ')}"


def _losses(options: argparse.Namespace) -> int:
    projectors = {projector.name: projector for projector in PROJECTORS}
    if options.name is None:
        print(_listing())
    elif options.name in projectors:
        print("  ".join(_projector_row(projectors[options.name])))
    else:
        print(_explanation(find_loss(options.name)))
    return 0


def _listing() -> str:
    blocks = {
        "logit losses, --logit-loss": [(x.name, x.summary, x.source) for x in LOGIT_LOSSES],
        "feature losses, --feature-loss": [(x.name, x.summary, x.source) for x in FEATURE_LOSSES],
        "projectors, --projector": [_projector_row(projector) for projector in PROJECTORS],
    }
    lines: list[str] = []
    for heading, rows in blocks.items():
        first, second = (max(len(row[column]) for row in rows) for column in range(2))
        lines.append(heading)
        lines += [f"  {name:<{first}}  {text:<{second}}  {source}" for name, text, source in rows]
        lines.append("")
    return "\n".join([*lines, "fastkd losses NAME explains one: formula, reduction, options."])


def _projector_row(projector: Projector) -> tuple[str, str, str]:
    kept = "stays at inference" if projector.stays else "dropped at inference"
    if not projector.learned:
        kept = "nothing learned"
    return projector.name, f"{projector.summary} ({kept})", projector.source


def _explanation(loss: Loss) -> str:
    cls = loss.load()
    lines = [f"{loss.name}: {loss.summary} ({loss.source})"]
    lines.append(f"as a module: fastkd.losses.{cls.__name__}")
    flag = "--alpha" if loss in LOGIT_LOSSES else "--feature-weight, 0.2 if not given"
    lines.append(f"weight in its source: {loss.weight} ({flag})")
    chosen = ", ".join(f"{name}={value}" for name, value in options_of(loss).items())
    lines.append(f"options: {chosen or 'none'}")
    if loss in LOGIT_LOSSES and has_temperature(loss):
        lines.append("temperature: --tau, a field of its own")
    return "\n".join([*lines, "", _plain_math(inspect.cleandoc(cls.__doc__ or ""))])


def _plain_math(text: str) -> str:
    """Write LaTeX as text: \\frac{a}{b} becomes (a) / (b), \\tau becomes tau."""
    for _ in range(3):  # fractions within fractions
        text = _FRACTION.sub(r"(\1) / (\2)", text)
    for pattern, plain in _LATEX.items():
        text = re.sub(pattern, plain, text)
    return text
