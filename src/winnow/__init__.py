"""winnow: long-context LLM inference that reads only what matters."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("winnow-llm")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"
