"""The float model beside the one that trains: its predictions, and what its classifier reads, as things to stay near to."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.models.heads import head_of
from csqcli.quant.measuring import logits_of

_LEAST = 1e-6  # squared length of features below which their distance is not taken relative to it


class Teacher:
    """A frozen float copy of the model under quantization, and the loss of being away from it."""

    def __init__(
        self, model: nn.Module, *, distill: float, features: float, weights: dict[str, Tensor] | None = None
    ) -> None:
        """A copy of ``model`` as it is now, or with ``weights``. ``distill``: share of the loss that follows its predictions.
        ``features``: weight of the distance of the features. UserError where ``features`` is not 0 and no single layer gives the
        model's scores."""
        self.distill, self.features = distill, features
        self.model = copy.deepcopy(model)
        if weights is not None:
            self.model.load_state_dict(weights)
        self.model.eval().requires_grad_(False)
        self._taps: list[_Tap] = []
        self._head = ""
        if features:
            try:
                self._head = head_of(model)
            except UserError as error:
                hint = "leave optimizer.distill_features at 0, or distill the predictions: optimizer.distill"
                raise UserError(error.what, where="optimizer.distill_features", hint=hint) from None

    def watch(self, model: nn.Module) -> None:
        """Listen to what the classifier of ``model`` reads, which :meth:`loss` compares. Once, before training: until then the model
        carries no hook, and may be copied."""
        if self.features and not self._taps:
            self._taps = [_Tap(net.get_submodule(self._head)) for net in (model, self.model)]

    def loss(self, images: Tensor, scores: Tensor, loss: Tensor, *, amp: bool) -> Tensor:
        """The whole loss of a batch, from the model's ``scores`` and the ``loss`` of its labels."""
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            wanted = logits_of(self.model(images))
        whole = loss if not self.distill else (1 - self.distill) * loss + self.distill * _divergence(scores, wanted)
        if not self.features:
            return whole
        ours, theirs = (tap.taken().float().flatten(1) for tap in self._taps)
        return whole + self.features * feature_distance(ours, theirs)


def _divergence(scores: Tensor, wanted: Tensor) -> Tensor:
    ours, theirs = F.log_softmax(scores.float(), dim=1), F.log_softmax(wanted.float(), dim=1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def feature_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean over images of ‖ours − theirs‖² / ‖theirs‖², both [images, features]."""
    return ((ours - theirs).square().sum(dim=1) / theirs.square().sum(dim=1).clamp_min(_LEAST)).mean()


class _Tap:
    """What a layer read in the last forward pass."""

    def __init__(self, layer: nn.Module) -> None:
        self._read: Tensor | None = None
        layer.register_forward_hook(self._note)  # behind the pre-hooks that round a layer's input

    def _note(self, layer: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        self._read = inputs[0]

    def taken(self) -> Tensor:
        read, self._read = self._read, None  # nothing of a graph stays with the model
        assert read is not None
        return read
