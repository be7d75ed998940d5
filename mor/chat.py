"""`mor chat`: a conversation with a model folder, in the terminal or through a pipe.

Each turn the whole conversation is a prompt; the prefix cache has all of it but what is new.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mor.chat_template import ChatTemplate
from mor.engine.engine import Engine
from mor.engine.outputs import RequestOutput
from mor.engine.params import SamplingParams
from mor.log import logger
from mor.write import Printer

HELP = "/reset forgets the conversation, /depth N or auto sets the recursions, /quit or Ctrl-D ends"


class Chat:
    """A conversation: its messages, and how the next answer is drawn."""

    def __init__(
        self,
        engine: Engine,
        template: ChatTemplate,
        params: SamplingParams,
        *,
        system: str = "",
        show_depth: bool = False,
        quiet: bool = False,
    ) -> None:
        self.engine = engine
        self.template = template
        self.params = dataclasses.replace(params, stop=(*params.stop_strings, *template.stop), n=1)
        self.start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.start)
        self.show_depth = show_depth
        self.quiet = quiet
        self.turns: list[dict[str, Any]] = []

    def say(self, text: str) -> dict[str, Any]:
        """Answer a message, streamed unless quiet; Ctrl-C ends the answer and keeps what is there.

        Raises ValueError when the message alone exceeds the context
        """
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._prompt()
            output, is_stopped = self._answer(ids)
        except ValueError:
            self.messages.pop()
            raise
        answer = output.outputs[0]
        content = answer.text.strip() if self.template.is_plain else answer.text
        self.messages.append({"role": "assistant", "content": content})
        turn = {
            "user": text,
            "text": content,
            "depths": answer.depths,
            "mean_depth": output.mean_depth,
            "flops_saved": output.flops_saved,
            "num_prompt_tokens": len(ids),
            "num_cached_tokens": output.num_cached_tokens,
            "finish_reason": "interrupt" if is_stopped else answer.finish_reason,
        }
        self.turns.append(turn)
        return turn

    def _prompt(self) -> list[int]:
        """Encode the conversation; while it leaves no room for an answer, drop its oldest turns."""
        context = self.engine.max_model_len
        wanted = min(self.params.max_tokens or context // 4, context // 4)
        dropped = 0
        while True:
            ids = self.template.encode(self.messages)
            bos = self.engine.model.config.bos_token_id
            if self.template.is_plain and bos is not None:
                ids = [bos, *ids]
            first = len(self.start)
            if len(ids) + wanted <= context or len(self.messages) - first < 3:
                break
            del self.messages[first : first + 2]
            dropped += 1
        if dropped:
            logger.info("the context of %d tokens is full: the oldest turns went", context)
        return ids

    def _answer(self, ids: list[int]) -> tuple[RequestOutput, bool]:
        request_id = self.engine.add(ids, self.params)
        printer = Printer(self.show_depth, self.quiet, self.engine.model.config.num_recursions)
        if self.show_depth:
            printer.skip(len(ids))
        try:
            with _held_interrupt() as interrupt:
                while not self.engine.is_done(request_id):
                    for piece in self.engine.step():
                        printer.take(piece)
                    if interrupt:
                        self.engine.abort(request_id)
            output = self.engine.result(request_id)
        finally:
            self.engine.forget(request_id)
            printer.end()
        if output.outputs[0].error is not None:
            raise ValueError(output.outputs[0].error)
        return output, bool(interrupt)

    def command(self, line: str) -> bool:
        """Carry out a line that begins with a slash; False ends the program."""
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return False
        if word == "/reset":
            self.messages = list(self.start)
            logger.info("the conversation is forgotten")
        elif word == "/depth":
            self._set_depth(rest.strip())
        else:
            logger.info(HELP)
        return True

    def _set_depth(self, text: str) -> None:
        most = self.engine.model.config.num_recursions
        if text == "auto":
            depth = None
        elif text.isdecimal() and 1 <= int(text) <= most:
            depth = int(text)
        else:
            logger.info("depth %r is none; give 1 to %d, or auto", text, most)
            return
        self.params = dataclasses.replace(self.params, max_recursions=depth)
        logger.info("every token now takes %s recursions at most", depth or most)


def chat(
    folder: Path,
    engine: Engine,
    params: SamplingParams,
    *,
    system: str,
    show_depth: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Talk until the input ends; returns the turns."""
    assert engine.tokenizer is not None
    template = ChatTemplate.load(
        folder, engine.tokenizer, bos_token_id=engine.model.config.bos_token_id
    )
    if template.is_plain:
        logger.info("the model has no chat template: turns are written as User and Assistant")
    talk = Chat(engine, template, params, system=system, show_depth=show_depth, quiet=quiet)
    if sys.stdin.isatty():
        logger.info(HELP)
    for line in _lines():
        if line.startswith("/"):
            if not talk.command(line):
                break
            continue
        try:
            talk.say(line)
        except ValueError as error:
            logger.warning("%s", error)
    depths = [turn["mean_depth"] for turn in talk.turns]
    return {
        "turns": talk.turns,
        "mean_depth": sum(depths) / len(depths) if depths else 0.0,
    }


def _lines() -> Iterator[str]:
    """Yield what the user types, until the end of the input or Ctrl-C at an empty prompt."""
    if not sys.stdin.isatty():
        reconfigure = getattr(sys.stdin, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
        return
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (gives input() its line editing)

    while True:
        try:
            prompt = "> " if sys.stdout.isatty() else ""
            if not prompt:  # stdout is for the answers, or for JSON
                print("> ", end="", file=sys.stderr, flush=True)
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if line:
            yield line


@contextmanager
def _held_interrupt() -> Iterator[list[int]]:
    """Note Ctrl-C in a list instead of raising in the middle of a tick."""
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
