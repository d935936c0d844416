"""The command line. Its flags are the fields of ServerConfig, EngineConfig and ExtractConfig; none is written here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from logitengine.config import EngineConfig
from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from logitserve import __version__
from logitserve.config import ENV_PREFIX, ServerConfig
from logitserve.extract.config import ExtractConfig

S = TypeVar("S", bound=BaseSettings)

_SOURCES = SettingsConfigDict(
    env_prefix=ENV_PREFIX,
    cli_kebab_case=True,
    cli_implicit_flags=True,
    cli_hide_none_type=True,
    cli_avoid_json=True,
)


class ServerSettings(BaseSettings, ServerConfig):
    """ServerConfig, read from flags and LOGITSERVE_ variables."""

    model_config = _SOURCES


class EngineSettings(BaseSettings, EngineConfig):
    """EngineConfig, read from flags and LOGITSERVE_ variables."""

    model_config = _SOURCES


class ExtractSettings(BaseSettings, ExtractConfig):
    """ExtractConfig, read from flags and LOGITSERVE_ variables."""

    model_config = _SOURCES


class Command:
    """A subcommand whose flags are the fields of its settings."""

    def __init__(self, parser: argparse.ArgumentParser, settings: Sequence[type[BaseSettings]]) -> None:
        self.parser = parser
        self._flags: dict[type[BaseSettings], Any] = {
            kind: CliSettingsSource(kind, root_parser=parser) for kind in settings
        }

    def read(self, kind: type[S], arguments: argparse.Namespace) -> S:
        """Return the settings: flags win over variables, and variables over defaults. Exits with 2 on an invalid one."""
        try:
            return kind(_cli_settings_source=self._flags[kind](parsed_args=arguments))
        except ValidationError as error:
            self._refuse(error)
        except SettingsError as error:
            self.parser.error(f"{error} (a flag that names something is written --flag NAME=VALUE)")

    def _refuse(self, error: ValidationError) -> NoReturn:
        fault = error.errors(include_url=False)[0]
        message = fault["msg"].removeprefix("Value error, ")
        if not fault["loc"]:
            self.parser.error(message)
        flag = str(fault["loc"][0]).replace("_", "-")
        self.parser.error(f"--{flag}: {message} (got {fault['input']!r})")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, for a server that a signal ended too, or 1 for a failure. Bad options exit with 2."""
    parser = argparse.ArgumentParser(
        prog="logitserve",
        description="An OpenAI-compatible inference server whose first-class output is logits.",
    )
    parser.add_argument("--version", action="version", version=f"logitserve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    runs = {"serve": _serve, "extract": _extract}
    built = {"serve": _serve_command(commands), "extract": _extract_command(commands)}
    arguments = parser.parse_args(argv)
    return runs[arguments.command](built[arguments.command], arguments)


def _serve_command(commands: Any) -> Command:
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP. Every flag is also a variable: --max-n is LOGITSERVE_MAX_N.",
        allow_abbrev=False,
    )
    parser.add_argument("model_argument", metavar="MODEL", nargs="?", help="the same as --model")
    return Command(parser, (ServerSettings, EngineSettings))


def _serve(command: Command, arguments: argparse.Namespace) -> int:
    if arguments.model_argument is not None:
        if getattr(arguments, "model", arguments.model_argument) != arguments.model_argument:
            command.parser.error("MODEL and --model differ")
        arguments.model = arguments.model_argument
    server_config = command.read(ServerSettings, arguments)
    engine_config = command.read(EngineSettings, arguments)

    from logitserve.serve_command import serve

    return serve(server_config, engine_config)


def _extract_command(commands: Any) -> Command:
    parser = commands.add_parser(
        "extract",
        help="write the logits of a file of prompts to a file",
        description="Write the logits of prompts to a Parquet or safetensors file. A run that was stopped goes on "
        "where it was when the same command is given again.",
        allow_abbrev=False,
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
        command.parser.error(f"--{name.replace('_', '-')} {needs}")

    from logitserve.extract.run import extract

    return extract(arguments.prompts, arguments.out, config, engine_config)
