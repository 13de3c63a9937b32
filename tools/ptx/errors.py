"""What can go wrong while a kernel runs. A message says kernel, line, instruction and thread."""


class Fault(Exception):
    """A kernel did what it must not. ``thread`` is the first offender, counted in the wave."""

    def __init__(self, message: str, thread: int | None = None):
        super().__init__(message)
        self.thread = thread
        self.where = ""

    def __str__(self) -> str:
        return f"{self.where}{self.args[0]}"


class Unsupported(Fault):
    """The interpreter does not know this instruction, or not in this form."""


class OutOfBounds(Fault):
    """An access outside every allocation, or outside the CTA's shared memory."""


class Misaligned(Fault):
    """An address that is not a multiple of the access size."""


class BarrierMisuse(Fault):
    """An mbarrier used before init, or with more arrivals than it expects."""


class Deadlock(Fault):
    """Every thread that is left waits for something nobody will do."""


class Hazard(Fault):
    """A race, a missing wait or fence, or a read of memory that nobody wrote."""
