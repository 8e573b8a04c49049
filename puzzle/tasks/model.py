"""A model that answers: log-likelihoods in batches, and text through a runtime's caches.

Letters: B sequences, T tokens, H hidden_size, V vocab_size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.base.console import progress
from puzzle.base.device import device_memory
from puzzle.base.errors import UserError
from puzzle.base.files import content_hash, file_hash, read_any
from puzzle.base.units import bytes_text
from puzzle.base.workload import PREFILL_ROWS
from puzzle.data.tokenizer import load_tokenizer, tokenizer_files
from puzzle.measure.measurable import Measurable
from puzzle.runtime.interface import Fp8, Runtime, check_lengths
from puzzle.runtime.open import DTYPES, open_runtime
from puzzle.tasks.request import Answer, Answers, Request, Text

MOST = {"cpu": 16, "cuda": 128}  # sequences at once
TOKENS = {"cpu": 4096, "cuda": PREFILL_ROWS}  # of them, when they are scored
ROUND = {"cpu": 1, "cuda": 64}  # what lengths are rounded up to: every length is a shape of its own for the kernels
HEAD_ROWS = 1024  # tokens whose logits are there at once
LOOK = 16  # tokens between two looks at what was generated


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """ids: what is read. scored: how many of its last tokens; new: how many may be generated. cut: it was longer than the context."""

    request: Request
    ids: list[int]
    scored: int = 0
    new: int = 0
    cut: bool = False


@dataclass(kw_only=True)
class Model:
    """One of those that are compared. fp8: what of it is, where that was solved for. dry: what is asked is counted and not answered."""

    name: str
    opened: Measurable
    device: torch.device
    precision: str
    answers: Answers
    fp8: Fp8 | None = None
    memory_limit: int | None = None
    dry: bool = False
    chat_settings: dict[str, Any] = field(default_factory=dict)
    pending: list[Encoded] = field(default_factory=list)
    cut: set[str] = field(default_factory=set)
    _runtime: Runtime | None = None
    _noise: Tensor | None = None
    _steps: dict[bool, Callable[[], object]] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> Any:
        if self.opened.tokenizer is None or self.opened.source is None:
            raise UserError(f"{self.opened.name} has random weights, which answer nothing: give a checkpoint")
        return load_tokenizer(self.opened.tokenizer)

    @cached_property
    def key(self) -> str:
        """Hash of the weights' fingerprint, all of the tokenizer, what ends an answer, the precision and the kind of device."""
        source, directory = self.opened.source, self.opened.tokenizer
        assert source is not None
        assert directory is not None
        fp8 = self.fp8 and [sorted(map(str, self.fp8.weights)), self.fp8.cache]
        reads = [(str(path.relative_to(directory)), file_hash(path)) for path in tokenizer_files(directory)]
        return content_hash([source.fingerprint(), reads, sorted(self.ends), self.precision, fp8, self.device.type])

    @cached_property
    def ends(self) -> set[int]:
        """Tokens that end an answer."""
        assert self.opened.tokenizer is not None
        path = self.opened.tokenizer / "generation_config.json"
        also = read_any(path, "puzzle export").get("eos_token_id") if path.is_file() else None
        return {
            n for n in (self.tokenizer.eos_token_id, *(also if isinstance(also, list) else [also])) if n is not None
        }

    @property
    def prefix(self) -> int:
        """The token that stands for an empty context."""
        begin = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if begin is None else begin

    @property
    def told(self) -> str:
        """What it is called in the file of answers."""
        return f"{self.opened.name} in {self.precision if self.fp8 is None else 'the precisions it was solved for'}"

    def chat(self, messages: list[dict[str, str]], prompt: bool = True) -> str:
        """Through the tokenizer's chat template. prompt: up to where the assistant answers. Raises UserError where it has none or refuses."""
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=prompt,
                continue_final_message=not prompt,
                **self.chat_settings,
            )
        except Exception as error:  # jinja's own error types, or transformers' when there is no template
            raise UserError(f"`chat`: the chat template of {self.opened.name} does not take this ({error})") from error

    def ids(self, text: str, special: bool = True) -> list[int]:
        """special: with the tokens that the tokenizer puts around a text, unless it begins with one."""
        special = special and not text.startswith(self.tokenizer.decode(self.prefix))
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def encode(self, request: Request) -> Encoded:
        """As lm-eval's own models do. Raises UserError for what leaves nothing to read or to say."""
        context, text, longest = request.context, request.continuation, self.opened.structure.max_length
        if text is None:
            assert isinstance(context, str)
            ids, scored, room = self.ids(context) or [self.prefix], 0, longest - request.max_tokens
            if room < 1:
                raise UserError(
                    f"answers of up to {request.max_tokens} tokens leave nothing of the {longest} tokens that {self.opened.name} can read: "
                    "give a smaller `max_new_tokens`"
                )
        else:
            if isinstance(context, tuple) or isinstance(text, tuple):
                ids, scored = [*context, *text], len(text)  # type: ignore[list-item]
            elif not context:
                ids = self.ids(text, special=False)
                ids = ids if ids[:1] == [self.prefix] else [self.prefix, *ids]
                scored = len(ids) - 1
            else:
                bare = context.rstrip()
                ids = self.ids(context + text)
                scored = len(ids) - len(self.ids(bare))
            room = longest + 1
            if not 0 < scored < room:
                raise UserError(
                    f"{self.opened.name} reads up to {longest} tokens, and a task asks for the likelihood of {scored}: {str(text)[:50]!r}"
                )
        if max(ids) >= self.opened.structure.vocab_size:
            raise UserError(
                f"the tokenizer of {self.opened.name} gives token id {max(ids)}, but config.json says vocab_size "
                f"{self.opened.structure.vocab_size}"
            )
        return Encoded(
            request=request, ids=ids[-room:], scored=scored, new=request.max_tokens * (not scored), cut=len(ids) > room
        )

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Of each, from the file or now. Raises UserError as `encode` does, and for a model that does not fit whole on the device."""
        keys = {request: request.key(self.key) for request in requests}
        missing = [self.encode(request) for request, key in keys.items() if key not in self.answers.lines]
        if self.dry:
            self.pending += missing
            return ["" if request.continuation is None else [0.0, False] for request in requests]
        if missing:
            self._answer(missing, keys)
        self.cut |= {key for key in keys.values() if self.answers.lines[key].get("cut")}
        return [self.answers.lines[keys[request]]["answer"] for request in requests]

    def _answer(self, missing: list[Encoded], keys: dict[Request, str]) -> None:
        runtime, kind = self._opened(missing), self.device.type
        scored = sorted((one for one in missing if one.scored), key=lambda one: -len(one.ids))
        work: list[tuple[Callable[[Runtime, list[Encoded]], list[Answer]], list[Encoded]]] = []
        while scored:
            count = max(1, min(len(runtime.ids), TOKENS[kind] // len(scored[0].ids)))
            work.append((self._score, scored[:count]))
            del scored[:count]
        for sampled in (False, True):
            rest = [one for one in missing if not one.scored and (one.request.temperature > 0) == sampled]
            rest.sort(key=lambda one: (-one.new, -len(one.ids)))
            work += [(self._generate, rest[n : n + len(runtime.ids)]) for n in range(0, len(rest), len(runtime.ids))]
        with progress(self.name, len(missing)) as bar:
            for run, batch in work:
                begin = time.perf_counter()
                found = run(runtime, batch)
                seconds = (time.perf_counter() - begin) / len(batch)
                self.answers.keep(
                    [
                        {"key": keys[one.request], "model": self.told, "answer": answer, "seconds": round(seconds, 5)}
                        | {"tokens": len(one.ids) + one.new}
                        | ({"cut": True} if one.cut else {})
                        for one, answer in zip(batch, found, strict=True)
                    ]
                )
                bar.advance(len(batch))

    def _opened(self, wanted: Sequence[Encoded]) -> Runtime:
        """For the longest of them, with as many sequences as memory allows."""
        structure, kind, dtype = self.opened.structure, self.device.type, DTYPES[self.precision]
        longest = max(len(one.ids) + one.new for one in wanted)
        longest = min(structure.max_length, -(-longest // ROUND[kind]) * ROUND[kind])
        if (
            self._runtime is None
            or self._runtime.max_length < longest
            or len(self._runtime.ids) < min(MOST[kind], len(wanted))
        ):
            self.close()
            check_lengths(structure, 1, longest)
            memory, size = device_memory(self.device, self.memory_limit), structure.num_parameters * dtype.itemsize
            if size > memory:
                larger = "a larger device" if self.memory_limit is None else "a larger `memory_limit`, or none"
                raise UserError(
                    f"{self.opened.name} ({bytes_text(size)}) does not fit whole into the {bytes_text(max(0, memory))} that are free for it, "
                    f"and `tasks` does not stream: use {larger}"
                )
            cache = sum(block.state().num_bytes(longest, self.precision, 64) for _, _, block in structure)
            each = cache + 16 * structure.vocab_size + 64 * longest
            batch = max(1, min(MOST[kind], len(wanted), int(0.6 * (memory - size) / each)))
            model = self.opened.load(self.device, dtype)
            self._runtime = open_runtime(model, batch, longest, self.precision, fp8=self.fp8, consume=True)
            self._runtime.nonfinite = torch.zeros(batch, dtype=torch.bool, device=self.device)
        return self._runtime

    def close(self) -> None:
        """Give the device's memory back."""
        self._runtime, self._noise, self._steps = None, None, {}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _score(self, runtime: Runtime, batch: list[Encoded]) -> list[Answer]:
        """[log-likelihood of the last tokens, whether each of them is the likeliest] of each."""
        step, longest = ROUND[self.device.type], len(batch[0].ids) - 1
        longest = max(1, min(runtime.max_length, -(-longest // step) * step))
        read = torch.zeros(len(batch), longest, dtype=torch.long)  # what follows a text changes nothing before it
        places, wanted = [], []
        for row, one in enumerate(batch):
            read[row, : len(one.ids) - 1] = torch.tensor(one.ids[:-1])
            places += [row * longest + n for n in range(len(one.ids) - 1 - one.scored, len(one.ids) - 1)]
            wanted += one.ids[-one.scored :]
        hidden = runtime.hidden(read.to(self.device)).flatten(0, 1)[torch.tensor(places, device=self.device)]
        sums, likeliest = [], []
        for part, target in zip(
            hidden.split(HEAD_ROWS), torch.tensor(wanted, device=self.device).split(HEAD_ROWS), strict=True
        ):
            logits = F.linear(part, runtime.head).float()
            sums.append(logits.log_softmax(-1).gather(1, target[:, None])[:, 0].double())
            likeliest.append(logits.argmax(-1) == target)
        lengths, likelihoods = [one.scored for one in batch], torch.cat(sums).cpu()
        self._check_finite(likelihoods.isfinite())
        each = zip(likelihoods.split(lengths), torch.cat(likeliest).cpu().split(lengths), strict=True)
        return [[float(values.sum()), bool(same.all())] for values, same in each]

    @torch.inference_mode()
    def _generate(self, runtime: Runtime, batch: list[Encoded]) -> list[Answer]:
        """Prompts go in together as far as the shortest one; the rest of the longer ones is put in token by token."""
        rows = batch + batch[:1] * (len(runtime.ids) - len(batch))
        lengths, first = [len(one.ids) for one in rows], min(len(one.ids) for one in rows)
        given = torch.full((len(rows), max(lengths)), -1)
        for row, one in enumerate(rows):
            given[row, : len(one.ids)] = torch.tensor(one.ids)
        given, position, seen = given.to(self.device), first, []
        draw = self._sampling(runtime, rows)
        sampled = runtime.noise is not None
        if sampled not in self._steps:  # captured before there is a prompt in the caches
            runtime.at(0)
            self._steps[sampled] = runtime.replayed(runtime.step)
        draw(position)
        nonfinite = runtime.nonfinite
        assert nonfinite is not None
        nonfinite.zero_()
        runtime.prefill(given[:, :first])
        last = max(len(one.ids) + one.new for one in batch) - 1
        while True:
            if position < given.shape[1]:
                runtime.ids.copy_(torch.where(given[:, position] < 0, runtime.ids, given[:, position]))
            seen.append(runtime.ids.clone())
            if position == last or len(seen) % LOOK == 0:
                tokens = torch.stack(seen, dim=1).tolist()
                found = [self._said(one, tokens[n][len(one.ids) - first :]) for n, one in enumerate(batch)]
                if position == last or all(done for _, done in found):
                    self._check_finite(~nonfinite)
                    return [text for text, _ in found]
            position += 1
            draw(position)
            self._steps[sampled]()

    def _check_finite(self, finite: Tensor) -> None:
        """finite: which logits of this batch were numbers. Raises UserError where any were not: none of its answers is kept."""
        if not finite.all():
            raise UserError(
                f"{self.told} gives logits that are no numbers (NaN or infinity), and answers nothing: look at its weights, or make it again"
            )

    def _sampling(self, runtime: Runtime, rows: list[Encoded]) -> Callable[[int], None]:
        """Set the runtime to sample, or not. Gives what draws the noise of the token at a position: the same for a request, whatever stands
        beside it and whichever model answers."""
        runtime.noise = None
        if not rows[0].request.temperature:
            return lambda position: None
        if self._noise is None:
            self._noise = torch.ones(len(rows), runtime.vocab_size, device=self.device)
            runtime.temperature = torch.ones(len(rows), 1, device=self.device)
        noise = runtime.noise = self._noise
        runtime.temperature.copy_(torch.tensor([[one.request.temperature] for one in rows]))
        draws = [torch.Generator(self.device).manual_seed(_seed(one.request)) for one in rows]

        def draw(position: int) -> None:
            for row, (one, generator) in enumerate(zip(rows, draws, strict=True)):
                if len(one.ids) <= position:
                    noise[row].exponential_(generator=generator)

        return draw

    def _thinks(self, context: Text) -> bool:
        """Whether the prompt itself has begun a thought, as some chat templates do."""
        text = context if isinstance(context, str) else self.tokenizer.decode(context)
        return text.rfind("<think>") > text.rfind("</think>")

    def _said(self, one: Encoded, tokens: list[int]) -> tuple[str, bool]:
        """The answer in what was generated, and whether it is whole."""
        tokens = tokens[: one.new]
        end = next((n for n, token in enumerate(tokens) if token in self.ends), None)
        text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        done = end is not None or len(tokens) == one.new
        if one.request.thinking is None:
            return ("" if end is None else text), done
        _, thought, answer = text.rpartition("</think>")
        begun = text.lstrip().startswith("<think>")
        if thought and (begun or one.request.thinking):
            text = answer.lstrip()
        elif begun or (one.request.thinking and self._thinks(one.request.context)):
            return "", done  # a thought that came to no end is no answer
        cuts = [place for word in one.request.until if word and (place := text.find(word)) >= 0]
        return (text[: min(cuts)], True) if cuts else (text, done)


def _seed(request: Request) -> int:
    return int(content_hash(asdict(request))[:15], 16)
