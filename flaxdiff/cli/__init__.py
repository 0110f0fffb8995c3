"""The commands, a module each: `flaxdiff-train`, `flaxdiff-sample`, `flaxdiff-export` and `flaxdiff-tpu`; here is what all share."""
import argparse
import io
import sys
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    "A parser whose errors are one line on stderr, with a status of 2."

    def error(self, message: str) -> NoReturn:
        "Say what is wrong, and where all flags are listed."
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def open_console() -> None:
    "Let a console that is not UTF-8 show what it can, and a question mark for the rest."
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
