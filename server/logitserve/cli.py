"""The command line. Flags come from the fields of ServerConfig and EngineConfig; none is written here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn, TypeVar

from logitengine.config import EngineConfig
from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from logitserve import __version__
from logitserve.config import ServerConfig

S = TypeVar("S", bound=BaseSettings)

_SOURCES = SettingsConfigDict(
    env_prefix="LOGITSERVE_",
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Bad options exit with 2, a model that cannot be loaded with 1, a signal with 0."""
    parser = argparse.ArgumentParser(
        prog="logitserve",
        description="An OpenAI-compatible inference server whose first-class output is logits.",
    )
    parser.add_argument("--version", action="version", version=f"logitserve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve_parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP. Every flag is also a variable: --max-n is LOGITSERVE_MAX_N.",
        allow_abbrev=False,
    )
    serve_parser.add_argument("model_argument", metavar="MODEL", nargs="?", help="the same as --model")
    server_flags: CliSettingsSource[ServerSettings] = CliSettingsSource(
        ServerSettings, root_parser=serve_parser
    )
    engine_flags: CliSettingsSource[EngineSettings] = CliSettingsSource(
        EngineSettings, root_parser=serve_parser
    )
    arguments = parser.parse_args(argv)

    if arguments.model_argument is not None:
        if getattr(arguments, "model", arguments.model_argument) != arguments.model_argument:
            serve_parser.error("MODEL and --model differ")
        arguments.model = arguments.model_argument
    server_config = _settings(ServerSettings, server_flags, arguments, serve_parser)
    engine_config = _settings(EngineSettings, engine_flags, arguments, serve_parser)

    from logitserve.serving import serve

    return serve(server_config, engine_config)


def _settings(
    settings: type[S],
    flags: CliSettingsSource[S],
    arguments: argparse.Namespace,
    parser: argparse.ArgumentParser,
) -> S:
    """Flags over variables over defaults. Exits with 2 on what is invalid."""
    try:
        return settings(_cli_settings_source=flags(parsed_args=arguments))
    except ValidationError as error:
        _refuse(error, parser)
    except SettingsError as error:
        parser.error(str(error))


def _refuse(error: ValidationError, parser: argparse.ArgumentParser) -> NoReturn:
    fault = error.errors(include_url=False)[0]
    flag = str(fault["loc"][0]).replace("_", "-")
    parser.error(f"--{flag}: {fault['msg']} (got {fault['input']!r})")
