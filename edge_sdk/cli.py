"""The command line: each command parses, calls one room, and shows what came back.

Errors are one readable paragraph on stderr and an exit code: 0 done; 1 a defect of ours; 2 wrong usage; 3 the input is
at fault (model, spec, data, package, settings); 4 this machine lacks something (profile, backend); 5 the broker; 6 no
answer, an error for an answer, or a wrong one; 7 something hung; 130 interrupted.

Rooms are imported inside the commands, so that `--help` is quick and a device that only serves needs no builder.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edge_sdk import __version__, console
from edge_sdk.errors import EdgeSdkError

if TYPE_CHECKING:
    from edge_sdk.bench import BenchResult
    from edge_sdk.package import EnginePackage
    from edge_sdk.settings import Settings

INTERRUPTED = 130
_ENGINE_CACHE = "EDGE_SDK_ENGINE_CACHE"
"""The setting `engine_cache`, for commands that need no other."""
EXIT_CODES = __doc__.split("\n\n")[1].replace("\n", " ") if __doc__ else ""

Command = TypeVar("Command", bound=Callable[..., Any])


class Commands(click.Group):
    """A group whose commands end in one paragraph rather than a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **{**kwargs, "standalone_mode": False})
        except EdgeSdkError as exc:
            click.echo(f"Error: {exc}", err=True)
            sys.exit(exc.exit_code)
        except click.ClickException as exc:
            exc.show()
            sys.exit(exc.exit_code)
        except (click.Abort, KeyboardInterrupt):
            click.echo("Interrupted.", err=True)
            sys.exit(INTERRUPTED)
        except click.exceptions.Exit as exc:
            sys.exit(exc.exit_code)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except Exception as exc:
            if os.environ.get("EDGE_SDK_DEBUG"):
                raise
            click.echo(
                f"Error: This is a defect of edge-sdk ({type(exc).__name__}: {exc}). EDGE_SDK_DEBUG=1 shows where; "
                "please report it.",
                err=True,
            )
            sys.exit(1)


