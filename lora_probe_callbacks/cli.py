"""The command ``lora-probe``.

Exit codes: 0 healthy, 1 unhealthy, 2 could not judge (also: what was given cannot be read).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lora_probe_callbacks.checks._base import Check
from lora_probe_callbacks.checks._catalogue import all_checks

if TYPE_CHECKING:
    from lora_probe_callbacks.report.report import ProbeReport

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Does the LoRA adapter train?")

_SCHEMA = 1  # of what --json prints; `debug` has its own

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class Dtype(StrEnum):
    """Floating types that a base can be loaded in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


class OnFailure(StrEnum):
    """What a failed check does to a run."""

    WARN = "warn"
    STOP = "stop"
    RAISE = "raise"


@app.command()
def debug(
    base: Annotated[str, typer.Option(help="The base model: a folder, or a name on the hub.")],
    adapter: Annotated[str | None, typer.Option(help="The adapter, likewise; without it a fresh one is made.")] = None,
    batch: Annotated[int, typer.Option(min=2, help="Prompts.")] = 6,
    G: Annotated[int, typer.Option("--G", min=2, help="Responses to each prompt.")] = 4,
    prompt_lens: Annotated[str, typer.Option(help="Tokens of the prompts: 48, or 32,48 to go through in turn.")] = "48",
    gen_lens: Annotated[str, typer.Option(help="Tokens of the responses, likewise.")] = "64",
    four_bit: Annotated[bool, typer.Option("--four-bit/--no-four-bit", help="Quantise the base to nf4.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU where there is one.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: bfloat16 on a GPU, else float32.")] = None,
    attn: Annotated[str | None, typer.Option(help="Attention of transformers: eager, sdpa, ...")] = None,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing.")] = False,
    seed: Annotated[int, typer.Option(help="Of the tokens and of a fresh adapter.")] = 0,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Show the gradient of every tensor.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the base's own code.")] = False,
    as_json: Json = False,
    show_traceback: Debug = False,
) -> None:
    """Look at an adapter alone, on synthetic tokens: is the fault in it, or in the code around it?"""
    with _reported(show_traceback):
        from lora_probe_callbacks.debug import diagnosis as written
        from lora_probe_callbacks.debug.debugger import run
        from lora_probe_callbacks.debug.loading import Source
        from lora_probe_callbacks.debug.results import Tokens

        source = Source(
            base=base,
            adapter=adapter,
            four_bit=four_bit,
            device=device,
            dtype=None if dtype is None else dtype.value,
            attn=attn,
            checkpointing=checkpointing,
            trust_remote_code=trust_remote_code,
        )
        tokens = Tokens(batch, G, _lengths("--prompt-lens", prompt_lens), _lengths("--gen-lens", gen_lens), seed)
        with _stdout_kept(as_json), _progress(shown=not as_json) as tell:
            found = run(source, tokens, tell)
        if as_json:
            _print_json(written.as_json(found))
        else:
            Console().print(written.rendered(found, per_layer=per_layer))
    sys.exit(0 if found.healthy else 1)


