"""`--config FILE.yaml` of every command: its own options in a file. What is typed beats the file.

Keys are the names of options without their dashes, and `ref`, `aligned` and the like for what stands without a name;
lists are for what may be repeated, or separated by commas. The values become click's `default_map`, so that they go
through the same checks as typed ones.
"""

from __future__ import annotations

import difflib
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
import yaml

from ..files.atomic import write_atomically
from . import mergekit
from .help import where
from .show import in_plain_words

OWN = ("config", "help")  # options that no file sets
_PASSWORD = re.compile(r"(?<=://)[^/?#\s]*@")
_QUERY = re.compile(r"(?<=://)([^?#\s]*)\?[^#\s]*")


def with_config(command: Callable[..., None]) -> Callable[..., None]:
    """The command with `--config`."""
    hints = get_type_hints(command, include_extras=True)
    kinds = {name: get_args(hint)[0] for name, hint in hints.items() if get_args(hint)}
    listed = [name for name, kind in kinds.items() if str in (kind, *get_args(kind))]

    def read(context: typer.Context, file: Path | None) -> Path | None:
        """Take the options in a file as defaults of those that are not typed."""
        if file is not None:
            try:
                content = _loaded(file, context.info_name)
            except ValueError as error:
                raise typer.BadParameter(f"{file}: {error}", param_hint="--config") from None
            context.default_map, problems = _values(content, context, listed)
            if problems:
                raise typer.BadParameter(f"{file}: {'; also: '.join(problems)}", param_hint="--config")
        return file

    told = "YAML of options, needed ones too; typed ones beat it."
    kind = Annotated[Path | None, where("--config", metavar="FILE", callback=read, is_eager=True, help=told)]
    only = inspect.Parameter.KEYWORD_ONLY
    own = [
        inspect.Parameter("config", only, default=None, annotation=kind),
        inspect.Parameter("context", only, annotation=typer.Context),
    ]
    given = [p.replace(annotation=hints[p.name]) for p in inspect.signature(command).parameters.values()]
    given = [p.replace(kind=only) for p in given if p.name != "context"]

    def run(context: typer.Context, config: Path | None = None, **values: Any) -> None:
        try:
            command(**values, **({"context": context} if "context" in hints else {}))
        except typer.BadParameter as error:
            if config and _is_set_by_file(context, str(error.param_hint)):
                error.message = f"{config}: {error.message}"
            raise

    run.__signature__ = inspect.Signature([*given, *own])
    run.__annotations__ = {p.name: p.annotation for p in (*given, *own)}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def command_line(context: typer.Context) -> str:
    """The command that was given, with the options of a file as if they had been typed, and no address's secrets."""
    if context.params.get("config") is None:
        return shlex.join(["dera-merge", *map(_public, sys.argv[1:])])
    words, behind = ["dera-merge", str(context.info_name)], []
    for parameter in context.command.params:
        value, source = context.params.get(parameter.name), context.get_parameter_source(parameter.name)
        if parameter.name in OWN or source is None or source.name == "DEFAULT":
            continue
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif getattr(parameter, "is_flag", False):
            behind += parameter.opts[:1] if value else parameter.secondary_opts[:1]
        else:
            values = value if isinstance(value, list | tuple) else [value]
            behind += [word for each in values for word in (max(parameter.opts, key=len), str(each))]
    return shlex.join(map(_public, [*words, *behind]))


def _public(word: str) -> str:
    """A word without what may be a password or a key in an address: `https://host/v1?…`."""
    return _QUERY.sub(r"\1?…", _PASSWORD.sub("", word))


