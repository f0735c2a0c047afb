"""Compiles a network block by block: each kind and size of block once, however often the network repeats it."""

import os
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ldm.errors import RunError

COMPILERS = ("c++", "g++", "clang++", "cl")


def compile_blocks(network: nn.Module, *kinds: type[nn.Module]) -> None:
    """Makes torch compile the modules of these classes, in place, when they first run. Names and weights stay.

    It costs seconds for each size of block, and pays for many pictures or steps. Shapes are compiled as they come: each
    new batch or picture size is compiled again. Raises RunError if this machine has no C++ compiler.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), *COMPILERS)):
        raise RunError("torch needs a C++ compiler to compile a network, and found none; install g++, or don't compile")
    # Blocks of one class share their compiled versions, one for each size. Beyond the limit torch would not compile.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for module in network.modules():
        if isinstance(module, kinds):
            module.compile(dynamic=False)


def uncompiled(is_compiled: bool) -> AbstractContextManager:
    """Inside, compiled blocks run as they are written: for few calls, in which compiling new sizes does not pay.

    is_compiled: whether any are; if not, torch's compiler is not even imported.
    """
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
