"""The command line, one module per verb. Results go to stdout, messages to stderr; user errors exit with 2."""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
import traceback
from typing import Any, NoReturn

import click

from swin_deploy.errors import SwinDeployError, printable, system_limit

# Raised by click 8.2 and newer without arguments; the help text is shown.
NO_ARGUMENTS: tuple[type[click.UsageError], ...] = tuple(
    error for error in (getattr(click.exceptions, "NoArgsIsHelpError", None),) if error is not None
)

# verb -> module, imported when the verb is used, and summary
VERBS = {
    "variants": ("list_variants", "List every published Swin and Swin V2 checkpoint."),
    "export": ("export", "Export a checkpoint to a verified ONNX bundle."),
    "quantize": ("quantize", "Add INT8 or FP8 graphs to a bundle."),
    "build-engine": ("build_engine", "Compile a bundle into TensorRT engines."),
    "refit": ("refit", "Put the weights back into engines compiled without them."),
    "inspect": ("inspect", "Count the nodes, FLOPs, kernels and bytes of graphs and engines."),
    "diff": ("diff", "Compare two graphs of one network, and name the first part that differs."),
    "debug": ("debug", "Find the layers that cost a quantized graph its accuracy."),
    "verify": ("verify", "Check the files of a bundle, and compare its graphs with PyTorch."),
    "tune": ("tune", "Measure which back end runs a bundle fastest, and store the result in it."),
    "predict": ("predict", "Classify images."),
    "classify": ("classify", "Classify a whole data set into a file."),
    "serve": ("serve", "Serve a bundle over HTTP."),
    "evaluate": ("evaluate", "Measure the accuracy of a bundle's graphs on images."),
    "bench": ("bench", "Measure latency, throughput, memory and cold start on this machine."),
    "report": ("report", "Write what is known about a bundle as an HTML page."),
    "publish": ("publish", "Write a bundle as files for Triton, DeepStream, a web page and others."),
    "doctor": ("doctor", "Check what this machine can do, and what to install for the rest."),
}


class Verbs(click.Group):
    """Finds the verbs of VERBS, in that order."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        name, summary = VERBS[cmd_name]
        command: click.Command = importlib.import_module(f"swin_deploy.cli.{name}").command
        command.short_help = summary
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them, which takes longer than all the rest."""
        with formatter.section("Commands"):
            formatter.write_dl([(verb, summary) for verb, (_, summary) in VERBS.items()])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="swin-deploy")
def cli() -> None:
    """Export Swin Transformers (V1 and V2) to ONNX, quantize them, compile TensorRT engines, and run them.

    Typical use, in one directory:

    \b
      swin-deploy export --variant swinv2-tiny
      swin-deploy build-engine --fp16
      swin-deploy predict swinv2-tiny photo.jpg
    """


def main() -> None:
    """Run the command line and exit: 0 success, 1 insufficient result, 2 user error, 3 quantization gate not met."""
    # A terminated export must still remove its partial folder. Signals that were ignored stay ignored (nohup, &).
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _stop)
    try:
        code = cli.main(standalone_mode=False)  # the value that a verb passed to Context.exit
        if sys.stdout is not None:
            sys.stdout.flush()  # while a full disk can still be reported
        if _signals:
            _stopped()
    except NO_ARGUMENTS as error:
        error.show()
        sys.exit(error.exit_code)
    except click.UsageError as error:
        verb = error.ctx.command_path if error.ctx else "swin-deploy"
        _fail(f"{error.format_message().rstrip('.')}. See: {verb} --help", error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except SwinDeployError as error:
        if _signals:
            _stopped()
        gone = system_limit(FileNotFoundError())  # then relative paths lead nowhere
        _fail(f"{error} {gone}" if gone and gone not in str(error) else str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        _stopped(str(error.__cause__ or error))  # click raises its own error from an interrupt
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except Exception as error:
        if _signals:
            _stopped()  # torch wraps an interrupt as a failed export
        traceback.clear_frames(error.__traceback__)  # if memory ran out, the sentence needs some
        if (sentences := system_limit(error)) is not None:
            _fail(sentences, 2)
        if not isinstance(error, OSError):
            raise
        [*_, (frame, _)] = traceback.walk_tb(error.__traceback__)
        if error.filename is None and frame.f_globals.get("__name__") in (__name__, "click.utils"):
            reason = error.strerror or error  # such as a full disk
            _fail(f"The result cannot be written to stdout: {reason}. Redirect it to another place.", 2)
        what = f"{error.filename}: " if error.filename else ""
        _fail(f"The operating system refused: {what}{error.strerror or error}.", 2)
    sys.exit(code if isinstance(code, int) else 0)


_signals: list[int] = []


def _stop(signum: int, frame: Any) -> None:
    """Interrupt the verb and remember the signal: libraries may wrap or drop the KeyboardInterrupt."""
    _signals.append(signum)
    handler = signal.getsignal(signal.SIGINT)
    if signum != signal.SIGINT and callable(handler):
        handler(signal.SIGINT, frame)  # like Ctrl-C; while a compiler runs, its handler raises nothing through native code
    else:
        raise KeyboardInterrupt


def _stopped(left: str = "") -> NoReturn:
    """Exit with what an interrupted verb left: nothing, unless it says so."""
    signum = _signals[0] if _signals else signal.SIGINT
    word = "interrupted" if signum == signal.SIGINT else "terminated"
    _fail(f"{word}; {left or 'no partial files were left'}", 128 + signum)


def _fail(sentence: str, code: int) -> NoReturn:
    # One line, even if the message of a library has several.
    click.echo(f"swin-deploy: {' '.join(printable(sentence).splitlines())}", err=True)
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.close()  # otherwise Python tries to flush again at exit, and complains
    sys.exit(code)