def write_recipe(context: typer.Context, file: Path) -> Path:
    """Write down the options that a command runs with, so that `--config` gives them again; returns the file."""
    content = {
        _key(parameter): str(value) if isinstance(value, Path) else _without_secrets(value)
        for parameter in context.command.params
        if parameter.name not in (*OWN, "as_json")
        and (value := context.params.get(parameter.name)) not in (None, [], ())
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
    write_atomically(file, f"# dera-merge {context.info_name} --config {file}\n{text}".encode())
    return file


def _without_secrets(value: Any) -> Any:
    """As `_public`, of what an option has."""
    if isinstance(value, list | tuple):
        return [_without_secrets(each) for each in value]
    return _public(value) if isinstance(value, str) else value


def _loaded(file: Path, command: str | None) -> dict[Any, Any]:
    """The content of a recipe. Raises ValueError where it is none."""
    try:
        content = yaml.safe_load(file.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError("holds no options; it is to be NAME: VALUE, line by line")
    if not mergekit.is_one(content):
        return content
    if command != "merge":
        raise ValueError("is a file of mergekit, which merge reads")
    return mergekit.options_of(content)


def _is_set_by_file(context: typer.Context, hint: str) -> bool:
    """Whether one of the options that an error is about has its value from a file."""
    named = re.split(r"[ ,]+", hint)
    about = [parameter.name for parameter in context.command.params if {*parameter.opts} & {*named}]
    return any(source and source.name == "DEFAULT_MAP" for source in map(context.get_parameter_source, about))


def _values(content: dict[Any, Any], context: typer.Context, listed: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What a recipe sets, and what is wrong with it: unknown keys, and values that are not what their options take.

    Args:
        listed: names of parameters that are texts, which may be lists separated by commas.

    Returns:
        Texts and lists of texts by the names that click has for parameters; and a sentence for each problem.
    """
    known: dict[str, list[Any]] = {}
    for parameter in context.command.params:
        if parameter.name not in OWN:
            known.setdefault(_key(parameter), []).append(parameter)
    values: dict[str, Any] = {}
    problems: list[str] = []
    strange = None  # the last problem with a key that is near none
    for name, value in content.items():
        key = str(name).replace("_", "-")
        if key not in known:
            near = ", ".join(difflib.get_close_matches(key, known, 3))
            strange = strange if near else len(problems)
            problems.append(f"{str(name)!r} is no option of this command" + (f"; near are {near}" if near else ""))
            continue
        first, *others = known[key]
        several = bool(others) and isinstance(value, list)  # ALIGNED, and --aligned for more of them
        parts = [(first, value[0]), (others[0], value[1:])] if several and value else [(first, value)]
        for parameter, part in parts:
            try:
                if part is not None:
                    values[parameter.name] = _taken(parameter, key, part, listed)
                    if parameter.callback is None:
                        parameter.process_value(context, values[parameter.name])
            except (ValueError, typer.BadParameter) as error:
                problems.append(error.format_message() if isinstance(error, typer.BadParameter) else str(error))
    if strange is not None:
        problems[strange] += f"; it has {', '.join(sorted(known))}"
    return values, [in_plain_words(problem) for problem in problems]


def _key(parameter: Any) -> str:
    """What a file calls a parameter: an option's long name, an argument's name in small letters."""
    if parameter.param_type_name == "argument":
        return (parameter.metavar or parameter.name).lower().replace("_", "-")
    return max(parameter.opts, key=len).lstrip("-")


def _taken(parameter: Any, key: str, value: Any, listed: Sequence[str]) -> Any:
    """A value as the command line would bring it. Raises ValueError where its option takes no such thing."""
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise ValueError(f"{key} is on or off: write true or false")
        return value
    parts = [_text(part, key) for part in (value if isinstance(value, list) else [value])]
    if getattr(parameter, "multiple", False):
        return parts
    if not parts or (len(parts) > 1 and (parameter.name not in listed or parameter.param_type_name == "argument")):
        raise ValueError(f"{key} takes one value")
    return ",".join(parts)


def _text(value: Any, key: str) -> str:
    """A value as it would be typed. Raises ValueError where it is no text or number."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    takes = f"{key} takes a text or a number"
    if isinstance(value, bool):
        raise ValueError(f"{takes}, not true or false (so YAML reads yes, no, on, off); put a text in quotes")
    raise ValueError(f"{takes}, not NAME: VALUE" if isinstance(value, dict) else f"{takes}; put a text in quotes")
