"""What the mutations start from: everything that csq reads, made by csq."""

from __future__ import annotations

import contextlib
import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def build_corpus(folder: Path) -> None:
    """Everything that csq reads, made by csq: about ten seconds, two thirds of them the ONNX export."""
    import safetensors.torch
    import torch

    from csqcli import pipeline
    from csqcli.exporting.run import export_file
    from csqcli.file import io as file_io
    from csqcli.models import networks as models
    from csqcli.recipe import resolve as recipe
    from csqcli.recipe import yaml_files
    from csqcli.system.progress import Display
    from csqcli.training.loop import Trainer
    from tests.quantized_models import make_file

    settings = {"epochs": 2, "max_steps": 1, "data.val_limit": 20, "threads": 1, "bn_recalibration_batches": 1}
    settings |= {"data.train_limit": 40, "quantization.target_bits": 2, "quantization.act_bits": 8}
    run = recipe.resolve("digits", settings)
    learned = recipe.resolve("digits", settings | {"epochs": 1, "quantization.method": "lq-nets"})
    for name in ("run", "unfinished", "learned"):
        (folder / name).mkdir()
    pipeline.search(run, folder / "run", display=Display(quiet=True), force=True)
    pipeline.search(learned, folder / "learned", display=Display(quiet=True), force=True)
    original, done = Trainer.run_epoch, iter(range(9))

    def interrupted(self: Any, epoch: int, **more: Any) -> Any:
        if next(done) == 1:
            raise KeyboardInterrupt
        return original(self, epoch, **more)

    Trainer.run_epoch = interrupted  # type: ignore[method-assign]
    try:
        with contextlib.suppress(KeyboardInterrupt):
            pipeline.search(run, folder / "unfinished", display=Display(quiet=True), force=True)
    finally:
        Trainer.run_epoch = original  # type: ignore[method-assign]
    file = file_io.read(folder / "run" / "model.safetensors")
    basis = file_io.read(folder / "learned" / "model.safetensors")
    holes = make_file("csq:digits_cnn")
    for form in ("compact", "int8-packed", "bit-packed", "state-dict"):
        for name, content in (("search", file), ("holes", holes), ("basis", basis)):
            if name == "basis" and form == "int8-packed":  # which holds integers × scale alone
                continue
            content.manifest.sizes.file_bytes = None
            file_io.write(folder / f"{name}-{form}.safetensors", content, form=form)  # type: ignore[arg-type]
    if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript"):
        export_file(folder / "search-compact.safetensors", folder / "search.onnx", form="onnx")
    torch.manual_seed(0)
    state = models.digits_cnn().state_dict()
    safetensors.torch.save_file(state, folder / "plain.safetensors")
    safetensors.torch.save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in state.items()}, folder / "half.safetensors"
    )
    torch.save({"state_dict": state, "epoch": 3}, folder / "wrapped.pth")
    torch.save(state, folder / "plain.tar")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "full.yaml").write_text(recipe.to_yaml(run))
    for name in yaml_files.builtin_names():
        (folder / f"{name}.yaml").write_text((yaml_files.shipped() / f"{name}.yaml").read_text())

    # ---- one case
    rng = np.random.default_rng(0)
    batch = {"data": rng.integers(0, 255, (6, 3072), np.uint8), "fine_labels": rng.integers(0, 9, 6).tolist()}
    (folder / "cifar").write_bytes(pickle.dumps(batch, protocol=2))
    for split in ("train", "val"):
        for label in ("a", "b"):
            (folder / "images" / split / label).mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / label / f"{number}.png")
