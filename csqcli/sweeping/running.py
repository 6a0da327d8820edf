"""The runs of a sweep, one after the other in this process or several at a time elsewhere: missing ones run, stopped ones go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from csqcli import pipeline
from csqcli.data.splits import DataSet
from csqcli.errors import UserError
from csqcli.exporting.run import export_file
from csqcli.file import header
from csqcli.recipe.schema import Recipe
from csqcli.sweeping.folder import read_base, read_member
from csqcli.sweeping.plan import FORM, PACKED_FILE, START, Member
from csqcli.system import distributed
from csqcli.system.device import pick_device
from csqcli.system.launcher import is_main_process
from csqcli.system.progress import Display
from csqcli.system.run_files import MODEL_FILE
from csqcli.training.inputs import inputs_of
from csqcli.training.opening import open_images
from csqcli.training.shared_start import SharedStart

Report = dict[str, Any]


def shared_start(
    base: Recipe, folder: Path, images: DataSet, *, display: Display, searches: Sequence[Recipe] = ()
) -> SharedStart:
    """What the runs share, from the sweep's folder, or found now. UserError where it is that of other images or settings."""
    path = folder / START
    found = SharedStart.read(path)
    if found is None:
        display.say(f"what the runs share, into {path}")
        pipeline.prepare(base, path, display=display, images=images, resume=True, searches=searches)
        found = SharedStart.read(path)
        assert found is not None
    else:
        shard, _ = distributed.start(pick_device(base.device))
        found.check_same(inputs_of(base, images, shard), where=str(path))
    return found


def run_member(
    member: Member, folder: Path, *, shared: SharedStart, display: Display, images: DataSet | None = None
) -> Report:
    """Run, resume or read one; its report. Beside its model lies the bit-packed file whose size counts. UserError as
    `pipeline.search`."""
    output, start = folder / member.key, member.recipe.model.warm_start
    if member.begins_with is not None and start is not None and not Path(start).is_file():
        hint = f"remove the folder {folder / member.begins_with}, and the same command makes it anew; or pass --cold"
        raise UserError("is gone, and others begin with it", where=start, hint=hint)
    report = pipeline.search(
        member.recipe,
        output,
        display=display,
        resume=True,
        images=images,
        shared=shared,
        latents=member.is_first,
    )
    packed = output / PACKED_FILE
    if is_main_process() and not _is_of(packed, report):
        export_file(output / MODEL_FILE, packed, form=FORM, trust_code=True, force=True, display=display)
    return report


def run_here(members: Sequence[Member], base: Recipe, folder: Path, *, display: Display) -> dict[str, Report]:
    """Every run in this process, in the order given; reports by key."""
    found: dict[str, Report] = {}
    with distributed.held(pick_device(base.device)):
        with display.step(f"listing the images of {base.data.source}"):
            images = open_images(base)
        searches = [member.recipe for member in members]
        shared = shared_start(base, folder, images, display=display, searches=searches)
        for number, member in enumerate(members, 1):
            display.say(
                f"run {number} of {len(members)}: {member.method} at {member.target:g}, into {folder / member.key}"
            )
            found[member.key] = run_member(member, folder, shared=shared, display=display, images=images)
    return found


def run_one(folder: Path, key: str, *, display: Display) -> None:
    """One run that sweep.json describes, or, where ``key`` says so, what the runs share. UserError as `pipeline.search`."""
    if key == START:
        base = read_base(folder)
        shared_start(base, folder, open_images(base), display=display)
        return
    shared = SharedStart.read(folder / START)
    if shared is None:
        raise UserError("what the runs share is not there yet", where=str(folder), hint="run `csq sweep`")
    run_member(read_member(folder, key), folder, shared=shared, display=display)


def _is_of(packed: Path, report: Mapping[str, Any]) -> bool:
    """Whether a file is there, and holds the integers of a run."""
    if not packed.exists():
        return False
    try:
        return header.read_manifest(packed).payload_sha256 == report["payload_sha256"]
    except UserError:
        return False