@app.command()
def verify(
    base: Annotated[str, typer.Option(help="The base model: a folder, or a name on the hub.")],
    adapter: Annotated[str, typer.Option(help="The trained adapter, likewise.")],
    merged: Annotated[
        list[str] | None, typer.Option(help="A merged model's folder, or bfloat16, nf4, int8, ...")
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="A server with prompt log-probs: http://host:port.")] = None,
    model: Annotated[str | None, typer.Option(help="The name under which it serves the adapter.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The name under which it serves the base.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A text or a JSON list of token ids a line; default: any.")
    ] = None,
    checkpoints: Annotated[list[Path] | None, typer.Option("--checkpoint", help="An earlier state of it.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds, for each answer of the server.")] = 60.0,
    four_bit: Annotated[bool, typer.Option("--four-bit/--no-four-bit", help="Quantise the base to nf4.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU where there is one.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: bfloat16 on a GPU, else float32.")] = None,
    as_json: Json = False,
    show_traceback: Debug = False,
) -> None:
    """Does what is merged or served behave as the trained adapter? Exit 0 if so, 1 if not, 2 if it cannot be told."""
    with _reported(show_traceback):
        from lora_probe_callbacks.debug.loading import Source, load
        from lora_probe_callbacks.serving.endpoint import Endpoint
        from lora_probe_callbacks.serving.prompts import read_prompts, synthetic
        from lora_probe_callbacks.serving.targets import Merged, Reloaded, Target
        from lora_probe_callbacks.serving.verify import verify_serving

        source = Source(
            base=base, adapter=adapter, four_bit=four_bit, device=device, dtype=None if dtype is None else dtype.value
        )
        with _stdout_kept(as_json):
            trained = load(source)
            tokens = synthetic(trained) if prompts is None else read_prompts(prompts, base)
            targets: list[Target] = [Merged(what) for what in merged or ()]
            if endpoint is not None:
                targets.append(Endpoint(endpoint, model=model, base_model=base_model, timeout=timeout))
            found = verify_serving(trained, tokens, *(targets or [Reloaded(adapter)]), checkpoints=checkpoints or ())
        if as_json:
            from lora_probe_callbacks.report.record import plain

            content = plain(dataclasses.asdict(found))
            _print_json({"schema": _SCHEMA, "command": "verify", "exit_code": found.exit_code, **content})
        else:
            typer.echo(str(found))
    sys.exit(found.exit_code)


@app.command()
def preflight(
    config: Annotated[str, typer.Argument(help="FILE.py:function; it returns model, optimizer and batch.")],
    show_batch: Annotated[bool, typer.Option("--show-batch", help="Show what the loss is made of.")] = False,
    as_json: Json = False,
    show_traceback: Debug = False,
) -> None:
    """Try one training step, judge it, and take it back.

    The function returns (model, optimizer, batch), or a mapping of preflight's arguments by name, such as
    loss_fn and adapter.
    """
    with _reported(show_traceback):
        from lora_probe_callbacks._preflight import preflight as rehearse

        with _stdout_kept(as_json):
            found = rehearse(**_arguments(config))
        _show(found, "preflight", as_json=as_json)
        if show_batch and not as_json:
            typer.echo(f"\n{found.supervision or 'The supervised tokens could not be seen.'}")
    sys.exit(found.exit_code)


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def run(
    command: Annotated[list[str], typer.Argument(help="What to run: -- python train.py ..., -m module, torchrun ...")],
    every_n_steps: Annotated[int, typer.Option(min=1, help="Cadence of the periodic checks.")] = 50,
    on_failure: Annotated[OnFailure, typer.Option(help="What a failed check does to the run.")] = OnFailure.WARN,
    record: Annotated[Path | None, typer.Option(help="Append what is found to this record.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 if unhealthy, 2 if unproven.")] = False,
    show_traceback: Debug = False,
) -> None:
    """Run a training command that knows nothing of this package, with every trainer in it probed.

    Attaches to each transformers.Trainer, Lightning Trainer and Accelerator, also in processes that the command
    starts. The exit code is that of the command.
    """
    with _reported(show_traceback):
        from lora_probe_callbacks.integrations.runner import run as run_attached

        intent = {"every_n_steps": every_n_steps, "on_failure": on_failure.value}
        if record is not None:
            intent["record"] = str(record.resolve())
        code = run_attached(
            command, intent, strict=strict, tell=lambda line: typer.echo(f"lora-probe run: {line}", err=True)
        )
    sys.exit(code)


