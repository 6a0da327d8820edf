"""Post-training quantization in a run: the calibration images, the planes by importance, and the state between two groups of layers.

How layers are rounded is in `quant.layerwise`. Labels of the images are never looked at.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from csqcli.data.loaders import LoaderSettings, make_loader, stream_seed
from csqcli.data.splits import Images
from csqcli.errors import UserError
from csqcli.quant.allocators.importance import fisher_importance
from csqcli.quant.budget import allocate
from csqcli.quant.hard_layer import HardLayer
from csqcli.quant.layers import Layer
from csqcli.quant.layerwise import LayerwiseRounding, with_own_labels
from csqcli.quant.methods.base import Plan, Schedule
from csqcli.quant.methods.ptq import PostTraining
from csqcli.system import distributed
from csqcli.system.interrupt import Interrupted, StopRequest
from csqcli.system.progress import counted, planes_fixed
from csqcli.training.budgets import budget_of
from csqcli.training.run import Run
from csqcli.training.run_state import RunState
from csqcli.training.setup import allocated, shared_importance
from csqcli.training.shared_start import known_importance

_BATCH = 64  # images per forward pass
_FEW_PLANES, _MANY_IMAGES = 2.9, 2048  # docs/results.md, how long to train
_SAVE_SECONDS = 20.0  # between two states


def quantize_after_training(run: Run, layers: Sequence[Layer]) -> list[HardLayer]:
    """Quantize the run's model, from a saved state where there is one, and leave the delivered weights in it.

    The same images and seed give the same bits. UserError for a budget that cannot be met, for an image that cannot be
    read, and for moments that are not finite; Interrupted on a signal, with the state saved.
    """
    work = _Work(run, list(layers))
    work.run_all()
    distributed.copy_from_main(run.model.parameters())
    distributed.copy_from_main(run.model.buffers())
    return distributed.from_main(work.method.hard_layers())  # type: ignore[no-any-return]


def measure_importance(run: Run, layers: Sequence[Layer]) -> tuple[Tensor | None, str | None]:
    """Importance [layers, planes] of the run's model as :func:`quantize_after_training` would measure it, and the allocator that
    measured it, if any; None where an allocator decides planes without it, or for one budget only."""
    work = _Work(run, list(layers))
    work.begin()
    allocator = run.recipe.quantization.allocator
    if allocator is None:
        with run.display.step("measuring which layers matter"):
            return work._importance(), None
    return shared_importance(run, layers, work._labelled()), allocator


@dataclass
class _Work:
    """One model on its way from float to quantized."""

    run: Run
    layers: list[Layer]
    saved_at: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """The model and the images to look at."""
        run = self.run
        settings = run.recipe.method_settings
        assert isinstance(settings, PostTraining.Settings)
        self.settings = settings
        run.model.eval()
        for layer in self.layers:
            layer.parameter.requires_grad_(True)  # whoever froze them meant training
        with run.display.step("reading calibration images"):
            self.batches = self._images()

    def run_all(self) -> None:
        run = self.run
        state, run.saved = run.saved if run.saved is not None and run.saved.phase == "search" else None, None
        self.begin()
        self.method = self._planned(self._planes() if state is None else state.optimizer["method"]["planes"])
        settle = run.recipe.bn_recalibration_batches > 0
        self.rounding = LayerwiseRounding(run.model, self.method, self.batches, settle_norms=settle)
        if state is not None:
            self.method.load_state_dict(state.optimizer["method"])
            run.model.load_state_dict(state.model)
            self.rounding.go_on_after(state.batch)
            run.display.say(f"resumed after {state.batch} groups of layers")
        self._tell_unseen()
        with (
            StopRequest(patient=run.shard.world > 1) as request,
            run.display.step("rounding layer by layer", len(self.rounding.groups)) as tell,
        ):

            def after_group(done: int) -> None:
                tell(done)
                self._after_group(request)

            self.rounding.tick = lambda: tell(self.rounding.done)
            self.rounding.run(after_group)
        run.model.eval()

    def _tell_unseen(self) -> None:
        unseen = self.rounding.unseen
        if unseen:
            first, more = self.layers[unseen[0]].name, ", …" if len(unseen) > 1 else ""
            self.run.display.say(
                f"{counted(len(unseen), 'layer')} rounded to the nearest levels, because what they multiply is not seen or too "
                f"much: {first}{more}"
            )

    # -- what is looked at

    def _images(self) -> list[Tensor]:
        """The calibration images in batches, decoded once: at evaluation's crop, in an order that the seed decides."""
        run = self.run
        assert run.images.train is not None
        count = min(self.settings.images, len(run.images.train))
        order = torch.randperm(len(run.images.train), generator=_generator(run.recipe.seed, 0))
        whole = count // _BATCH * _BATCH  # a loader of training images drops what is left of its last batch
        parts = [part for part in (order[:whole], order[whole:count]) if len(part)]
        batches = [batch for part in parts for batch in self._decoded(run.images.train.subset(part.sort().values))]
        if not batches:
            raise UserError("no calibration image could be used", where=run.images.source)
        return batches

    def _decoded(self, images: Images) -> list[Tensor]:
        """Batches of images; those that cannot be decoded are passed over."""
        run = self.run
        settings = LoaderSettings(
            training=True,
            batch_size=min(_BATCH, len(images)),
            augment="none",
            workers=run.recipe.data.workers,
            seed=run.recipe.seed,
            device=run.device,
        )
        loader = make_loader(images, run.config, settings)
        try:
            return [batch for batch, _ in loader.epoch(0) if len(batch)]
        finally:
            loader.close()

    def _planes(self) -> list[int]:
        run, quantization = self.run, self.run.recipe.quantization
        budget = budget_of(run, run.recipe, self.layers)
        if quantization.allocator is not None:
            return allocated(run, quantization.allocator, self.layers, self._labelled(), budget)
        with run.display.step("measuring which layers matter"):
            importance = known_importance(run, by=None, layers=len(self.layers), bits=quantization.max_bits)
            if importance is None:
                importance = self._importance()
            planes = allocate(importance, budget)
        return distributed.from_main(planes)  # type: ignore[no-any-return]

    def _importance(self) -> Tensor:
        bits = self.run.recipe.quantization.max_bits
        return fisher_importance(self.run.model, self.layers, self._labelled(), bits, recovery=self.settings.recovery)

    def _labelled(self) -> Iterator[tuple[Tensor, Tensor]]:
        return with_own_labels(self.run.model, self.batches, _generator(self.run.recipe.seed, 1))

    def _planned(self, planes: Sequence[int]) -> PostTraining:
        run = self.run
        budget = budget_of(run, run.recipe, self.layers)
        mean = budget.mean_planes(planes)
        run.display.say(planes_fixed(planes, mean, run.target_bits))
        images = sum(map(len, self.batches))
        if mean < _FEW_PLANES and images < _MANY_IMAGES <= len(run.images.train or ()):
            run.display.say(
                f"at {mean:.2g} planes in the mean which {images} images are looked at may matter by a point: "
                f"--set ptq.images={_MANY_IMAGES} varies less and takes longer"
            )
        return PostTraining(self.layers, Plan(Schedule(0, 1), budget, planes=planes), self.settings)

    # -- interruption

    def _after_group(self, request: StopRequest) -> None:
        run = self.run
        stop = request.signum
        if run.shard.world > 1:
            stop = distributed.all_reduce_max(stop or 0, run.device) or None
        if stop is None and time.monotonic() - self.saved_at < _SAVE_SECONDS:
            return
        run.folder.save_state(
            RunState.model_construct(
                inputs=run.folder.inputs,
                phase="search",
                epoch=0,
                batch=self.rounding.done,
                losses=[],
                model=run.model.state_dict(),
                optimizer={"method": self.method.state_dict()},
                activations=run.activations.state_dict() if run.activations is not None else {},
                rng=torch.get_rng_state(),
                device_rng=None,
                record=run.record,
            )
        )
        self.saved_at = time.monotonic()
        if stop is not None:
            distributed.stop()
            raise Interrupted(stop, f"{self.rounding.done} groups of layers rounded")


def _generator(*keys: int) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(*keys))
