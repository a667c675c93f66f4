"""Builds feplb's C++ core: one extension, no libtorch, no CUDA toolkit, no compiler at run time."""

import os

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# The simulated lane has no Python door yet: the C++ tests build it (tests/test_core_cpp.py).
SOURCES = sorted(
    os.path.join("feplb/csrc", name)
    for name in os.listdir("feplb/csrc")
    if name.endswith(".cpp") and not name.startswith(("sim_", "device_sim"))
)

ParallelCompile("MAX_JOBS", default=2).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "feplb._core",
            SOURCES,
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-fvisibility=hidden"],
            extra_link_args=["-pthread", "-lrt"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