@app.command()
def report(
    record: Annotated[Path, typer.Argument(help="A record: what record= was given.")],
    html: Annotated[Path | None, typer.Option(help="Write the page to this file.")] = None,
    as_json: Json = False,
    show_traceback: Debug = False,
) -> None:
    """Show the last run of a record, and write its page."""
    with _reported(show_traceback):
        from lora_probe_callbacks.report.page import page
        from lora_probe_callbacks.report.runs import read_runs

        runs = read_runs(record)
        if html is not None:
            html.parent.mkdir(parents=True, exist_ok=True)
            # A lone surrogate, which JSON can hold and UTF-8 cannot, becomes a question mark.
            html.write_text(page(runs), encoding="utf-8", errors="replace")
        last = runs[-1].report
        _show(last, "report", as_json=as_json)
        if html is not None and not as_json:
            typer.echo(f"\nPage: {html}")
    sys.exit(last.exit_code)


@app.command()
def explain(
    code: Annotated[str | None, typer.Argument(help="Code or name of a check, for instance LP103.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Explain every check.")] = False,
) -> None:
    """Say what a check looks at, why the fault is silent, and how to mend it."""
    if everything == (code is not None):
        typer.echo("got neither or both of CODE and --all, expected one: lora-probe explain LP103", err=True)
        raise typer.Exit(2)
    found = [check for check in all_checks() if everything or code in (check.code, check.code.lower(), check.name)]
    if not found:
        typer.echo(f"got {code!r}, expected a code or a name from `lora-probe checks`", err=True)
        raise typer.Exit(2)
    typer.echo("\n\n".join(map(explanation, found)))


@app.command()
def checks(as_json: Json = False) -> None:
    """List all checks."""
    if as_json:
        listed = [{"code": c.code, "name": c.name, "family": c.family, "what": c.what} for c in all_checks()]
        _print_json({"schema": _SCHEMA, "command": "checks", "checks": listed})
        return
    table = Table("code", "name", "family", "what", box=None, pad_edge=False)
    for check in all_checks():
        table.add_row(check.code, check.name, check.family, check.what)
    Console().print(table)


@app.command()
def selftest(as_json: Json = False, show_traceback: Debug = False) -> None:
    """Run every fault on a tiny model, and show which check finds it and when. Exit 1 if one is missed."""
    rows, missed = [], []
    with _reported(show_traceback):
        from lora_probe_callbacks.faults import FAULTS
        from lora_probe_callbacks.faults.selftest import selftest as run_all

        with _stdout_kept(as_json), _progress(shown=not as_json, total=len(FAULTS)) as tell:
            for outcome in run_all():
                tell(outcome.fault.name)
                f, found = outcome.finding, outcome.found
                if not found:
                    missed.append(outcome.fault.name)
                rows.append(
                    {
                        "fault": outcome.fault.name,
                        "entry": outcome.fault.entry,
                        "expected": outcome.fault.code,
                        "by_step": outcome.due,
                        "code": None if f is None else f.code,
                        "status": None if f is None else f.status,
                        "step": None if f is None else f.step,
                        "others": list(outcome.others),
                        "found": found,
                    }
                )
        if as_json:
            _print_json({"schema": _SCHEMA, "command": "selftest", "found": len(rows) - len(missed), "faults": rows})
        else:
            Console().print(_trials(rows))
            typer.echo(f"{len(rows) - len(missed)} of {len(rows)} faults found")
            for name in missed:
                typer.echo(f"missed: {name}", err=True)
    sys.exit(1 if missed else 0)


