"""Options as flags of the command line: each field of a dataclass, and of those within it, is one flag; --help lists
those of one `Group` together.

Knows dataclasses and tyro, and reads help texts from the source; does not know what any option means.
"""

import ast
import dataclasses
import functools
import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import tyro

from diffusion_policy.config import Group, as_kind, kinds_of, refuse_others

T = TypeVar("T")


@dataclass(frozen=True)
class Flag:
    """One option as --help shows it."""

    name: str
    hint: Any
    """Its type, with what tyro is told beside it."""
    default: Any
    """tyro.MISSING where it must be given."""
    help: str
    title: str
    """Of the group that it stands in; empty for none."""


def list_flags(kind: type, defaults: object = None, title: str = "") -> Iterator[Flag]:
    """The flags of a dataclass, in the order of its fields; `defaults`: an instance that says other defaults."""
    hints, texts = get_type_hints(kind, include_extras=True), read_docstrings(kind)
    for option in dataclasses.fields(kind):
        hint = hints[option.name]
        title = next((mark.title for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Group)), title)
        default = default_of(option) if defaults is None else getattr(defaults, option.name)
        kinds = kinds_of(get_args(hint)[0] if hasattr(hint, "__metadata__") else hint)
        if kinds:
            yield Flag(option.name, Literal[tuple(kinds)], default.kind, texts.get(option.name, ""), title)
            yield from _list_flags_of_kinds(kinds, default, title)
        elif is_options(default):
            yield from list_flags(type(default), default, title)
        else:
            yield Flag(option.name, hint, default, texts.get(option.name, ""), title)


def _list_flags_of_kinds(kinds: Mapping[str, Any], defaults: object, title: str) -> Iterator[Flag]:
    """The flags of several dataclasses, of which one is chosen; what is called alike is one flag."""
    seen: set[str] = set()
    for kind in kinds.values():
        for flag in list_flags(kind, as_kind(defaults, kind), title):
            if flag.name not in seen:
                yield flag
            seen.add(flag.name)


BARE: Any = {"kw_only": True, "repr": False, "eq": False, "match_args": False}
"""What else dataclasses generate would take half of the time of reading a command line."""
NO_DOC = " "
"""Where the docstring is empty, dataclasses write one from the signature, which takes as long."""


def make_form(kind: type, defaults: object = None) -> type:
    """A dataclass for tyro with the flags of `kind`, in which those of one group are a dataclass of their own. Its
    fields are strings, numbers, paths and tuples only, so nothing is checked before `fill_in`."""
    groups: dict[str, list[tuple[str, Any, Any]]] = {"": []}
    for flag in list_flags(kind, defaults):
        hint = Annotated[flag.hint, tyro.conf.arg(help=flag.help)]
        groups.setdefault(flag.title, []).append((flag.name, hint, field(default=flag.default)))
    members = groups.pop("")
    for title, flags in groups.items():
        group = make_dataclass(f"{kind.__name__}_{title}", flags, **BARE, namespace={"__doc__": NO_DOC})
        without_help = field(metadata={"help": ""})  # where there is none, tyro reads source files to find some
        members.append((title, tyro.conf.OmitArgPrefixes[group], without_help))  # pyright: ignore[reportArgumentType]
    return make_dataclass(kind.__name__, members, **BARE, namespace={"__doc__": inspect.cleandoc(kind.__doc__ or "")})


def fill_in(kind: type[T], form: object, defaults: object = None, given: Collection[str] = ()) -> T:
    """The options that a form says; `given`: names of those that were given, not left at their defaults. Raises
    ConfigError for options that cannot work, and for given ones of another kind than the chosen one."""
    return _build(kind, dict(_flat(form)), defaults, given)


def _flat(form: Any) -> Iterator[tuple[str, Any]]:
    for member in dataclasses.fields(form):
        value = getattr(form, member.name)
        if dataclasses.is_dataclass(value):
            yield from _flat(value)
        else:
            yield member.name, value


def _build(kind: type[T], values: Mapping[str, Any], defaults: object, given: Collection[str]) -> T:
    found, hints = {}, get_type_hints(kind)
    for option in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        default = default_of(option) if defaults is None else getattr(defaults, option.name)
        if kinds := kinds_of(hints[option.name]):
            chosen = kinds[values[option.name]]
            refuse_others(chosen, kinds, given)
            default = as_kind(default, chosen)
        found[option.name] = (
            _build(type(default), values, default, given) if is_options(default) else values[option.name]
        )
    return kind(**found)


def default_of(option: dataclasses.Field) -> Any:
    """The default of a field; tyro.MISSING where it has none."""
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return tyro.MISSING if option.default is dataclasses.MISSING else option.default


def is_options(value: object) -> bool:
    """Whether it is a dataclass of options, whose fields are flags of their own."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def read_docstrings(kind: type) -> dict[str, str]:
    """{field: the text under it} of a dataclass and of those that it extends, each on one line."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            texts |= _docstrings_of_file(inspect.getfile(base)).get(base.__name__, {})
    return texts


@functools.cache
def _docstrings_of_file(path: str) -> dict[str, dict[str, str]]:
    """{class: {field: the text under it}}."""
    found = {}
    for node in ast.parse(Path(path).read_bytes()).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = dict(_docstrings_of_class(node))
    return found


def _docstrings_of_class(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for line, below in zip(node.body, node.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(below, ast.Expr):
            text = below.value.value if isinstance(below.value, ast.Constant) else None
            if isinstance(text, str):
                yield line.target.id, " ".join(text.split())
