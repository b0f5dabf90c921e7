"""`rtresnet doctor`: what this machine can do, and the command for what it lacks."""

from __future__ import annotations

import click

from rtresnet.cli import common
from rtresnet.core.errors import CheckFailedError


@click.command("doctor")
@click.option("--gpu", is_flag=True, help="Test the GPU with small runs on it.  [default: off]")
@common.json_option
def command(json_file: str | None, gpu: bool) -> None:
    """Show what this machine can do, and the command for each thing missing."""
    if gpu:
        _show_gpu(json_file)
    else:
        _show(json_file)


def _show(json_file: str | None) -> None:
    from rtresnet.reporting import tables
    from rtresnet.workflows.doctor import ON_GPU, doctor, replacement

    result = doctor()
    common.say(f"{result.cpu}; Python {result.python}")
    for gpu in result.gpus:
        common.say(f"GPU: {gpu.name}, {gpu.target}, {gpu.memory / 2**30:.0f} GiB")
    if not result.gpus:
        common.say("GPU: none, or no driver. Plans can be built here, and run on another machine.")
    rows = [(p.package, p.version or "missing", p.purpose) for p in result.packages]
    tables.show(common.out_console(), ("package", "version", "for"), rows)
    missing = result.missing
    if "onnxruntime-gpu" in missing:
        missing.remove("onnxruntime-gpu")
        common.say(f"To {ON_GPU}: {replacement('onnxruntime-gpu')}")
    if missing:
        common.say("Missing, each with: pip install NAME - " + ", ".join(missing))
    for conflict in result.conflicts:
        common.say(f"WARNING: {conflict}")
    if result.int8_sums_saturate:
        common.say(
            "INT8: this CPU has no VNNI. Its integer sums of 16 bits could saturate, so INT8 files "
            "run in a form that cannot. They gain less speed than with VNNI."
        )
    for name, state in result.runs.items():
        common.say(f"{name}: {state}")
    common.write_json(json_file, "doctor", result)


def _show_gpu(json_file: str | None) -> None:
    from rtresnet.core.isolated import FAILED
    from rtresnet.reporting import tables
    from rtresnet.workflows.doctor_gpu import test_gpu

    results = test_gpu()
    driver = results[0].data
    for gpu in driver.get("devices", ()):
        memory = f"{gpu['memory'] / 2**30:.0f} GiB"
        common.say(
            f"GPU: {gpu['name']}, {gpu['target']}, {memory}, UUID {gpu['uuid'] or 'unknown'}"
        )
    if driver:
        common.say(f"driver: CUDA {driver['cuda']}; {driver['kernel_driver'] or 'unknown version'}")
        common.say(", ".join(f"{name} {version}" for name, version in driver["versions"].items()))
    rows = []
    for result in results:
        detail = result.reason
        if "relative_error" in result.data:
            provider = result.data["described"]["provider"]
            detail = f"{provider} and the CPU differ by {result.data['relative_error']:.1g}"
        rows.append((result.name, result.status, f"{result.seconds:.1f}", detail))
    tables.show(common.out_console(), ("step", "status", "s", "detail"), rows)
    common.write_json(json_file, "doctor", {"gpu": results})
    failed = [result for result in results if result.status == FAILED]
    if failed:
        raise CheckFailedError(
            f"{len(failed)} of {len(results)} steps failed: {failed[0].name}: {failed[0].reason}",
            fix="see stderr in: rtresnet doctor --gpu --json -",
        )
