"""What `make wheel` links asks for no newer glibc than 2.28: cmake/old_glibc.cmake."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# what the CUDA runtime and libstdc++'s shared_ptr need, called
SOURCE = """
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/mman.h>
#include <memory>

static void* add(void* x) { ++*static_cast<int*>(x); return nullptr; }

extern "C" __attribute__((visibility("default"))) int answer() {
    int x = 40;
    pthread_t thread;
    pthread_create(&thread, nullptr, add, &x);
    pthread_join(thread, nullptr);
    std::shared_ptr<int> one = std::make_shared<int>(1), two = one;
    sem_t semaphore;
    sem_init(&semaphore, 0, 1);
    sem_wait(&semaphore);
    sem_destroy(&semaphore);
    shm_unlink("/nasa-kernels-has-none-of-this-name");
    void* self = dlopen(nullptr, RTLD_NOW);
    const bool found = self != nullptr && dlsym(self, "malloc") != nullptr;
    return x + *two * (found ? 1 : 100);
}
"""
PROJECT = """
cmake_minimum_required(VERSION 3.22)
project(small LANGUAGES CXX)
set(CMAKE_SOURCE_DIR "{root}")
add_library(small MODULE small.cpp)
if(NASA_OLD_GLIBC)
  include("{root}/cmake/old_glibc.cmake")
  nasa_for_old_glibc(small libpthread.so.0 libdl.so.2 librt.so.1)
endif()
"""


def newest_glibc(library):
    """The newest version of glibc that a library asks for, read as objdump prints its symbols."""
    table = subprocess.run(["objdump", "-T", library], check=True, capture_output=True, text=True)
    found = re.findall(r"GLIBC_(\d+)\.(\d+)", table.stdout)
    return max((int(major), int(minor)) for major, minor in found)


def build(folder, old):
    folder.mkdir()
    (folder / "small.cpp").write_text(SOURCE)
    (folder / "CMakeLists.txt").write_text(PROJECT.format(root=ROOT))
    option = f"-DNASA_OLD_GLIBC={'ON' if old else 'OFF'}"
    for command in (["-S", folder, "-B", folder / "build", option], ["--build", folder / "build"]):
        subprocess.run(["cmake", *command], check=True, capture_output=True)
    return folder / "build" / "libsmall.so"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_an_old_glibc_is_enough(tmp_path):
    for tool in ("cmake", "c++", "objdump"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    plain, old = (build(tmp_path / name, name == "old") for name in ("plain", "old"))
    assert newest_glibc(old) <= (2, 28)
    # the functions are the system's all the same
    for library in (plain, old):
        assert ctypes.CDLL(str(library)).answer() == 42
    if newest_glibc(plain) <= (2, 28):
        pytest.skip("this system's glibc is old itself: nothing was to be done here")


def test_make_wheel_asks_for_it():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rule = makefile.partition("\nwheel:")[2].partition("\n\n")[0]
    assert "NASA_OLD_GLIBC=1" in rule and "--plat manylinux_2_28_x86_64" in rule