@click.group(cls=Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edge-sdk")
def main() -> None:
    """From an ONNX model to a fast engine on a device, and from an MQTT request to an answer.

    \b
    edge-sdk quickstart                             see all of it work, in a minute
    edge-sdk build-engine engines/digits            build a package for this machine
    edge-sdk serve --engines engines                answer requests over MQTT
    edge-sdk infer digits --input photo.png         ask
    """


def _with_json(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for a script.")(command)


def _with_device(command: Command) -> Command:
    return click.option("--device", metavar="ID", help="The device to ask; by default the only one that is online.")(
        command
    )


def _with_broker(command: Command) -> Command:
    for option in (
        click.option("--client", metavar="ID", help="Our client id, where the broker's rights go by it."),
        click.option(
            "--broker", metavar="URL", envvar="EDGE_SDK_BROKER__URL", help="By default mqtt://localhost:1883."
        ),
        click.option(
            "--config",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="edge-sdk.toml, for the broker and the way in.",
        ),
    ):
        command = option(command)
    return command


@main.command(short_help="See all of it work: build, serve, ask, measure.")
@click.option("--broker", metavar="URL", help="Use this broker instead of starting one on loopback.")
@click.option("--seconds", default=3.0, show_default=True, help="How long to measure throughput.")
@_with_json
def quickstart(broker: str | None, seconds: float, as_json: bool) -> None:
    """Build the bundled digits engine with INT8, serve it, ask it over MQTT, and show the figures.

    Everything it starts is gone when it ends. The exit code is 0 only if the answers were right.

    \b
    Example:
      edge-sdk quickstart
    """
    from edge_sdk.quickstart import run

    report = run(broker=broker, seconds=seconds, say=lambda text: click.echo(text, err=as_json), quiet=as_json)
    click.echo(_json(report.to_dict()) if as_json else report.text())
    if not report.right:
        click.echo(f"Error: {report.verdict}", err=True)
        sys.exit(6)


@main.group()
def profiles() -> None:
    """Device profiles: what a device can do, as data.

    \b
    Example:
      edge-sdk profiles detect
    """


@profiles.command("list")
@_with_json
def profiles_list(as_json: bool) -> None:
    """Every profile that ships with edge-sdk.

    \b
    Example:
      edge-sdk profiles list
    """
    from edge_sdk.profiles import load_profiles

    found = load_profiles()
    if as_json:
        click.echo(_json([profile.model_dump(mode="json") for profile in found]))
        return
    rows = [("name", "device", "precisions", "backends")]
    rows += [(p.name, p.title, " ".join(p.precisions), " ".join(p.backends)) for p in found]
    click.echo(console.table(rows))


@profiles.command("show")
@click.argument("name")
@_with_json
def profiles_show(name: str, as_json: bool) -> None:
    """One profile, with the source of each number.

    \b
    Example:
      edge-sdk profiles show raspberry-pi-5
    """
    from edge_sdk.profiles import load_profile

    profile = load_profile(name)
    if as_json:
        click.echo(_json(profile.model_dump(mode="json")))
    else:
        click.echo("\n".join(_settings_lines(profile.model_dump(mode="json", exclude_none=True))))


@profiles.command("detect")
@_with_json
def profiles_detect(as_json: bool) -> None:
    """Which profile fits this machine, and why.

    \b
    Example:
      edge-sdk profiles detect
    """
    from edge_sdk.profiles import Machine, detect, load_profiles

    profile, why = detect(Machine.read(), load_profiles())
    click.echo(_json({"name": profile.name, "why": why}) if as_json else f"{profile.name}\n{why}")


@main.command(short_help="What a model or a package is.")
@click.argument("path", type=click.Path(path_type=Path))
@_with_json
def inspect(path: Path, as_json: bool) -> None:
    """Say what MODEL.onnx or a PACKAGE is: inputs, outputs, operators; for a package also whether it fits here.

    \b
    Examples:
      edge-sdk inspect model.onnx
      edge-sdk inspect engines/digits/build/cpu-x86
    """
    if path.is_dir():
        from edge_sdk.package import EnginePackage

        _show_package(EnginePackage.open(path), as_json)
        return
    from edge_sdk.compile.inspect import inspect_model

    summary = inspect_model(path)
    click.echo(_json(summary.to_dict()) if as_json else "\n".join(_settings_lines(_readable(summary.to_dict()))))


def _show_package(package: EnginePackage, as_json: bool) -> None:
    from edge_sdk.doctor import engine_fit
    from edge_sdk.profiles import Machine

    machine = Machine.read(gpus=False)
    reasons, notes = package.mismatches(machine), package.notes(machine)
    package.verify()
    store = os.environ.get(_ENGINE_CACHE)
    engine = engine_fit(package, Path(store) if store else None) if not reasons else None
    manifest = package.manifest.model_dump(mode="json", exclude_none=True)
    if as_json:
        fit: dict[str, Any] = {"fits": not reasons, "why_not": list(reasons), "notes": list(notes)}
        if engine is not None:
            fit["engine"] = engine.to_dict()
        click.echo(_json({**manifest, "path": str(package.path), **fit}))
        return
    click.echo("\n".join(_settings_lines(_readable(manifest))))
    click.echo("every file matches its digest")
    click.echo("it fits this machine" if not reasons else f"it does not fit this machine: {'; '.join(reasons)}")
    for note in notes:
        click.echo(f"note: {note}")
    if engine is not None:
        click.echo(f"engine: {engine.text()}")
        if engine.fix:
            click.echo(f"        -> {engine.fix}")


@main.command(short_help="Vouch for the engine in a package from elsewhere.")
@click.argument("package", type=click.Path(path_type=Path))
@click.option(
    "--store", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="By default this user's."
)
@_with_json
def trust(package: Path, store: Path | None, as_json: bool) -> None:
    """Let this machine load the compiled engine in PACKAGE, which another machine built: do so if you know who did.

    An engine is a program. One that was built elsewhere is not loaded until its copy in this machine's store is signed
    with this machine's key, which this does - unless it would not be loaded anyhow, for another GPU or version say.

    \b
    Example:
      edge-sdk trust engines/digits/build/desktop-rtx-30
    """
    from edge_sdk.backends.tensorrt import TensorRTBackend
    from edge_sdk.package import EnginePackage

    opened = EnginePackage.open(package)
    opened.verify()
    trusted = TensorRTBackend(store).trust(opened)
    if as_json:
        engine = trusted.sidecar.model_dump(mode="json")
        click.echo(_json({"package": str(opened), "entry": str(trusted.entry), "key": trusted.key, "engine": engine}))
        return
    click.echo(f"{opened}: its engine may be loaded here from now on")
    click.echo(f"engine: {trusted.sidecar}")
    click.echo(f"copy:   {trusted.entry}, signed with this machine's key {trusted.key}")


@main.command("build-engine", short_help="Build an engine package.")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--profile", metavar="NAME", help="By default the one that fits this machine.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "fp16", "int8"]), default="auto", show_default=True)
@click.option("--calibration", metavar="PATH", help="Images, .npz, .npy or module:function, in place of the spec's.")
@click.option("--samples", type=click.IntRange(min=1), help="How many calibration samples to take.")
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="Where the package goes.")
@click.option("--force", is_flag=True, help="Build even if nothing has changed.")
@_with_json
def build_engine(
    source: Path,
    profile: str | None,
    precision: str,
    calibration: str | None,
    samples: int | None,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build an engine package from SPEC_DIR (a folder with engine.toml) or MODEL.onnx.

    Says where the package is, what it measured, and why it chose the precision it chose. A build that would give the
    same package again does nothing, and says so.

    \b
    Examples:
      edge-sdk build-engine engines/digits
      edge-sdk build-engine model.onnx --precision int8 --calibration samples.npz
    """
    from edge_sdk.backends.registry import usable_profile
    from edge_sdk.compile.pipeline import build
    from edge_sdk.profiles import Machine
    from edge_sdk.stages import build_pipeline, is_pipeline

    spec_file = source / "engine.toml" if source.is_dir() else source
    if spec_file.suffix == ".toml" and spec_file.is_file() and is_pipeline(spec_file):
        pipeline = build_pipeline(spec_file, output)
        described = {**pipeline.spec.model_dump(mode="json", exclude_none=True), "path": str(pipeline.path)}
        steps = " -> ".join(stage.name for stage in pipeline.spec.stage)
        click.echo(_json(described) if as_json else f"{pipeline.spec.name}: {steps}\npackage:  {pipeline.path}")
        return
    chosen, why = (profile, "as asked") if profile is not None else usable_profile(Machine.read())
    with console.Progress(quiet=as_json) as progress:
        built = build(
            source,
            profile=chosen,
            precision=precision,  # type: ignore[arg-type]  # click.Choice has checked it
            calibration=calibration,
            samples=samples,
            output=output,
            force=force,
            progress=progress,
        )
    package = built.package
    manifest = package.manifest
    if as_json:
        described = manifest.model_dump(mode="json", exclude_none=True)
        click.echo(_json({**described, "path": str(package.path), "unchanged": built.unchanged}))
        return
    click.echo(f"{package}: {'unchanged, nothing to do' if built.unchanged else 'built'}")
    click.echo(f"package:  {package.path}")
    click.echo(f"profile:  {manifest.profile} ({why})")
    if manifest.measurements is not None:
        click.echo(f"decision: {manifest.measurements.decision}")
        click.echo("\n" + _measurements_table(package))
    if (engine := manifest.backend.engine) is not None:
        click.echo(
            f"\nengine:   {engine.file}, {console.size(engine.bytes)}, compiled in {engine.seconds:.1f} s with at most "
            f"{console.size(engine.peak_bytes)} of memory"
        )
        for note in engine.notes:
            click.echo(f"          {note}")
    if manifest.backend.missing:
        click.echo(f"\nmissing:  {manifest.backend.missing}")


def _measurements_table(package: EnginePackage) -> str:
    measured = package.manifest.measurements
    assert measured is not None
    columns = [measured.reference, measured.engine]
    best = package.manifest.batching.best_batch
    rows = [("", *(figures.precision.upper() for figures in columns))]
    if measured.engine.top1_percent is not None:
        rows.append(("top-1", *(console.percent(figures.top1_percent) for figures in columns)))
    if measured.agreement_percent is not None:
        rows.append(("agreement", "", console.percent(measured.agreement_percent)))
    if measured.snr_db is not None:
        rows.append(("signal to noise", "", f"{measured.snr_db:.1f} dB"))
    rows.append(("size", *(console.size(figures.bytes) for figures in columns)))
    rows.append(("latency, batch 1", *(console.milliseconds(figures.latency_ms) for figures in columns)))
    if (rate := measured.engine.per_second_at_batch.get(best)) is not None:
        rows.append((f"per second, batch {best}", "", f"{rate:,.0f}"))
    return f"{console.table(rows)}\n({measured.samples} samples: {measured.judged_on})"


@main.command(short_help="Accuracy and latency of a package on data.")
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--data", required=True, metavar="PATH", help="A folder of labelled images, or .npz with x and y.")
@click.option("--against", type=click.Path(path_type=Path), metavar="PACKAGE", help="Another package to compare with.")
@click.option("--samples", type=click.IntRange(min=1), help="Take so many, evenly spread.")
@_with_json
def evaluate(package: Path, data: str, against: Path | None, samples: int | None, as_json: bool) -> None:
    """Measure a PACKAGE on your data: accuracy, agreement with another package, latency of both in one run.

    \b
    Example:
      edge-sdk evaluate engines/digits/build/cpu-x86 --data engines/digits/heldout
    """
    from edge_sdk.compile.evaluate import evaluate as evaluate_package
    from edge_sdk.package import EnginePackage

    with console.Progress(quiet=as_json) as progress:
        found = evaluate_package(
            EnginePackage.open(package),
            data,
            against=EnginePackage.open(against) if against is not None else None,
            samples=samples,
            progress=progress,
        )
    if as_json:
        click.echo(_json(found.to_dict()))
        return
    columns = [found.package] if found.against is None else [found.package, found.against]
    rows = [
        ("", *(figures.package for figures in columns)),
        ("top-1", *(console.percent(figures.top1_percent) for figures in columns)),
        ("size", *(console.size(figures.bytes) for figures in columns)),
        ("latency, batch 1", *(console.milliseconds(figures.latency_ms) for figures in columns)),
    ]
    click.echo(console.table(rows))
    if found.agreement_percent is not None:
        click.echo(f"agreement: {console.percent(found.agreement_percent)}")
    if found.snr_db is not None:
        click.echo(f"signal to noise: {found.snr_db:.1f} dB")
    click.echo(f"({found.samples} samples of {found.data})")


@main.command(short_help="Answer requests over MQTT.")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="edge-sdk.toml.")
@click.option("--engines", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Where packages are.")
@click.option("--broker", metavar="URL", help="By default mqtt://localhost:1883.")
@click.option("--device", metavar="ID", help="This device's name in topics; by default made from the machine id.")
def serve(config: Path | None, engines: Path | None, broker: str | None, device: str | None) -> None:
    """Serve every package below the engines folder until SIGTERM or Ctrl-C; SIGHUP looks at the folder again.

    \b
    Examples:
      edge-sdk serve --engines engines --broker mqtt://localhost:1883
      edge-sdk serve --config /etc/edge-sdk/edge-sdk.toml
    """
    from edge_sdk.daemon import Daemon
    from edge_sdk.logs import begin_logging
    from edge_sdk.mqtt.transports.choice import new_transport
    from edge_sdk.settings import load_settings

    def read() -> Settings:
        overrides = {"engines": engines and str(engines), "device": device, "broker": {"url": broker}}
        return load_settings(config, overrides)

    settings = read()
    begin_logging(settings.log_format, settings.log_level)
    wanted = settings.broker.transport
    group_transport = new_transport(wanted) if settings.groups else None
    code = Daemon(settings, new_transport(wanted), group_transport=group_transport, reread=read).run()
    logging.shutdown()
    os._exit(code)  # everything is closed; a thread still inside a runtime's native code must not make this an abort


@main.command(short_help="Ask a model something.")
@click.argument("model", required=False)
@click.option("--input", "source", required=True, metavar="FILE|-", help="An image, .npy or JSON; - reads stdin.")
@click.option("--local", type=click.Path(path_type=Path), metavar="PACKAGE", help="Ask this package, without a broker.")
@click.option("--timeout", default=30.0, show_default=True, help="Seconds to wait for the answer, all in all.")
@click.option("--sequence", is_flag=True, help="Send the rows of an .npy array as a sequence of a stateful model.")
@click.option("--group", metavar="NAME", help="Ask whichever device of this group gets the request.")
@_with_device
@_with_broker
@_with_json
def infer(
    model: str | None,
    source: str,
    local: Path | None,
    timeout: float,
    sequence: bool,
    group: str | None,
    config: Path | None,
    broker: str | None,
    client: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Ask MODEL with an image, a .npy array or a JSON body, over MQTT, or a PACKAGE or a pipeline in this process.

    \b
    Examples:
      edge-sdk infer digits --input engines/digits/heldout/7/0120.png
      edge-sdk infer --local engines/digits/build/cpu-x86 --input digit.png --json
    """
    from edge_sdk.asking import ask_device, ask_package

    if local is not None and model is not None:
        raise click.UsageError("Give either a MODEL to ask over MQTT, or --local PACKAGE.")
    if group is not None and (device is not None or local is not None):
        raise click.UsageError("Give one of --group, --device and --local.")
    if group is not None and sequence:
        raise click.UsageError("A sequence is on one device; --group may ask another one each time.")
    data = sys.stdin.buffer.read() if source == "-" else _read(Path(source))
    if local is not None:
        answered = ask_package(local, data, timeout_s=timeout, sequence=sequence)
    elif model is not None:
        answered = ask_device(
            model,
            data,
            settings=_at(broker, config),
            client_id=client,
            device=device,
            timeout_s=timeout,
            group=group,
            sequence=sequence,
        )
    else:
        raise click.UsageError("Give a MODEL to ask over MQTT, or --local PACKAGE.")
    click.echo(_json(answered.to_dict()) if as_json else answered.text())


@main.command(short_help="Tell a device to load, unload, drain and the like.")
@click.argument("device")
@click.argument("name", type=click.Choice(["ping", "info", "load", "unload", "deploy", "drain", "resume", "selftest"]))
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--timeout", default=60.0, show_default=True, help="Seconds to wait for the answer, all in all.")
@_with_broker
@_with_json
def command(
    device: str,
    name: str,
    arguments: tuple[str, ...],
    timeout: float,
    config: Path | None,
    broker: str | None,
    client: str | None,
    as_json: bool,
) -> None:
    """Tell DEVICE to do something, and wait until it has. Its settings must say `[commands] enabled = true`.

    \b
    Examples:
      edge-sdk command door-cam unload model=digits
      edge-sdk command door-cam load model=digits
      edge-sdk command door-cam selftest --json
    """
    from edge_sdk.asking import command_device

    given = dict(argument.partition("=")[::2] for argument in arguments)
    if wrong := [argument for argument in arguments if "=" not in argument]:
        raise click.UsageError(f"{wrong[0]!r} is no KEY=VALUE.")
    data = command_device(device, name, given, settings=_at(broker, config), client_id=client, timeout_s=timeout)
    click.echo(_json(data) if as_json else "\n".join(_settings_lines(data)) or "done")


@main.command(short_help="Who holds what on a device.")
@click.argument("device", required=False)
@click.option("--timeout", default=30.0, show_default=True, help="Seconds to wait for the next figures.")
@_with_broker
@_with_json
def stats(
    device: str | None, timeout: float, config: Path | None, broker: str | None, client: str | None, as_json: bool
) -> None:
    """Show the next figures that DEVICE publishes: memory by holder and by model, answers, the machine.

    By default the only device that is online. They come every ten seconds unless the device is told otherwise.

    \b
    Examples:
      edge-sdk stats
      edge-sdk stats door-cam --json
    """
    from edge_sdk.asking import device_stats
    from edge_sdk.overview import overview

    found = device_stats(device, settings=_at(broker, config), client_id=client, timeout_s=timeout)
    click.echo(_json(found) if as_json else overview(found))


@main.command(short_help="Throughput and latency.")
@click.argument("target")
@click.option("--input", "source", metavar="FILE", help="What to send; by default zeros.")
@click.option("--concurrency", type=click.IntRange(min=1), default=1, show_default=True, help="Requests in flight.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=5.0, show_default=True)
@_with_device
@_with_broker
@_with_json
def bench(
    target: str,
    source: str | None,
    concurrency: int,
    seconds: float,
    config: Path | None,
    broker: str | None,
    client: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Measure a PACKAGE or a pipeline in this process, or with --broker a MODEL over MQTT.

    \b
    Examples:
      edge-sdk bench engines/digits/build/cpu-x86 --concurrency 8
      edge-sdk bench --broker mqtt://localhost:1883 digits --concurrency 8 --seconds 10
    """
    from edge_sdk.asking import bench_device, bench_package

    data = _read(Path(source)) if source is not None else None
    if Path(target).is_dir() and not (_given("broker") or _given("config")):
        result = bench_package(Path(target), data, concurrency=concurrency, seconds=seconds)
    elif broker is None and config is None:
        raise click.UsageError(f"{target} is no package directory; to measure a model over MQTT give --broker URL.")
    else:
        result = bench_device(
            target,
            data,
            settings=_at(broker, config),
            client_id=client,
            device=device,
            concurrency=concurrency,
            seconds=seconds,
        )
    click.echo(_json(result.to_dict()) if as_json else _bench_text(result))
    if result.errors:
        click.echo(f"Error: {result.errors} requests failed; the first: {result.first_error}", err=True)
        sys.exit(6)


def _bench_text(result: BenchResult) -> str:
    text = (
        f"{result.per_second:,.0f} requests/s, p50 {console.milliseconds(result.p50_ms)}, "
        f"p99 {console.milliseconds(result.p99_ms)} ({result.concurrency} in flight, {result.requests:,} requests)"
    )
    if (device := result.device) is not None:
        text += (
            f"\nThe engine alone, batch {device.batch}: {console.milliseconds(device.wall_ms)}, of which the device "
            f"takes {console.milliseconds(device.device_ms)} ({console.milliseconds(device.compute_ms)} to compute)"
        )
        if device.cuda_provider_ms is not None:
            ratio = device.cuda_provider_ms / device.wall_ms
            took = console.milliseconds(device.cuda_provider_ms)
            text += f"; onnxruntime's CUDA provider: {took}, {ratio:.2f} times as long"
    return text


@main.command(short_help="What this machine has, what is wrong, what to do.")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="edge-sdk.toml.")
@click.option("--broker", metavar="URL", help="The broker to look for.")
@click.option("--engines", type=click.Path(path_type=Path), metavar="DIR", help="Packages to check.")
@_with_json
def doctor(config: Path | None, broker: str | None, engines: Path | None, as_json: bool) -> None:
    """Look at this machine: processor, GPUs, runtimes, broker, packages. Exit code 4 if something is at fault.

    \b
    Example:
      edge-sdk doctor --engines engines
    """
    from edge_sdk.doctor import examine
    from edge_sdk.settings import load_settings

    settings = load_settings(config, {"broker": {"url": broker}, "engines": engines and str(engines)})
    findings = examine(settings)
    if as_json:
        click.echo(_json([finding.to_dict() for finding in findings]))
    else:
        marks = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}
        for finding in findings:
            click.echo(f"{marks[finding.level]}  {finding.subject}: {finding.detail}")
            if finding.fix and finding.level != "ok":
                click.echo(f"       -> {finding.fix}")
    if any(finding.level == "fault" for finding in findings):
        sys.exit(4)


def _at(broker: str | None, config: Path | None = None) -> Settings:
    """Where and how to ask: the file's settings and the environment's, with this address where one is given."""
    from edge_sdk.settings import load_settings

    return load_settings(config, {"broker": {"url": broker}})


def _given(option: str) -> bool:
    """Whether an option was on the command line, rather than in the environment or left at its default."""
    return click.get_current_context().get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as exc:
        raise click.UsageError(f"{file} cannot be read: {exc.strerror or exc}.") from exc


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _readable(described: dict[str, Any]) -> dict[str, Any]:
    """Tensors on one line each; everything else as it is."""
    readable = dict(described)
    for key in ("inputs", "outputs"):
        readable[key] = [f"{t['name']}: {t['dtype']}{list(t['shape'])}" for t in described.get(key, [])]
    return readable


def _settings_lines(value: dict[str, Any], indent: int = 0) -> list[str]:
    """A nested mapping as indented `key: value` lines."""
    lines = []
    for key, item in value.items():
        if isinstance(item, dict) and item:
            lines += [f"{' ' * indent}{key}:", *_settings_lines(item, indent + 2)]
        else:
            text = ", ".join(map(str, item)) if isinstance(item, (list, tuple)) else item
            lines.append(f"{' ' * indent}{key}: {text}")
    return lines
