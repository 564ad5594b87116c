"""Runs a module or script on the fake GPU machine.

python -m tests.fakes 10.16.1 -m benchmarks.gpu_tensorrt ...
python -m tests.fakes 10.16.1 build_engines.py ...
"""

import runpy
import sys

from . import install

version, *rest = sys.argv[1:]
with install(version):
    if rest[0] == "-m":
        sys.argv = rest[1:]
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = rest
        runpy.run_path(rest[0], run_name="__main__")
