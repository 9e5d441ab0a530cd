"""Builds the two extension modules of csrc/; everything else about the package stands in pyproject.toml.

`megatron_rl.kernels._ops`: operators on tensors, registered with TORCH_LIBRARY, built against the torch that is importable.
CUDA code is in it exactly where that torch is a CUDA build. `megatron_rl.kernels._state`: stateful CPU classes (pybind11); it
knows no torch, so it loads under any, and says which torch `_ops` was built with.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ImportError:
    sys.exit(
        "megatron_rl: torch cannot be imported here, and its kernels are built against it. Install torch >= 2.11, < 2.14 first, "
        "then this package with: pip install --no-build-isolation ."
    )

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
HAS_CUDA = torch.version.cuda is not None
OPTIMISE = ["-O3", "-g0", "-Wall", "-Wno-unknown-pragmas"]  # Python's own flags ask for debug information, which takes long
ARCHITECTURES = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in CSRC.glob(pattern))


ops = (CUDAExtension if HAS_CUDA else CppExtension)(
    "megatron_rl.kernels._ops",
    sources("bindings/ops*.cpp", "kv/*_cpu.cpp", *(["kv/*_cuda.cu"] if HAS_CUDA else [])),
    include_dirs=[str(CSRC)],
    extra_compile_args={"cxx": OPTIMISE, "nvcc": ["-O3", "-lineinfo", *ARCHITECTURES]},
    define_macros=[("MEGATRON_RL_CUDA", "1")] if HAS_CUDA else [],
)
state = Extension(
    "megatron_rl.kernels._state",
    sources("bindings/state*.cpp", "kv/allocator.cpp", "packing/*.cpp", "repetition/*.cpp"),
    include_dirs=[str(CSRC), str(Path(torch.__file__).parent / "include")],  # torch ships pybind11's headers
    extra_compile_args=[*OPTIMISE, "-std=c++17", "-fvisibility=hidden"],
    define_macros=[("MEGATRON_RL_TORCH", f'"{torch.__version__}"')],
    language="c++",
)
setup(ext_modules=[ops, state], cmdclass={"build_ext": BuildExtension})
