"""The model that a recipe names, with its first weights, fitted to the classes of the images."""

from __future__ import annotations

from dataclasses import replace

from csqcli.data.specs import open_data
from csqcli.data.splits import NO_IMAGES, DataSet
from csqcli.data.unlabelled import unlabelled
from csqcli.errors import UserError
from csqcli.file.checkpoint import open_checkpoint
from csqcli.models import libraries
from csqcli.models.fitting import FittedModel, load_for
from csqcli.models.spec import ModelSpec
from csqcli.recipe.complete import check_data_given
from csqcli.recipe.schema import ZEROQ, Recipe

_CLASSIFIERS_ONLY = "csq trains image classifiers; others with csqcli.CSQ in your own loop"


def open_images(recipe: Recipe, *, train: bool = True) -> DataSet:
    """The images that a recipe names. UserError where it names none."""
    settings = recipe.data
    check_data_given(recipe)
    assert settings.source is not None
    if settings.calib == ZEROQ and train:  # they are made from the model, once there is one
        return replace(open_images(recipe, train=False), train=NO_IMAGES)
    if settings.calib is not None and train:
        return replace(open_images(recipe, train=False), train=unlabelled(settings.calib).limited(settings.train_limit))
    return open_data(
        settings.source,
        train=train,
        val_split=settings.val_split,
        val_seed=settings.val_seed,
        train_limit=settings.train_limit,
        val_limit=settings.val_limit,
    )


def open_model(recipe: Recipe, images: DataSet) -> FittedModel:
    """The model that a recipe names, for the classes of ``images``. UserError where weights or head do not fit them."""
    settings = recipe.model
    return load_for(
        settings.source or "",
        images.classes,
        head=settings.head,
        pretrained=settings.pretrained,
        checkpoint=open_checkpoint(settings.checkpoint) if settings.checkpoint is not None else None,
        weights=settings.weights,
        arguments=settings.arguments,
        classes_from=images.source,
        seed=recipe.seed,
    )


def check_task(spec: ModelSpec) -> None:
    """UserError for a model that is no image classifier."""
    task = libraries.task_of(spec)
    if task != "classification":
        raise UserError(f"is made for {task}", where=spec.source, hint=_CLASSIFIERS_ONLY)
