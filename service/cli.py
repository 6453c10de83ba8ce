"""`lightqwen serve | generate | chat | bench`: what a user types, and what they read.

Every failure is one readable line and an exit code other than 0. Only what the chosen command needs is imported: the
client's commands run on the base installation, without the server's packages.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from service.terminal import CommandError, Terminal, accept_any_text, ready_line

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from service.config import ServeConfig
    from worker.endpoint import EngineEndpoint
    from worker.vitals import Vitals

INTERRUPTED = 128 + 2  # what a shell reports after Ctrl-C


def serve(argv: list[str]) -> int:
    """Run `lightqwen serve`: find the checkpoint, then start everything and stay until it ends.

    Raises:
        CommandError: it cannot run as configured.
    """
    try:
        from worker.config import ConfigError
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is not installed; a server needs: pip install 'lightqwen[server]'") from error
    try:
        from service.config import load_config

        return _run_server(load_config(argv))
    except ConfigError as error:
        raise CommandError(str(error)) from error


def _run_server(config: ServeConfig) -> int:
    from service.model_folder import find_checkpoint

    terminal = Terminal(sys.stderr)
    folder, name = find_checkpoint(config.model, config.revision, terminal.say)
    # What is wrong with the options is told by now. Not more than this process needs is imported: the ranks, which
    # import PyTorch, are started when that is done.
    from service.logs import configure_logging
    from service.ports import host_port
    from worker import supervisor
    from worker.config import EngineConfig
    from worker.vitals import Vitals

    served = config.model_copy(update={"model": str(folder), "served_model_name": config.served_model_name or name})
    engine = EngineConfig(**{field: getattr(served, field) for field in EngineConfig.model_fields})

    vitals = Vitals()

    def on_ready(facts: dict[str, str | int | float], seconds: float) -> None:
        terminal.close()
        if health_port >= 0:
            facts = {**facts, "health": host_port(served.health_host, health_port)}
        print(ready_line(facts, seconds), flush=True)

    multiprocessing.current_process().name = "supervisor"
    set_up_logging = partial(configure_logging, served.log_level, served.log_format)
    set_up_logging()
    try:
        with (
            _probe_port(served, vitals) as health_port,
            _shared_port(served) as port,
        ):
            served = served.model_copy(update={"port": port})
            return supervisor.serve(
                engine,
                [partial(_run_gateway, served, number=number) for number in range(served.gateways)],
                drain_timeout_s=served.withdrawal_s + served.drain_timeout_s,
                on_progress=terminal.progress,
                on_ready=on_ready,
                set_up_logging=set_up_logging,
                vitals=vitals,
            )
    finally:
        terminal.close()


def _run_gateway(config: ServeConfig, endpoint: EngineEndpoint, control: Connection, *, number: int) -> None:
    """Be a gateway process, in which alone what it needs is imported."""
    from service.server import run_gateway

    run_gateway(config, endpoint, control, number=number)


def _probe_port(config: ServeConfig, vitals: Vitals) -> AbstractContextManager[int]:
    """The port for probes, which are answered meanwhile; -1: there is none."""
    if config.health_port < 0:
        return nullcontext(config.health_port)
    from service.probes import probe_endpoint

    return probe_endpoint(config.health_host, config.health_port, vitals)


def _shared_port(config: ServeConfig) -> AbstractContextManager[int]:
    """The port for gRPC, held where several gateways listen on it."""
    from service.ports import hold_port

    if config.gateways == 1 or config.node_rank > 0:
        return nullcontext(config.port)
    return hold_port(config.host, config.port, "--port")


def bench(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Run `lightqwen bench`: drive a running server and report.

    Raises:
        CommandError: it cannot run as asked.
    """
    from bench.load.errors import LoadError
    from service.access import Access

    access = Access.read(arguments)
    terminal = Terminal(sys.stderr)
    try:
        from bench.load.command import run as run_bench

        return run_bench(arguments, access, terminal, argv)
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is not installed; bench needs: pip install 'lightqwen[bench]'") from error
    except LoadError as error:
        raise CommandError(str(error)) from error
    finally:
        terminal.close()


def build_parser() -> argparse.ArgumentParser:
    """The command line, but for the options of `serve`: those are the fields of `service.config.ServeConfig`."""
    from bench.load.options import add_options
    from service.access import add_access_options

    parser = argparse.ArgumentParser(prog="lightqwen", description="Serve Qwen3 over gRPC, and talk to such a server.")
    parser.add_argument("--version", action="version", version=f"lightqwen {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    commands.add_parser("serve", help="run a server (serve --help lists its options)", add_help=False)

    generate = commands.add_parser("generate", help="send one prompt to a server and stream the answer")
    generate.add_argument("prompt", help="what to answer, or to continue with --raw; - reads it from standard input")
    generate.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    _add_request_options(generate)

    chat = commands.add_parser("chat", help="talk with the model; /reset begins anew, /quit or Ctrl-D ends")
    _add_request_options(chat)

    bench = commands.add_parser("bench", help="measure a server: latencies and throughput under load")
    add_access_options(bench)
    add_options(bench)
    return parser


def _add_request_options(parser: argparse.ArgumentParser) -> None:
    from service.access import add_access_options

    add_access_options(parser)
    add = parser.add_argument
    add("--system", metavar="TEXT", help="a system message to begin with")
    add("--thinking", action=argparse.BooleanOptionalAction, help="let the model think first (default: its template's)")
    sampling = parser.add_argument_group("sampling (default: the checkpoint's generation_config.json, then neutral)")
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="output tokens at most")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    sampling.add_argument("--top-p", type=float, metavar="P", help="share of probability to choose from")
    sampling.add_argument("--top-k", type=int, metavar="K", help="number of tokens to choose from; 0: all")
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    add("--timeout", type=float, metavar="S", help="give up after so many seconds (default: never)")
    add("--stats", action="store_true", help="show finish reason, tokens and timings on standard error")


def _version() -> str:
    try:
        return importlib.metadata.version("lightqwen")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"  # run from a checkout


def run(argv: list[str]) -> int:
    """Run one command; raises what a user caused."""
    # gRPC's C core would write its own lines about a port in use or a certificate; they are told readably.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if argv[:1] == ["serve"]:
        return serve(argv[1:])
    arguments = build_parser().parse_args(argv)
    if arguments.command == "bench":
        return bench(arguments, argv)
    from service import talk

    return talk.generate(arguments) if arguments.command == "generate" else talk.chat(arguments)


def main() -> int:
    """Entry point of `lightqwen`: one line for what a user caused, and an exit code."""
    accept_any_text()
    try:
        return run(sys.argv[1:])
    except CommandError as error:
        for line in str(error).splitlines():
            print(f"lightqwen: error: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return 1


if __name__ == "__main__":
    sys.exit(main())
