"""Builds the compiled codec. Everything else about the project stands in pyproject.toml."""

import os
from glob import glob

from setuptools import Extension, setup

# No -ffast-math and no contraction: the codec is bit-identical to its reference. -fno-trapping-math gives up exception
# flags only, which nobody reads, so that comparisons vectorise.
FLAGS = ["/O2", "/fp:precise"] if os.name == "nt" else ["-O3", "-ffp-contract=off", "-fno-trapping-math"]

setup(
    ext_modules=[
        Extension(
            "lowbit_kernels._codec",
            sources=["kernels/lowbit_kernels/csrc/codec.c"],
            depends=glob("kernels/lowbit_kernels/csrc/*.h"),
            extra_compile_args=FLAGS,
            optional=True,  # without a compiler the install goes on, and the torch codec is used
        )
    ]
)
