"""Errors of the native kernels.

BuildError
  UnsupportedCpuError     the processor or the platform lacks what the sources need
  CompilerMissingError    neither $CXX nor g++ is on the path
  CompilationError        the compiler refused the sources, or the library cannot be loaded beside torch
PrebuiltError             a directory of prebuilt libraries has none of these sources that can be loaded
"""

from __future__ import annotations


class BuildError(RuntimeError):
    """The native kernels cannot run on this machine. The torch reference can."""


class UnsupportedCpuError(BuildError):
    """The processor or the platform lacks what the sources need."""


class CompilerMissingError(BuildError):
    """There is no C++ compiler."""


class CompilationError(BuildError):
    """The compiler refused the sources, or the library cannot be loaded beside torch."""


class PrebuiltError(ValueError):
    """A directory of prebuilt libraries has none of these sources that can be loaded.

    No BuildError: whoever names such a directory does not want the torch reference instead.
    """
