"""The engine: depth-wise continuous batching. A step is schedule, run, update.

    add() -> waiting -> schedule() -> prelude -> block, once a tick -> coda -> sample -> output

Rows of all depths share a call of the block; a token that leaves costs nothing further. Prompts,
cache writes and sampling are part of every step.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mor.checkpoint import load_calibration, load_model
from mor.engine.blocks import BlockManager, Layout
from mor.engine.captured import CapturedTicks
from mor.engine.coda import PeriodChooser
from mor.engine.config import EngineConfig
from mor.engine.core import Flight, Request
from mor.engine.groups import build_captured, build_groups, build_runner
from mor.engine.intake import Intake, Prompt
from mor.engine.outputs import RequestOutput, StepOutput, output_of
from mor.engine.params import SamplingParams
from mor.engine.prefix import PrefixCache
from mor.engine.runner import Finished
from mor.engine.sampler import Sampler, TokenLogprobs, token_logprobs
from mor.engine.scheduler import Scheduler
from mor.log import progress
from mor.model.mor import MoR
from mor.tokenizer import Tokenizer

OnOutput = Callable[[StepOutput], None]


class Engine:
    """Runs many requests at a time on one model. Not thread-safe: one thread steps it.

    model        in evaluation mode, on its device
    tokenizer    for text prompts, text out and stop strings; ids work without
    calibration  logit quantiles of the model folder, for target depths
    Raises       ValueError for keys and values of the strategy `hybrid`, and for sizes that do not
                 fit
    """

    def __init__(
        self,
        model: MoR,
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        calibration: dict[str, Any] | None = None,
    ) -> None:
        self.model = model.eval()
        config = config or EngineConfig()
        self.layout = Layout.of(model.config, config.block_size)
        self.config = config = dataclasses.replace(config, block_size=self.layout.block_page_tokens)
        self.tokenizer = tokenizer
        context = model.config.max_position_embeddings
        self.max_model_len = config.max_model_len or context
        if self.max_model_len > context:
            raise ValueError(
                f"max_model_len is {self.max_model_len}, the model's context is {context}; "
                "give at most that"
            )
        if model.config.kv_strategy == "hybrid":
            raise ValueError(
                "kv_strategy hybrid is not served by the engine; use per_recursion or shared"
            )
        weight = model.model.embed_tokens.weight
        self.page_bytes = self.layout.page_elements * weight.element_size()
        num_pages = self.layout.count_pages(
            config.kv_cache_bytes,
            self.page_bytes,
            tokens=self.max_model_len,
            requests=config.max_num_seqs,
        )
        pool = torch.empty(
            num_pages, self.layout.page_elements, dtype=weight.dtype, device=weight.device
        )
        self.groups = build_groups(
            model, pool, self.layout, config, max_model_len=self.max_model_len
        )
        self.sampler = Sampler(argmax=self.groups.argmax, draws=self.groups.draws)
        self.requests: dict[str, list[Request]] = {}
        self.callbacks: dict[str, OnOutput] = {}
        self._ids = itertools.count()
        self.num_drawn = 0
        """tokens drawn for all requests"""
        self._build_state(num_pages)
        self.periods = PeriodChooser(lambda: self.runner.measure(config.max_num_seqs))
        self.intake = Intake(
            model.config,
            layout=self.layout,
            num_pages=num_pages,
            max_model_len=self.max_model_len,
            thresholds=self.runner.router.thresholds(),
            tokenizer=tokenizer,
            calibration=calibration,
        )

    def _build_state(self, num_pages: int) -> None:
        """Make everything that a tick changes, the pool apart: nobody reads what it held."""
        config = self.config
        self.blocks = BlockManager(self.layout, num_pages, config.max_num_seqs, self.max_model_len)
        self.prefix = None
        if config.enable_prefix_caching:
            self.prefix = PrefixCache(self.blocks, config.block_size)
            self.blocks.evict = self.prefix.evict
        num_rows = config.max_num_seqs + 2 * config.max_num_batched_tokens
        self.runner = build_runner(self.model, self.groups, self.blocks, num_rows=num_rows)
        self.captured = build_captured(self.model, self.runner, self.blocks, config)
        self.scheduler = Scheduler(
            config,
            self.blocks,
            self.prefix,
            num_recursions=self.model.config.num_recursions,
            num_rows=num_rows,
            coda_period=self._coda_period,
        )

    def reset(self, reason: str = "the engine was reset") -> None:
        """End every request with an error and start from nothing, after a step that raised.

        Weights stay. The prefix cache is empty afterwards.
        """
        for answers in self.requests.values():
            for answer in answers:
                if answer.finish_reason is None:
                    answer.finish_reason, answer.error, answer.slot = "error", reason, -1
        self._build_state(self.blocks.num_pages)

    @classmethod
    def load(
        cls,
        folder: Path,
        config: EngineConfig | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Engine:
        """Open a model folder, its tokenizer and calibration."""
        model = load_model(folder, dtype=dtype, device=device)
        tokenizer = Tokenizer.load(folder, eos_token=model.config.eos_token_id)
        return cls(model, config, tokenizer=tokenizer, calibration=load_calibration(folder))

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        on_output: OnOutput | None = None,
    ) -> str:
        """Queue a prompt, text or token ids; returns the request's id.

        on_output  called with every piece; if it raises, the request ends with an error
        Raises     ValueError, in one line, for what cannot be served; nothing is queued then
        """
        params = params or SamplingParams()
        request_id = f"request-{next(self._ids)}" if request_id is None else request_id
        if request_id in self.requests:
            raise ValueError(f"request_id {request_id!r} is in use; give another")
        answers = self.intake.requests(request_id, prompt, params)
        self.requests[request_id] = answers
        if on_output is not None:
            self.callbacks[request_id] = on_output
        for answer in answers:
            self.scheduler.add(answer)
        return request_id

    def abort(self, request_id: str) -> list[StepOutput]:
        """End a request wherever it is; what it held is free at once. Unknown ids are ignored.

        Returns the last piece of every answer that ran
        """
        pieces = []
        for answer in self.requests.get(request_id, []):
            if answer.finish_reason is None:
                pieces.append(StepOutput(request_id, answer.index))
                self._finish(answer, "abort", pieces[-1])
        return pieces

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> list[StepOutput]:
        """Run one tick; returns what it brought."""
        captured = self.captured
        if captured is not None and (captured.is_running or captured.begin(self.scheduler)):
            return self._step_captured(captured)
        batch = self.scheduler.schedule()
        self.runner.enter(batch)
        if captured is not None and captured.begin(self.scheduler):
            return self._step_captured(captured)
        self.runner.advance(batch)
        due = self.scheduler.collect(batch)
        if not due:
            return []
        try:
            finished = self.runner.finish(due)
        except BaseException:  # Ctrl-C: their rows are still theirs
            self.scheduler.ready += due
            raise
        return self._update(due, finished)

    def _update(self, due: list[Flight], finished: Finished) -> list[StepOutput]:
        """Note depths, draw tokens, end what is done; a piece for every flight."""
        self.scheduler.see_depths([depth for depths in finished.depths for depth in depths])
        pieces: list[StepOutput] = []
        drawing: list[tuple[Request, StepOutput, int]] = []
        for flight, part, depths in zip(due, finished.rows, finished.depths, strict=True):
            request = flight.request
            piece = _note_depths(flight, depths)
            pieces.append(piece)
            if request.params.prompt_logprobs is not None:
                self._note_prompt_logprobs(flight, finished, part)
            if flight.wants_logits:
                drawing.append((request, piece, part.stop - 1))
            self.scheduler.retire(flight)
            self.scheduler.remember(request)
        if drawing:
            logits = finished.logits_MV
            assert logits is not None
            if len(drawing) < len(logits):
                logits = logits[[row for _, _, row in drawing]]
            sampled = self.sampler.sample(logits, [request.sample_row for request, _, _ in drawing])
            tokens = sampled.token_N.tolist()
            self.scheduler.drawn.extend(self._note_tokens(drawing, tokens, sampled.logprobs))
        self._tell_all(pieces)
        return pieces

    def _step_captured(self, captured: CapturedTicks) -> list[StepOutput]:
        """Take prompts in, launch a tick and read one that is older; or read all and end it."""
        goes_on = captured.admit(self.scheduler) and captured.launch()
        pieces: list[StepOutput] = []
        seen: list[int] = []
        while captured.is_running and captured.num_unread > (captured.lag if goes_on else 0):
            done = captured.read()
            if not done:
                continue
            drawing = []
            for place, (flight, _, depths) in enumerate(done):
                seen += depths
                piece = _note_depths(flight, depths)
                pieces.append(piece)
                drawing.append((flight.request, piece, place))
                if flight.count > 1:
                    self.scheduler.keep_newest(flight)
                self.scheduler.remember(flight.request)
            captured.go_on(self._note_tokens(drawing, [token for _, token, _ in done], {}))
        if seen:
            self.scheduler.see_depths(seen)
        if captured.is_over and captured.is_running:
            captured.hand_back()
        self._tell_all(pieces)
        return pieces

    def _note_tokens(
        self,
        drawing: list[tuple[Request, StepOutput, int]],
        tokens: list[int],
        logprobs: dict[int, TokenLogprobs],
    ) -> list[Request]:
        """Note what was drawn, -1 where nothing could be; returns the requests that go on."""
        now = time.perf_counter()
        self.num_drawn += len(drawing)
        going_on = []
        for place, (request, piece, _) in enumerate(drawing):
            token = tokens[place]
            if token < 0:
                request.error = "the logits are not finite; check the weights"
                if request.params.constraint is not None:
                    request.error = (
                        "its constraint allows no token that is not barred, or the logits are not "
                        "finite"
                    )
                self._finish(request, "error", piece)
                continue
            if not request.output_ids:
                request.first_token_s = now
            request.output_ids.append(token)
            request.num_tokens += 1
            if place in logprobs:
                request.logprobs.append(logprobs[place])
                piece.logprobs.append(logprobs[place])
            text = request.stops.push(token)
            piece.token_ids.append(token)
            if text:
                request.text += text
                piece.text = text
            if request.stops.finish_reason is not None:
                request.stop_reason = request.stops.stop_reason
                self._finish(request, request.stops.finish_reason, piece)
            else:
                going_on.append(request)
        return going_on

    def _note_prompt_logprobs(self, flight: Flight, finished: Finished, part: slice) -> None:
        """Note log-probabilities of the prompt tokens that follow a chunk's tokens."""
        request = flight.request
        if not request.prompt_logprobs:
            request.prompt_logprobs.append(None)  # nothing stands before the first token
        first = len(request.prompt_logprobs) - 1
        last = min(flight.stop, len(request.prompt_ids) - 1)
        if first < flight.start or first >= last or finished.logits_MV is None:
            return
        top = request.params.prompt_logprobs
        assert top is not None
        logits = finished.logits_MV[part][first - flight.start : last - flight.start]
        following = torch.tensor(request.prompt_ids[first + 1 : last + 1], device=logits.device)
        request.prompt_logprobs.extend(token_logprobs(logits, following, [top] * len(logits)))

    def _finish(self, request: Request, reason: str, piece: StepOutput | None = None) -> None:
        self.scheduler.finish(request)
        held = request.stops.flush()  # of an answer that did not end by itself
        request.text += held
        if piece is not None:
            piece.text += held
        if self.captured is not None:
            self.captured.drop(request)
        request.finish_reason = reason
        if piece is not None:
            piece.finish_reason, piece.stop_reason = reason, request.stop_reason
            piece.error = request.error

    def _tell_all(self, pieces: list[StepOutput]) -> None:
        if self.callbacks:
            for piece in tuple(pieces):
                pieces += self._tell(piece)

    def _tell(self, piece: StepOutput) -> list[StepOutput]:
        """Hand a piece to whoever asked for it; a callback that raises ends its request.

        Returns the last pieces of the request's other answers then.
        """
        callback = self.callbacks.get(piece.request_id)
        if callback is None:
            return []
        try:
            callback(piece)
            return []
        except Exception as error:
            said = f"the request's callback raised {type(error).__name__}: {error}"
        self.callbacks.pop(piece.request_id, None)
        others = []
        for answer in self.requests.get(piece.request_id, []):
            if answer.finish_reason is not None:
                continue
            answer.error, last = said, piece
            if answer.index != piece.index:
                last = StepOutput(piece.request_id, answer.index)
                others.append(last)
            self._finish(answer, "error", last)
        return others

    def result(self, request_id: str) -> RequestOutput:
        """Return a request as it stands."""
        return output_of(request_id, self.requests[request_id], self.model.config)

    def is_done(self, request_id: str) -> bool:
        return all(answer.finish_reason is not None for answer in self.requests[request_id])

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a request; one that runs is ended first."""
        self.abort(request_id)
        self.requests.pop(request_id, None)
        self.callbacks.pop(request_id, None)

    def generate(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Run prompts to their end and return them in order.

        params    for all prompts, or one for each
        use_tqdm  show progress
        Raises    ValueError when a prompt cannot be served; none runs then
        """
        prompts = list(prompts)
        each = params if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} params for {len(prompts)} prompts; give one each")
        ids: list[str] = []
        try:
            for prompt, wanted in zip(prompts, each, strict=True):
                ids.append(self.add(prompt, wanted))
            with progress("requests", len(ids), show=use_tqdm) as bar:
                while self.has_work:
                    done = sum(piece.finish_reason is not None for piece in self.step())
                    bar.advance(done)
            return [self.result(request_id) for request_id in ids]
        finally:
            for request_id in ids:
                self.forget(request_id)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StepOutput]:
        """Run one prompt and yield its pieces; leaving early ends the request."""
        request_id = self.add(prompt, params)
        try:
            while not self.is_done(request_id):
                yield from (p for p in self.step() if p.request_id == request_id)
        finally:
            self.forget(request_id)

    def _coda_period(self, num_running: int) -> int:
        """Return the ticks from one call of the coda to the next for so many requests."""
        if self.config.coda_period or num_running <= 1 or self.model.config.num_recursions == 1:
            return self.config.coda_period or 1
        scheduler = self.scheduler
        return self.periods.period(num_running, scheduler.active_share.tolist(), scheduler.tick)

    @property
    def kv_dtype(self) -> torch.dtype:
        """Type of keys and values: the weights'."""
        return self.model.model.embed_tokens.weight.dtype

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that running requests hold, page rounding left out."""
        return sum(self.kv_bytes_by_table)

    @property
    def kv_bytes_by_table(self) -> list[int]:
        """The same apart: prelude and coda first, then recursion 1, 2 .. of the block."""
        layout = self.layout
        a_layer = self.page_bytes // (layout.block_layers * layout.block_page_tokens)
        layers = [layout.own_layers] + [layout.block_layers] * layout.num_depths
        stored = self.blocks.tokens_stored.tolist()
        return [a_layer * n * tokens for n, tokens in zip(layers, stored, strict=True)]

    def check_integrity(self) -> None:
        """Assert that every page, row and slot is in one place; when idle, that none leaks."""
        self.scheduler.check_integrity()
        if not self.has_work:
            assert self.blocks.num_used == 0, "pages leak"
            assert not self.scheduler.in_block and not self.scheduler.ready, "flights leak"


def _note_depths(flight: Flight, depths: list[int]) -> StepOutput:
    """Note the depths of a flight that is through; returns the piece that tells of them."""
    request = flight.request
    known = len(request.depths) - flight.start
    request.depths += depths if known <= 0 else depths[known:]
    request.num_done = flight.stop
    return StepOutput(request.request_id, request.index, [], "", request.untold_depths())
