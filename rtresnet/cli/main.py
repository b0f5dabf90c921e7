"""`rtresnet`: the commands, and the one place where errors become messages and exit codes.

0 success; 1 a check failed; 2 usage or input error; 3 missing package, GPU or driver; 130 Ctrl-C;
141 stdout was closed (SIGPIPE).
"""

from __future__ import annotations

import errno
import importlib
import os
import sys

import click

from rtresnet.cli.commands import EXAMPLES, SUMMARIES
from rtresnet.core import provenance
from rtresnet.core.errors import RtresnetError, UnknownNameError
from rtresnet.core.reporter import escape

NO_READER = 128 + 13  # exit code that a shell reports for a process ended by SIGPIPE


class Commands(click.Group):
    """Import a command's file when the command is named, so that --help is fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the pipeline."""
        return list(SUMMARIES)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's file.

        Raises:
            UnknownNameError: There is no such command.
        """
        if cmd_name not in SUMMARIES:
            raise UnknownNameError("command", cmd_name, SUMMARIES)
        command: click.Command = importlib.import_module(f"rtresnet.cli.{cmd_name}").command
        command.short_help = SUMMARIES[cmd_name]
        _add_example(cmd_name, command)
        return command


def _add_example(path: str, command: click.Command) -> None:
    command.epilog = f"Example: {EXAMPLES[path]}"
    for name, subcommand in getattr(command, "commands", {}).items():
        _add_example(f"{path} {name}", subcommand)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rtresnet", prog_name="rtresnet")
def cli() -> None:
    """Train residual networks and compile them into TensorRT engines.

    Each step of the pipeline (train, export, quantize, build, bench) is one command that writes
    files for the next.
    Start with: rtresnet quickstart
    """


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        return _run(words)
    except (KeyboardInterrupt, click.Abort):
        pass
    except ImportError as error:
        # An extension module turns a Ctrl-C during its import into this error.
        if not isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
            raise
    click.echo("interrupted", err=True)
    return 130


def _run(words: list[str]) -> int:
    token = provenance.command.set(["rtresnet", *words])  # for the files written by the command
    try:
        # In standalone mode click would print errors and exit by itself.
        result = cli.main(words, prog_name="rtresnet", standalone_mode=False)
        return result if isinstance(result, int) and not isinstance(result, bool) else 0
    except click.exceptions.Exit as exit_request:
        return exit_request.exit_code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "rtresnet"
        message = error.format_message().removesuffix(".")
        return _fail(f"{message}; see: {path} --help", 2)
    except RtresnetError as error:
        return _fail(str(error), error.exit_code)
    except (BrokenPipeError, SystemExit) as error:
        # click and rich convert it to SystemExit(1), which would look like a failed check. No other
        # code here raises SystemExit.
        if isinstance(error, SystemExit) and error.code != 1:
            raise
        # Otherwise Python would print another error at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except OSError as error:
        return _fail(_system_error(error), 2)
    finally:
        provenance.command.reset(token)


def _system_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}the disk is full; free some space, then run the command again"
    return f"{where}{error.strerror or error}"


def _fail(message: str, code: int) -> int:
    # Further lines are indented: a name from a file cannot forge a line of output.
    click.echo(escape(f"error: {message}").replace("\n", "\n  "), err=True)
    return code
