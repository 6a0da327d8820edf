"""One case: a mutated input, given to one reader."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

from tests.fuzz.graphs import mutate_onnx
from tests.fuzz.pickles import mutate_archive, mutate_state, odd_tensors, program, with_program
from tests.fuzz.pictures import picture
from tests.fuzz.readers import allowed, command, sound
from tests.fuzz.tensors import consistent, forge, mutate_safetensors, split
from tests.fuzz.text import assignment, environment, mutate_yaml, odd_name
from tests.fuzz.values import DEEP, mutate_bytes


class Case:
    """Input ``index`` of ``seed``: made in ``folder``, given to one reader."""

    def __init__(self, corpus: Path, folder: Path, rng: random.Random) -> None:
        self.corpus, self.folder, self.rng = corpus, folder, rng
        self.kinds = {
            "file": (self.safetensors, 50),
            "checkpoint": (self.checkpoint, 16),
            "recipe": (self.recipe, 12),
            "set": (self.set, 8),
            "onnx": (self.onnx, 8 if (corpus / "search.onnx").exists() else 0),
            "state": (self.state, 5),
            "history": (self.history, 1),
            "manifest": (self.manifest, 12),
            "pickle": (self.pickle, 10),
            "cifar": (self.cifar, 4),
            "image": (self.image, 8),
            "environment": (self.environment, 3),
            "name": (self.name, 6),
        }

    def run(self) -> str:
        """Its outcome: ``file: works`` or ``file: refused``. AssertionError, or whatever else comes, is a failure."""
        kind = self.rng.choices(list(self.kinds), [weight for _, weight in self.kinds.values()])[0]
        return f"{kind}: {self.kinds[kind][0]()}"

    def _pick(self, pattern: str) -> tuple[Path, bytes, bytes]:
        found = sorted(self.corpus.glob(pattern))
        one, two = self.rng.choice(found), self.rng.choice(found)
        return one, one.read_bytes(), two.read_bytes()

    def safetensors(self) -> str:
        path, data, other = self._pick("*-*.safetensors")
        target = self.folder / "in.safetensors"
        if self.rng.random() < 0.15:
            forge(path, self.rng, target)
            if not target.exists():
                return "unwritable"
        else:
            target.write_bytes(mutate_safetensors(data, self.rng, other))
        return self._read_somehow(target)

    def manifest(self) -> str:
        _, data, _ = self._pick("*-compact.safetensors")
        target = self.folder / "in.safetensors"
        target.write_bytes(consistent(data, self.rng))
        return self._read_somehow(target)

    def _read_somehow(self, target: Path) -> str:
        reader = self.rng.choices(
            [self._manifest, self._read, self._load, self._read_layer, self._as_checkpoint, self._command],
            [2, 3, 3, 1, 1, 2],
        )[0]
        return reader(target)

    def _manifest(self, path: Path) -> str:
        from rich.console import Console

        from csqcli.reporting.build import describe, history_beside
        from csqcli.reporting.recompute import recomputed
        from csqcli.reporting.report_page import report_page
        from csqcli.reporting.terminal import print_report

        def read() -> None:
            manifest = recomputed(path).manifest
            out = io.StringIO()
            print_report(manifest, Console(file=out, width=80), history=history_beside(path), as_stated=True)
            report_page(path).encode()
            out.getvalue().encode()
            json.dumps(describe(path)).encode()

        return allowed(read)

    def _read(self, path: Path) -> str:
        from csqcli.file import io as file_io

        return allowed(lambda: sound(file_io.read(path)))

    def _read_layer(self, path: Path) -> str:
        from csqcli.file import io as file_io

        return allowed(lambda: file_io.read_layer(path, "conv2.weight").weight())

    def _load(self, path: Path) -> str:
        import torch

        import csqcli

        def load() -> None:
            model = csqcli.load(path)
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    assert torch.isfinite(value).all() or torch.isinf(value).all(), f"{name} is not finite"

        return allowed(load)

    def _as_checkpoint(self, path: Path) -> str:
        from csqcli.file.checkpoint import open_checkpoint
        from csqcli.models import libraries

        return allowed(lambda: libraries.load("digits_cnn", num_classes=10, checkpoint=open_checkpoint(str(path))))

    def _command(self, path: Path) -> str:
        out = self.folder / "out"
        train = ("--set", "max_steps=1", "--set", "val_limit=20", "--set", "train_limit=40", "--epochs", 1, "--quiet")
        commands: list[tuple[Any, ...]] = [
            ("report", path),
            ("report", path, "--json"),
            ("evaluate", path, "--data", "digits", "--val-limit", 8),
            ("export", path, "--bit-packed", "-o", self.folder / "out.safetensors"),
            ("finetune", path, "--data", "digits", "-o", out, *train),
            ("finetune", path, "-o", out, *train),
            ("search", "--recipe", "digits", "--checkpoint", path, "-o", out, "--target-bits", 2, *train),
        ]
        return command(*self.rng.choices(commands, [3, 2, 3, 1, 1, 1, 1])[0])

    def checkpoint(self) -> str:
        import torch

        path, data, other = self._pick(
            self.rng.choice(["*.pth", "*.tar", "*.pt", "plain.safetensors", "half.safetensors"])
        )
        target = self.folder / f"in{path.suffix}"
        if path.suffix == ".safetensors":
            top, _ = split(data)
            target.write_bytes(mutate_safetensors(data, self.rng, other) if top else data)
        elif self.rng.random() < 0.25:
            state = torch.load(path, weights_only=True)
            inner = state.get("state_dict", state)
            with contextlib.suppress(Exception):  # torch cannot save some of them itself
                torch.save(dict(inner) | odd_tensors(self.rng), target)
            if not target.exists():
                return "unwritable"
        else:
            target.write_bytes(mutate_archive(data, self.rng, other))
        return self._as_checkpoint(target)

    def recipe(self) -> str:
        from csqcli.recipe import resolve as recipe

        path, data, _ = self._pick("*.yaml")
        target = self.folder / path.name
        target.write_bytes(mutate_yaml(data.decode(), self.rng))
        if self.rng.random() < 0.2:
            return command("recipes", "show", target)
        return allowed(lambda: recipe.to_yaml(recipe.resolve(str(target), {})))

    def set(self) -> str:
        from csqcli.recipe import keys
        from csqcli.recipe import resolve as recipe

        texts = [assignment(self.rng) for _ in range(self.rng.choice([1, 1, 2]))]
        return allowed(lambda: recipe.to_yaml(recipe.resolve("digits", keys.parse_assignments(texts))))

    def onnx(self) -> str:
        from csqcli.file import header

        _, data, other = self._pick("*.onnx")
        target = self.folder / "in.onnx"
        target.write_bytes(mutate_onnx(data, self.rng, other))
        if self.rng.random() < 0.4:
            return allowed(lambda: header.read_manifest(target))
        if self.rng.random() < 0.3:
            return command("report", target)
        return command("evaluate", target, "--data", "digits", "--val-limit", 8)

    def state(self) -> str:
        import torch

        from csqcli import pipeline
        from csqcli.recipe import resolve as recipe
        from csqcli.system import files
        from csqcli.system.progress import Display

        output = self.folder / "out"
        shutil.copytree(self.corpus / "unfinished", output)
        run = recipe.resolve(str(self.corpus / "full.yaml"), {})
        state = output / "resume.pt"
        for previous in output.glob("resume.previous*"):
            previous.unlink()
        kind = self.rng.random()
        if kind < 0.3:
            state.write_bytes(mutate_bytes(state.read_bytes(), self.rng))
        else:
            if kind < 0.8:
                torch.save(mutate_state(torch.load(state, weights_only=True), self.rng), state)
            else:
                state.write_bytes(mutate_archive(state.read_bytes()[:-64], self.rng, b""))
            files.seal(state)
        return allowed(lambda: pipeline.search(run, output, display=Display(quiet=True), resume=True))

    def history(self) -> str:
        shutil.copy(self.corpus / "run" / "model.safetensors", self.folder)
        lines = (self.corpus / "run" / "metrics.jsonl").read_bytes()
        deep = (DEEP + "\n").encode()
        (self.folder / "metrics.jsonl").write_bytes(self.rng.choice([mutate_bytes(lines, self.rng), deep, lines * 50]))
        return command("report", self.folder / "model.safetensors", "--json")

    def pickle(self) -> str:
        path, data, _ = self._pick(self.rng.choice(["*.pth", "*.tar", "*.pt"]))
        target = self.folder / f"in{path.suffix}"
        target.write_bytes(with_program(data, self.rng))
        return self._as_checkpoint(target)

    def cifar(self) -> str:
        from csqcli.data.specs import open_data

        data = (self.corpus / "cifar").read_bytes()
        kind = self.rng.randrange(3)
        changed = mutate_bytes(data, self.rng) if kind else program(self.rng)
        if kind == 1:
            at = self.rng.randrange(2, 200)
            changed = data[:at] + program(self.rng)[2:-1] + data[at:]
        for name in ("train", "test"):
            (self.folder / name).write_bytes(changed)
        return allowed(lambda: open_data(f"cifar100:{self.folder}"))

    def image(self) -> str:
        """One of four images of a folder; the loader must read it, pass over it, or refuse it."""
        from csqcli.data.images import FORMATS
        from csqcli.data.loaders import LoaderSettings, make_loader
        from csqcli.data.specs import open_data

        shutil.copytree(self.corpus / "images", self.folder / "images")
        kind, content = picture(self.rng)
        victim = self.rng.choice(["train", "val"])
        (self.folder / "images" / victim / "a" / "0.png").write_bytes(content)
        config = {
            "input_size": (self.rng.choice([1, 3]), 8, 8),
            "mean": (0.5,),
            "std": (0.5,),
            "interpolation": "bilinear",
        }
        lists = "" if kind in FORMATS else " although its format is not on the list"

        def read() -> None:
            images = open_data(str(self.folder / "images"))
            for part, training in ((images.train, True), (images.val, False)):
                loader = make_loader(part, config, LoaderSettings(training=training, batch_size=4))
                read = sum(len(labels) for _, labels in loader.epoch(0))
                assert read == len(part) - loader.skipped
                if training and victim == "train" and lists:
                    assert loader.skipped == 1, f"{kind} was read{lists}"

        return allowed(read)

    def environment(self) -> str:
        variables = environment(self.rng)
        train = ("--set", "max_steps=1", "--set", "val_limit=20", "--set", "train_limit=40", "--epochs", 1)
        file = self.corpus / "search-compact.safetensors"
        commands = [
            ("report", file),
            ("evaluate", file, "--data", "digits", "--val-limit", 8),
            ("search", "--recipe", "digits", "--target-bits", 2, "-o", self.folder / "out", *train),
        ]
        before = os.environ.copy()
        os.environ.update(variables)
        try:
            asked = any(name in os.environ for name in ("FORCE_COLOR", "TTY_COMPATIBLE"))  # for a terminal's signs
            return command(*self.rng.choice(commands), lines=None, steers=asked)
        finally:
            os.environ.clear()
            os.environ.update(before)

    def name(self) -> str:
        """Names that a file system allows, in every place of a command line and as class folders."""
        odd = re.sub(r"\.\.+", ".", odd_name(self.rng))  # what a user types may well lie outside
        file = self.corpus / "search-compact.safetensors"
        train = ("--set", "max_steps=1", "--set", "val_limit=20", "--set", "train_limit=40", "--epochs", 1, "--quiet")
        search = ("search", "--recipe", "digits", "--target-bits", 2, *train)
        before = os.getcwd()
        os.chdir(self.folder)
        try:
            kind = self.rng.randrange(8)
            if kind == 0:
                return command(*search, "-o", f"./{odd}")
            if kind == 1:
                shutil.copy(file, f"./{odd}.safetensors")
                return command("report", f"./{odd}.safetensors")
            if kind == 2:
                return command(*search, "-o", "out", "--set", f"layers.exclude=[{json.dumps(odd)}]")
            if kind == 3:
                return command("search", odd, "--data", "digits", "--target-bits", 2, "--no-pretrained", *train)
            if kind == 4:
                return command("inspect", "csq:digits_cnn", "--exclude", odd)
            if kind == 5:
                return command(*search, "-o", "out", "--checkpoint", odd)
            if kind == 6:
                return command("evaluate", file, "--data", odd)
            shutil.copytree(self.corpus / "images", "images")
            with contextlib.suppress(OSError):  # a name too long, or taken
                for split in ("train", "val"):
                    os.rename(f"images/{split}/a", f"images/{split}/{odd}")
            more = ("--no-pretrained", "--data", "images", "--target-bits", 2, "-o", "out", "--set", "input_size=8")
            return command("search", "csq:digits_cnn", *more, *train)
        finally:
            os.chdir(before)