def _trials(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("entry", "fault"):
        table.add_column(title, overflow="fold")
    for title in ("found by", "as", "at step", "due"):
        table.add_column(title, no_wrap=True)
    for row in rows:
        code = row["code"] if row["found"] else f"{row['code']}, not {row['expected']}"
        beside = "".join(f" and {other}" for other in row["others"])
        table.add_row(
            row["entry"],
            row["fault"],
            f"[{'green' if row['found'] else 'red'}]{code}{beside}[/]",
            str(row["status"]),
            str(row["step"]),
            str(row["by_step"]),
        )
    return table


def explanation(check: Check) -> str:
    """The text of a check, as the command prints it.

    Args:
        check: A check of the catalogue.

    Returns:
        Some lines of plain text.
    """
    parts = [f"{check.code} {check.name} ({check.family})"]
    for title, text in (
        ("What it reports", check.what),
        ("Why it is silent", check.why),
        ("What to do", check.fix),
        ("Stays quiet on", check.quiet),
        ("Public reports", ", ".join(check.threads)),
    ):
        if text:
            parts.append(f"\n{title}\n{textwrap.indent(textwrap.fill(text, 100), '  ')}")
    return "\n".join(parts)


def main() -> None:
    """Run the command."""
    app()


# --- what the commands share --------------------------------------------------------------------


class _UsageError(Exception):
    """What was given on the command line cannot be used."""


@contextmanager
def _reported(show_traceback: bool) -> Iterator[None]:
    """Every error is one line on stderr and exit code 2; its traceback only if it is asked for."""
    # At its import bitsandbytes (0.50) tells of an optional kernel for inference; nothing here needs it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        yield
    except Exception as error:
        if show_traceback:
            typer.echo(traceback.format_exc(), err=True, nl=False)
        typer.echo(_in_one_line(error), err=True)
        raise typer.Exit(2) from None


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"lora-probe: {error.filename}: {error.strerror}"
    # Ours say what was got and what to do; of others the kind says something too.
    own = type(error).__module__.startswith("lora_probe_callbacks")
    return f"lora-probe: {text}" if own and text else f"lora-probe: {type(error).__name__}: {text}".rstrip(": ")


def _lengths(option: str, text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise _UsageError(f"got {option} {text!r}, expected a number, or several with commas: 32,48") from None
    if min(lengths) < 1:
        raise _UsageError(f"got {option} {text!r}, expected lengths of at least 1")
    return lengths


def _arguments(config: str) -> dict[str, Any]:
    """The arguments of a preflight, as the user's function returns them."""
    returned = _called(config)
    if isinstance(returned, Mapping):
        return dict(returned)
    if isinstance(returned, tuple | list) and len(returned) == 3:
        return dict(zip(("model", "optimizer", "batch"), returned, strict=True))
    raise _UsageError(
        f"got {type(returned).__name__} from {config}, expected (model, optimizer, batch), or a mapping of preflight's "
        "arguments by name"
    )


def _called(config: str) -> Any:
    """What a function in a file returns, the file being run as Python would run it."""
    name, _, function = config.rpartition(":")
    path = Path(name).expanduser()
    if not name or not function.isidentifier():
        raise _UsageError(f"got {config!r}, expected FILE.py:function")
    if not path.is_file():
        raise _UsageError(f"got {name}, which is no file; expected FILE.py:function")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise _UsageError(f"got {name}, expected a Python file: FILE.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
        made = getattr(module, function, None)
        if not callable(made):
            raise _UsageError(f"got {config}, but {name} defines no function {function!r}")
        return made()
    finally:
        sys.path.remove(str(path.resolve().parent))


def _show(found: ProbeReport, command: str, *, as_json: bool) -> None:
    if not as_json:
        Console().print(found)
        return
    from lora_probe_callbacks.report.record import plain

    _print_json(
        {
            "schema": _SCHEMA,
            "command": command,
            "healthy": found.healthy,
            "judged_steps": found.judged_steps,
            "findings": plain([dataclasses.asdict(f) for f in found.findings]),
            "metrics": plain(found.metrics),
        }
    )


def _print_json(content: Mapping[str, object]) -> None:
    typer.echo(json.dumps(content, allow_nan=False, indent=2))


@contextmanager
def _progress(*, shown: bool, total: int = 10) -> Iterator[Callable[[str], None]]:
    """Tells on a terminal what is being done and for how long, and nothing elsewhere."""
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda _: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        # of the debugger: loading, on/off, S, A to D, mu_Y, three backends
        task = progress.add_task("starting", total=total)

        def tell(what: str) -> None:
            progress.update(task, description=what, advance=1)

        yield tell


@contextmanager
def _stdout_kept(for_json: bool) -> Iterator[None]:
    """Whatever else prints must not get between the lines of the object."""
    with redirect_stdout(sys.stderr) if for_json else nullcontext():
        yield
