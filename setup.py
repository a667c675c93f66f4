"""Builds feplb's C++ core: one extension, no libtorch, no CUDA toolkit, no compiler at run time."""

import os

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

SOURCES = sorted(
    os.path.join("feplb/csrc", name) for name in os.listdir("feplb/csrc") if name.endswith(".cpp")
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
