"""Prompts by domain: real text that comes with every Python."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from vllm_bebop.errors import UserError

BUILTIN_DOMAINS = ("code", "prose")

_MAX_CHARS = 8000  # of a built-in text: far more than a prompt takes
_MIN_CHARS = 600
_NO_LIBRARY = {"site-packages", "test", "tests", "idlelib", "turtledemo", "pydoc_data", "encodings", "lib2to3"}


class PromptError(UserError):
    """A domain that gives no usable prompts, which the message names."""


def builtin_texts(domain: str, count: int, seed: int = 0) -> list[str]:
    """`count` different texts from this Python's library; the same seed and Python give the same ones.

    "code" starts at a function or class of a standard-library module; "prose" is its documentation, by turns a topic
    of the language reference (what `help()` prints) and a module's docstring.
    Raises:
        PromptError: no such domain, or fewer texts than asked for.
    """
    rng = random.Random(f"{seed} {domain}")
    if domain == "code":
        found = _definitions(rng)
    elif domain == "prose":
        found = _documentation(rng)
    else:
        raise PromptError(f"no built-in domain {domain!r}; there are {', '.join(BUILTIN_DOMAINS)}")
    texts = [text for _, text in zip(range(count), found, strict=False)]
    if len(texts) < count:
        raise PromptError(f"domain {domain!r} has {len(texts)} texts in this Python, {count} are asked for")
    return texts


def _definitions(rng: random.Random) -> Iterator[str]:
    """From each module, in random order, the source from one of its functions or classes on."""
    for source, tree in _modules(rng):
        lines = source.splitlines(keepends=True)
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        starts = [node.lineno - 1 for node in tree.body if isinstance(node, kinds)]
        candidates = [text for start in starts if len(text := "".join(lines[start:])[:_MAX_CHARS]) >= _MIN_CHARS]
        if candidates:
            yield rng.choice(candidates)


def _documentation(rng: random.Random) -> Iterator[str]:
    """By turns a topic and a module's docstring, each from the start of a paragraph on."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    rng.shuffle(names)
    docstrings = (text for _, tree in _modules(rng) if (text := ast.get_docstring(tree)))
    for pair in zip((topics[name] for name in names), docstrings, strict=False):
        for text in map(_running_text, pair):
            if len(text) >= _MIN_CHARS:
                starts = text[: len(text) - _MIN_CHARS].count("\n\n")
                yield "\n\n".join(text.split("\n\n")[rng.randint(0, starts) :])[:_MAX_CHARS]


def _running_text(text: str) -> str:
    """Paragraphs with their lines joined; whatever is indented or underlined keeps its lines."""
    paragraphs = (paragraph.strip("\n") for paragraph in re.split(r"\n\s*\n", text))
    flat = (p if re.search(r"^\s|^[-=*~+]{3,}", p, re.MULTILINE) else p.replace("\n", " ") for p in paragraphs)
    return "\n\n".join(p for p in flat if p.strip())


def _modules(rng: random.Random) -> Iterator[tuple[str, ast.Module]]:
    """Source and syntax tree of every module of the standard library, in random order."""
    paths = sorted(_library(Path(sysconfig.get_paths()["stdlib"])))
    rng.shuffle(paths)
    for path in paths:
        try:
            with tokenize.open(path) as file:
                source = file.read()
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        yield source, tree


def _library(folder: Path) -> Iterator[Path]:
    """Python files below `folder`, without tests, programs and character tables."""
    for path in folder.iterdir():
        # _sysconfigdata and config-* record the build, and name the machine that it was made on.
        if path.name in _NO_LIBRARY or path.name.startswith(("_sysconfigdata", "config-")):
            continue
        if path.suffix == ".py":
            yield path
        elif path.is_dir():
            yield from _library(path)
