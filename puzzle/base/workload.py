"""What is asked of a model: a batch of requests. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from puzzle.base.errors import UserError

PAGE = 64  # tokens of a page of the caches on a GPU
PREFILL_ROWS = 16384  # prompt tokens that go through the runtime on a GPU together: more gain nothing but memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A batch of requests that start together: input_len prompt tokens each, then output_len tokens each."""

    input_len: int
    output_len: int

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` {getattr(self, name)}: a workload has at least 1 token")

    def check_fits(self, max_length: int, context: str = "the parent's context of") -> None:
        """Raise UserError where a request has more tokens than `max_length`, which is what `context` says."""
        if self.input_len + self.output_len > max_length:
            raise UserError(
                f"`input_len` {self.input_len} + `output_len` {self.output_len} exceed {context} {max_length}"
            )
