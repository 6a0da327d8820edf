"""A folder of images of which nobody says what they show: enough to calibrate on."""

from __future__ import annotations

from pathlib import Path

import torch

from csqcli.data.class_folders import SUFFIXES, is_hidden
from csqcli.data.sources.folder import Disk
from csqcli.data.splits import Images
from csqcli.errors import UserError


def unlabelled(folder: str) -> Images:
    """Every image below ``folder``, in sorted order, all with label 0. UserError where it is no folder or holds none."""
    if not Path(folder).is_dir():
        raise UserError("no such folder", where=folder, hint="--calib takes a folder of images, in any subfolders")
    disk = Disk(folder)
    found = [path.lstrip("/") for path in disk.files("")]
    shown = [path for path in found if not any(map(is_hidden, path.split("/"))) and path.lower().endswith(SUFFIXES)]
    if not shown:
        raise UserError("no images", where=folder, hint=f"looked for {', '.join(SUFFIXES)}")
    labels = torch.zeros(len(shown), dtype=torch.long)
    return Images(labels, paths=[disk.root + path for path in shown], root=disk.root)
