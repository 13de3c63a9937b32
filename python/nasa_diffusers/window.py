"""Which denoising steps are guided."""

from __future__ import annotations

from dataclasses import dataclass

from nasa_diffusers.scalars import is_int, scalar


@dataclass(frozen=True)
class Window:
    """Steps `start` up to, and without, `stop`: ints count steps, floats are fractions.

    Step i of n begins at the fraction i / n, so step 0 is guided whenever `start` is 0, also in
    a one-step model.
    """

    start: int | float = 0
    stop: int | float | None = None

    def __post_init__(self) -> None:
        for name, given in (("start", self.start), ("stop", self.stop)):
            if name == "stop" and given is None:
                continue
            value = scalar(given)
            object.__setattr__(self, name, value)
            is_step = is_int(value) and value >= 0
            is_fraction = isinstance(value, float) and 0 <= value <= 1
            if not is_step and not is_fraction:
                raise ValueError(
                    f"enable_nasa: {name} must be a step (int, from 0) or a fraction of the steps "
                    f"(float, 0.0 to 1.0), got {given!r}"
                )

    @property
    def is_everything(self) -> bool:
        return self.start == 0 and (self.stop is None or self.stop == 1.0 and self._is_fraction)

    @property
    def _is_fraction(self) -> bool:
        return isinstance(self.stop, float)

    def holds(self, step: int, steps: int) -> bool:
        """True when `step` of `steps` is guided. A window without any step is an error."""
        if not any(self._holds(i, steps) for i in range(steps)):
            raise ValueError(
                f"enable_nasa: start={self.start} and stop={self.stop} leave none of the {steps} "
                "steps guided; widen them, or set alpha to 0 to switch NASA off"
            )
        return self._holds(step, steps)

    def _holds(self, step: int, steps: int) -> bool:
        after = _position(self.start, step, steps) >= self.start
        return after and (self.stop is None or _position(self.stop, step, steps) < self.stop)

    def __str__(self) -> str:
        if self.is_everything:
            return "all steps"
        return f"steps {self.start} to {'the end' if self.stop is None else self.stop}"


def _position(bound: int | float, step: int, steps: int) -> int | float:
    return step / steps if isinstance(bound, float) else step
