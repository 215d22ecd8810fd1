"""Builds bitnet._core from csrc with plain setuptools; everything else about the package is in pyproject.toml.

The environment holds switches for developers, none of which a normal install needs:

    BITNET_DEBUG=1                       no optimization, assertions on
    BITNET_SANITIZE=address,undefined    or thread: the compiler's sanitizers, assertions on
    BITNET_COVERAGE=1                    line counts for gcov
    BITNET_WERROR=1                      the project's warnings, as errors
    BITNET_NO_CUDA=1                     no CUDA backend even where nvcc is found
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOMS = ["base", "quant", "kernels", "tensor", "cpu", "meta", "ops", "formats", "python"]
SOURCES = sorted(str(path) for room in ROOMS for path in Path("csrc", room).glob("*.c"))
HEADERS = sorted(str(path) for suffix in ("h", "inc", "def") for path in Path("csrc").rglob(f"*.{suffix}"))
CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
SWITCH_NAMES = ("DEBUG", "SANITIZE", "COVERAGE", "WERROR", "NO_CUDA")
SWITCHES = {name: os.environ.get(f"BITNET_{name}", "") for name in SWITCH_NAMES}
NVCC = None if SWITCHES["NO_CUDA"] or not CUDA_SOURCES else shutil.which("nvcc")


def flags() -> tuple[list[str], list[str]]:
    """Compiler and linker flags. -ffp-contract=off: only the multiply-adds written in the source are fused."""
    # Headers of Python and NumPy as system headers, so that BITNET_WERROR judges this project's lines only.
    system = [f"-isystem{path}" for path in (sysconfig.get_path("include"), numpy.get_include())]
    compile_flags = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-pthread"]
    # Lines alone: Python's own flags say -g, with which most of a compilation goes into where variables live.
    compile_flags += ["-g1", *system]
    link_flags = ["-pthread", "-lm"]
    if SWITCHES["DEBUG"]:
        compile_flags += ["-O0", "-g", "-UNDEBUG"]
    if SWITCHES["SANITIZE"]:
        sanitize = f"-fsanitize={SWITCHES['SANITIZE']}"
        compile_flags += [sanitize, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-UNDEBUG"]
        link_flags += [sanitize]
    if SWITCHES["COVERAGE"]:
        # Plain counters: a lost increment between threads cannot turn a line that ran into one that did not.
        compile_flags += ["--coverage", "-fprofile-update=single", "-O1"]
        link_flags += ["--coverage"]
    if SWITCHES["WERROR"]:
        compile_flags += ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
    return compile_flags, link_flags


class BuildCore(build_ext):
    """Compiles as many sources at once as this process has CPUs, only those older than their object or a header."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # the compile step below decides, object by object
        variant = [f"{name}={value}".replace(",", "+") for name, value in SWITCHES.items() if value]
        compiler = Path(os.environ.get("CC", "cc")).name
        self.build_temp = str(Path(self.build_temp, "-".join([compiler, *variant]).replace("/", "_")))

    def build_extensions(self) -> None:
        compile_sources = self.compiler.compile
        newest_header = max(os.path.getmtime(path) for path in [*HEADERS, "setup.py"])

        def compile_one(source: str, options: dict) -> list[str]:
            objects = self.compiler.object_filenames([source], output_dir=options["output_dir"])
            fresh = max(newest_header, os.path.getmtime(source))
            if os.path.exists(objects[0]) and os.path.getmtime(objects[0]) > fresh:
                return objects
            return compile_sources([source], **options)

        def compile_parallel(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(CPUS) as pool:
                return [path for objects in pool.map(lambda s: compile_one(s, options), sources) for path in objects]

        self.compiler.compile = compile_parallel
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        if NVCC:
            ext.extra_objects = [self.compile_cuda(source) for source in CUDA_SOURCES]
        super().build_extension(ext)

    def compile_cuda(self, source: str) -> str:
        target = Path(self.build_temp, source).with_suffix(".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                NVCC,
                "-O3",
                "-std=c++17",
                "-arch=all-major",
                "--fmad=false",
                "-Xcompiler",
                "-fPIC,-fvisibility=hidden",
                "-I",
                "csrc",
                "-c",
                source,
                "-o",
                str(target),
            ],
            check=True,
        )
        return str(target)


def core() -> Extension:
    compile_flags, link_flags = flags()
    sources = SOURCES
    if NVCC:
        link_flags += [f"-L{Path(NVCC).resolve().parents[1] / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lstdc++"]
    else:
        sources = [*SOURCES, "csrc/cuda/absent.c"]
    return Extension(
        "bitnet._core",
        sources,
        include_dirs=["csrc"],
        depends=[*HEADERS, *CUDA_SOURCES],
        extra_compile_args=compile_flags,
        extra_link_args=link_flags,
    )


setup(ext_modules=[core()], cmdclass={"build_ext": BuildCore})
