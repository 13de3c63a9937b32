"""Models of the world's classes, small and untrained."""

import pytest
import torch
from accelerate.state import AcceleratorState
from small_world import make_large, make_small


@pytest.fixture(autouse=True)
def one_thread():
    """The models are too small to share between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def one_precision():
    """accelerate keeps the precision of the first run of a process."""
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """What the command `world` leaves, of tiny networks."""
    return make_small(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """The same of the larger world, up to the student of four steps."""
    return make_large(tmp_path_factory.mktemp("large"))
