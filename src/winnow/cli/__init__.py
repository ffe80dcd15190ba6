"""The `winnow` command. It sits above every other part: it may import them all, and none of them imports it."""

from winnow.cli.app import main

__all__ = ["main"]
