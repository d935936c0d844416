"""The command line. Its flags are the fields of ServerConfig, EngineConfig and ExtractConfig; none is written here."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError
from pydantic_settings import BaseSettings, SettingsConfigDict

from logitserve import __version__
from logitserve.cli_flags import Command, Parser, flag_of
from logitserve.config import ENV_PREFIX, ServerConfig
from logitserve.extract.config import ExtractConfig
from logitserve.http.listener import ListenError
from logitserve.telemetry.otlp import MissingPackageError

_SOURCES = SettingsConfigDict(env_prefix=ENV_PREFIX)


class ServerSettings(BaseSettings, ServerConfig):
    """ServerConfig, read from flags and LOGITSERVE_ variables."""

    model_config = _SOURCES


class EngineSettings(BaseSettings, EngineConfig):
    """EngineConfig, read from flags and LOGITSERVE_ variables."""

    model_config = _SOURCES


class ExtractSettings(BaseSettings, ExtractConfig):
    """ExtractConfig, read from flags and LOGITSERVE_ variables."""

    model_config = _SOURCES


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns 0, also for a server that a signal ended, or 1 for a failure. Bad options exit with 2.
    """
    parser = Parser(
        prog="logitserve",
        usage="logitserve COMMAND ...",
        description="An OpenAI-compatible inference server whose first-class output is logits.",
        epilog="logitserve COMMAND --help lists a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"logitserve {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", prog=parser.prog)
    runs = {"serve": _serve, "extract": _extract}
    built = {"serve": _serve_command(commands), "extract": _extract_command(commands)}
    given = sys.argv[1:] if argv is None else list(argv)
    if not given:
        parser.print_help(sys.stderr)
        return 2
    if given[0] not in {*runs, "-h", "--help", "--version"}:
        _refuse_first(parser, given[0], list(runs))
    arguments, unknown = parser.parse_known_args(given)
    command = built[arguments.command]
    if unknown:
        command.refuse_unknown(unknown)
    return runs[arguments.command](command, arguments)


def _refuse_first(parser: Parser, word: str, commands: list[str]) -> NoReturn:
    if word.startswith("-"):
        parser.error(f"unknown option {word}; options follow the command, {' or '.join(commands)}")
    meant = difflib.get_close_matches(word, commands, n=1) or commands
    parser.error(f"unknown command {word!r}; did you mean {' or '.join(meant)}?")


def _serve_command(commands: Any) -> Command:
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        usage="logitserve serve [MODEL] [options]",
        description="Serve a model over HTTP. Every flag is also a variable: --max-n is LOGITSERVE_MAX_N. "
        "Sizes in BYTES may be written 512MiB or 2GiB.",
    )
    parser.add_argument("model_argument", metavar="MODEL", nargs="?", help="the same as --model")
    return Command(parser, (EngineSettings, ServerSettings))


def _serve(command: Command, arguments: argparse.Namespace) -> int:
    if arguments.model_argument is not None:
        if getattr(arguments, "model", arguments.model_argument) != arguments.model_argument:
            command.parser.error("MODEL and --model differ")
        arguments.model = arguments.model_argument
    server_config = command.read(ServerSettings, arguments)
    engine_config = command.read(EngineSettings, arguments)

    from logitserve.serve_command import serve

    try:
        return serve(server_config, engine_config)
    except (CheckpointError, ListenError, MissingPackageError) as error:
        command.parser.error(str(error))


def _extract_command(commands: Any) -> Command:
    parser = commands.add_parser(
        "extract",
        help="write the logits of a file of prompts to a file",
        usage="logitserve extract PROMPTS.jsonl OUT [options]",
        description="Write the logits of prompts to a Parquet or safetensors file. A run that was stopped goes on "
        "where it was when the same command is given again.",
    )
    parser.add_argument(
        "prompts", metavar="PROMPTS.jsonl", type=Path, help="a prompt or messages on each line"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="a .parquet or .safetensors file to make")
    return Command(parser, (ExtractSettings, EngineSettings))


def _extract(command: Command, arguments: argparse.Namespace) -> int:
    config = command.read(ExtractSettings, arguments)
    engine_config = command.read(EngineSettings, arguments)
    given = vars(arguments).keys()
    foreign = given & ({"api_key"} if config.url is None else EngineConfig.model_fields.keys())
    for name in sorted(foreign):
        needs = (
            "needs --url" if config.url is None else "is for a server that is started here: leave out --url"
        )
        command.parser.error(f"{flag_of(name)} {needs}")

    from logitserve.extract.run import extract

    return extract(arguments.prompts, arguments.out, config, engine_config)
