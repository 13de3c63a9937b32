"""Timers. Every time is per call, and its kind is named in the row:

    cold    between two uses of a buffer go five times the last cache's size of other buffers
    warm    the same buffers in every call, as when the producer has just written them
    eager   calls issued one by one from Python, until the device has finished the last
    host    the part of that in which Python was busy issuing calls, on a GPU

On a GPU cold and warm are replays of a CUDA graph, so no host time is in them; on a CPU they are
loops, whose host time is part of the work.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

Call = Callable[[], Any]
# around a call while it is captured or timed: a choice of SDPA back ends, for example
Around = Callable[[], contextlib.AbstractContextManager]

CACHES_BETWEEN_USES = 5
MOST_SETS = 512
REPLAYS = 30
# calls in one graph: enough to hide what replaying costs the host, few enough to replay often
CALLS_IN_GRAPH = 50
GRAPH_SECONDS = 0.03


@dataclass
class Samples:
    """Microseconds per call, one number per sample."""

    us: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        """Linear between the two nearest samples."""
        if not self.us:
            raise ValueError("Samples: there are none; nothing was measured")
        ordered = sorted(self.us)
        place = q * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    def columns(self) -> dict[str, Any]:
        return {
            "p20_us": self.quantile(0.2),
            "p50_us": self.quantile(0.5),
            "p80_us": self.quantile(0.8),
            "samples": len(self.us),
        }


class Timer(Protocol):
    """One way of calling one provider, ready to run."""

    results: dict[str, Samples]  # by kind of timing
    seconds: float  # of a call, roughly
    in_sample: int  # calls

    def sample(self, samples: int) -> None: ...

    def close(self) -> None: ...


class HostTimer:
    """Wall time of calls issued from Python: `kind` until all is done, `host` until all is issued.

    Args:
        calls: One call per set of buffers; they are taken in turn.
        kind: Name of the wall time. `host` is recorded only beside `eager`.
        synchronise: Waits for the device, if there is one to wait for.
        clock: Seconds.
        least_seconds: A sample has as many calls as it takes to last so long.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        kind: str,
        *,
        synchronise: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        around: Around = contextlib.nullcontext,
        least_seconds: float = 1e-3,
    ):
        self.calls, self.kind, self.around = calls, kind, around
        self.synchronise, self.clock = synchronise or (lambda: None), clock
        # without a device to wait for, issuing a call is running it
        waits = kind == "eager" and synchronise is not None
        self.results = {kind: Samples()} | ({"host": Samples()} if waits else {})
        with around():
            # the first calls compile and allocate
            for call in [*calls, calls[0]]:
                call()
            self.synchronise()
            start = clock()
            calls[0]()
            self.synchronise()
        self.seconds = clock() - start
        turns = math.ceil(least_seconds / max(self.seconds * len(calls), 1e-9))
        self.in_sample = len(calls) * max(turns, 1)

    def sample(self, samples: int) -> None:
        with self.around():
            for _ in range(samples):
                self.synchronise()
                start = self.clock()
                for i in range(self.in_sample):
                    self.calls[i % len(self.calls)]()
                issued = self.clock()
                self.synchronise()
                finished = self.clock()
                self._record(self.kind, finished - start)
                if "host" in self.results:
                    self._record("host", issued - start)

    def _record(self, kind: str, seconds: float) -> None:
        self.results[kind].us.append(seconds / self.in_sample * 1e6)

    def close(self) -> None:
        self.calls = ()


class GraphTimer:
    """Replays of a CUDA graph that holds many calls, back to back, between events.

    An event before the first replay alone would count the time until the graph reaches an idle
    device. So replays are queued without waiting, a first one that is not counted in front.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        kind: str,
        *,
        stream: torch.cuda.Stream,
        around: Around = contextlib.nullcontext,
        least: int = 2,
    ):
        self.results = {kind: Samples()}
        self.kind, self.stream = kind, stream
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with around(), torch.cuda.stream(stream):
            # compile, allocate, run what a backward call differentiates; see how long a call takes
            for call in calls:
                call()
            stream.synchronize()
            start = time.perf_counter()
            for i in range(3):
                calls[i % len(calls)]()
            stream.synchronize()
            self.seconds = (time.perf_counter() - start) / 3
        self.in_sample = calls_in_graph(len(calls), self.seconds, least)
        self.graph = torch.cuda.CUDAGraph()
        # results of the last round of sets stay, so that no result is written to a hot buffer
        kept: deque = deque(maxlen=len(calls))
        with around(), torch.cuda.graph(self.graph, stream=stream):
            for i in range(self.in_sample):
                kept.append(calls[i % len(calls)]())
        self.kept = kept

    def sample(self, samples: int) -> None:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
        with torch.cuda.stream(self.stream):
            self.graph.replay()
            events[0].record()
            for event in events[1:]:
                self.graph.replay()
                event.record()
            self.stream.synchronize()
        for before, after in zip(events, events[1:], strict=False):
            milliseconds = before.elapsed_time(after)
            self.results[self.kind].us.append(milliseconds * 1e3 / self.in_sample)

    def close(self) -> None:
        self.kept.clear()
        self.graph.reset()


def calls_in_graph(sets: int, seconds: float, least: int = 2) -> int:
    """At least every set once, and `least` in all; then up to GRAPH_SECONDS of work."""
    fitting = math.ceil(GRAPH_SECONDS / max(seconds, 1e-9))
    return max(sets, least, min(CALLS_IN_GRAPH, fitting))


def rotations(tensors: Iterable[Tensor], result_bytes: int, cache_bytes: int) -> int:
    """How many sets of buffers a cold measurement needs.

    Between two uses of a set go all others; they and their results must be CACHES_BETWEEN_USES
    times the cache.
    """
    of_set = sum(x.numel() * x.element_size() for x in tensors) + result_bytes
    others = math.ceil(CACHES_BETWEEN_USES * cache_bytes / max(of_set, 1))
    return min(max(others + 1, 2), MOST_SETS)


def measure(timers: Iterable[Timer], *, samples: int = REPLAYS, seconds: float = 1.0) -> None:
    """Sample the timers in turn, so that a drift of the machine meets all of them alike.

    Each gets `samples` samples, or, where they would take longer than `seconds`, as many as fit,
    but never fewer than 5.
    """
    rounds, timers = 5, list(timers)
    for _ in range(rounds):
        for timer in timers:
            fitting = int(seconds / max(timer.seconds * timer.in_sample, 1e-9))
            timer.sample(max(1, min(samples, fitting) // rounds))


def synchroniser(device: torch.device) -> Callable[[], None] | None:
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None
