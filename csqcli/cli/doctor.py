"""``csq doctor``."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from csqcli.cli import output
from csqcli.cli.options import JsonOption
from csqcli.errors import UserError, install

_GIB = 2**30


def doctor(as_json: JsonOption = False) -> None:
    """Check the installation and the machine.

    Versions, extras, devices, memory and disk, and a self-test of some seconds on every kind of device.

    Example: csq doctor
    """
    from csqcli.system.environment import describe
    from csqcli.version import __version__

    found: dict[str, Any] = {"csq": __version__} | describe(Path.cwd())
    kinds = {device["name"].partition(":")[0]: device["name"] for device in reversed(found["devices"])}
    found["self_test"] = [_self_test(device) for device in reversed(kinds.values())]
    if as_json:
        output.as_json(found)
    else:
        output.lines(_lines(found), indent=12)
    broken = [test for test in found["self_test"] if not test["passed"]]
    if broken:
        raise UserError(broken[0]["what"], where=f"self-test on {broken[0]['device']}")


def _self_test(device: str) -> dict[str, Any]:
    """Search the embedded digits for an epoch, write, read back, evaluate again."""
    from csqcli import api

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="csq-doctor-") as folder:
        try:
            report = api.search(recipe="digits", target_bits=2, epochs=1, output=folder, device=device)
            again = api.evaluate(Path(folder) / "model.safetensors", "digits", device=device)
        except (UserError, RuntimeError) as error:
            passed, what = False, str(error).partition("\n")[0]
        else:
            wanted, bits = report["accuracy"]["hard_top1"], report["budget"]["mean_bits"]
            passed = again["top1"] == wanted and bits <= 2
            what = f"digits at {bits:.2f} bits: top-1 {wanted:.2f} %, evaluated again {again['top1']:.2f} %"
    return {"device": device, "passed": passed, "what": what, "seconds": round(time.perf_counter() - started, 1)}


def _lines(found: dict[str, Any]) -> list[str]:
    def row(label: str, text: str) -> str:
        return f"{label:<11} {text}"

    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in found["packages"].items())
    lines = [
        row("csq", f"{found['csq']}, Python {found['python']}, {found['platform']}"),
        row("packages", versions),
    ]
    for extra, packages in found["extras"].items():
        missing = [name for name, version in packages.items() if version is None]
        have = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
        lines.append(row(f"[{extra}]", f"not installed: {install(extra)}" if missing else have))
    lines.append(row("processor", f"{found['cpus']} cores, {found['threads']} threads used"))
    for device in found["devices"]:
        free = device["free_bytes"]
        memory = f", {free / _GIB:.1f} GiB free" if free is not None else ""
        lines.append(row(device["name"], f"{device['what']}{memory}"))
    lines.append(row("disk", f"{found['disk_free_bytes'] / _GIB:.1f} GiB free here"))
    for test in found["self_test"]:
        verdict = "passed" if test["passed"] else "FAILED"
        lines.append(row("self-test", f"{verdict} on {test['device']} in {test['seconds']:.1f} s: {test['what']}"))
    return lines
