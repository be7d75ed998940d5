"""The `mor` command: arguments to a command of `mor.commands`, and what goes wrong to one line.

Exit codes: 0 done, 2 the user's mistake (one line says what to do), 1 a fault of ours, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

import mor
from mor.commands import COMMANDS, GROUPS
from mor.config import check_choice
from mor.log import print_json, setup_logging
from mor.train.config import read_recipe, recipe_flags

HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a character that the terminal has not is shown as ?
            reconfigure(errors="replace")
    try:
        return _run(args)
    except (Exception, KeyboardInterrupt) as error:
        return _report(error)


def _run(args: list[str]) -> int:
    if not args or args[0] in HELP or (args[0] in GROUPS and args[1:] in [[flag] for flag in HELP]):
        print(_overview(), flush=True)
        return 0
    if args[0] == "--version":
        print(f"mor {mor.__version__}")
        return 0
    setup_logging()
    words = 2 if args[0] in GROUPS else 1
    command, args = " ".join(args[:words]), args[words:]
    if command in GROUPS:
        known = [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{command} ")]
        raise ValueError(f"mor {command} what? give one of {', '.join(known)}")
    check_choice("command", command, list(COMMANDS))
    flags, run = COMMANDS[command]
    parsed = _parse(flags, _with_recipe(command, args), prog=f"mor {command}")
    result = run(parsed)
    if parsed.json:
        print_json(result)
    if result.get("failure"):
        print(f"mor: {result['failure']}", file=sys.stderr)
        return 1
    return 0


def _with_recipe(command: str, args: list[str]) -> list[str]:
    """Put a recipe's fields as flags right behind it, before the user's own flags."""
    if command not in ("train", "plan") or not args or set(HELP).intersection(args):
        return args
    if args[0].startswith("-"):
        raise ValueError(f"{args[0]} stands before the recipe; write mor {command} RECIPE [flags]")
    return [args[0], *recipe_flags(read_recipe(Path(args[0]))), *args[1:]]


def _parse(flags: type, args: list[str], *, prog: str) -> Any:
    """Parse flags; the box in which tyro says what is wrong becomes one line of a ValueError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(flags, args=args, prog=prog)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        error: BaseException | None = stop
        while error is not None:  # a check of ours, if one stands behind it, says it best
            if isinstance(error, ValueError) and _raised_by_us(error):
                raise ValueError(str(error)) from stop
            error = error.__context__
        told = _first_words(said.getvalue())
        unknown = re.match(r"Unrecognized options: (--[^\s,]+)", told)
        near = _nearest(unknown[1], flags, prog) if unknown else None
        hint = f"; did you mean {near}?" if near else ""
        raise ValueError(f"{told}{hint}; see {prog} --help") from stop


def _nearest(flag: str, flags: type, prog: str) -> str | None:
    """Return the flag that an unknown one is most like: of the same last name, if there is one."""
    help_text = io.StringIO()
    with contextlib.redirect_stdout(help_text), contextlib.suppress(SystemExit):
        tyro.cli(flags, args=["--help"], prog=prog)
    known = sorted(set(re.findall(r"--[a-z][\w.-]*", help_text.getvalue())))
    name = flag.partition("=")[0].replace("_", "-")
    last = name.lstrip("-").rpartition(".")[2]
    same = [one for one in known if one.lstrip("-").rpartition(".")[2] == last]
    return next(iter([*same, *difflib.get_close_matches(name, known, n=1)]), None)


def _first_words(box: str) -> str:
    """Return the first section of a box as one line."""
    lines = [re.sub(r"[\u2500-\u257f]|-{3,}", "", line).strip() for line in box.splitlines()]
    sections = " ".join(line or "\n" for line in lines[1:]).split("\n")
    return next(" ".join(section.split()) for section in sections if section.strip())


def _report(error: BaseException) -> int:
    """Say what went wrong and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("\nmor: interrupted", file=sys.stderr)
        return 130
    if type(error).__name__ == "Interrupted":
        print(f"mor: {error}", file=sys.stderr)
        return 130
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, OSError) or (isinstance(error, ValueError) and _raised_by_us(error)):
        print(f"mor: {' '.join(_message(error).split())}", file=sys.stderr)
        return 2
    if _is_out_of_memory(error):
        fix = "lower train.micro-batch-tokens or make the model smaller"
        print(f"mor: there is not enough memory; {fix}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    print("mor: this is a fault of ours; please report it with the lines above", file=sys.stderr)
    return 1


def _raised_by_us(error: BaseException) -> bool:
    """Tell a check of ours from a ValueError that a library, or Python, raised on a bug of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not Path(frames[-1].filename).is_relative_to(Path(mor.__file__).parent):
        return False
    return (frames[-1].line or "raise").startswith("raise")  # or zip(.., strict=True) said it


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        fix = _FIXES.get(error.errno or 0)
        return f"{error.filename or 'output'}: {error.strerror}" + (f"; {fix}" if fix else "")
    return str(error)


_FIXES = {
    errno.ENOENT: "give a path that exists",
    errno.ENOSPC: "free some space or write to another disk",
    errno.EDQUOT: "free some space or write to another disk",
    errno.EACCES: "change its permissions or give another path",
    errno.EPERM: "change its permissions or give another path",
    errno.EROFS: "write to another disk",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "give a folder",
}


def _is_out_of_memory(error: BaseException) -> bool:
    """Recognise what PyTorch raises on a GPU and, as a plain RuntimeError, on a CPU."""
    texts = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (
            type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in texts)
        )
    )


def _overview() -> str:
    lines = ["usage: mor COMMAND [options]     (mor COMMAND --help tells more)", ""]
    for name, (flags, _) in COMMANDS.items():
        first = (flags.__doc__ or "").strip().split("\n")[0]
        lines.append(f"  {name:<15}{first}")
    return "\n".join(lines)
