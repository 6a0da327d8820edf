"""Every key of a recipe is set at least once on a command line, and a run made of it ends well.

``RUNS`` is the table. A new key without a row fails ``test_every_key_has_a_row``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from csqcli.quant.catalog import CARDS
from csqcli.recipe.schema import Recipe

DIGITS = "search --recipe digits --quiet"
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "a size": (
        DIGITS,
        {"max_steps": 2, "epochs": 2, "quantization.target_size": 14_000, "quantization.ship_as": "bit-packed"},
    ),
    "a compression": (DIGITS, {"max_steps": 2, "epochs": 2, "quantization.target_compression": 4}),
    "bit operations": (DIGITS, {"max_steps": 2, "epochs": 2, "quantization.target_bops": 5e7}),
    "milliseconds, measured": (
        DIGITS,
        {"max_steps": 2, "epochs": 2, "quantization.target_latency": 1e5, "quantization.latency_engine": "torch"},
    ),
    "staged, data, layers": (
        DIGITS,
        {
            "description": "a line",
            "epochs": 2,
            "max_steps": 4,
            "seed": 5,
            "threads": 1,
            "device": "cpu",
            "log": ["tensorboard"],
            "channels_last": "on",
            "save_every_minutes": 0.001,
            "bn_recalibration_batches": 2,
            "model.head": "new",
            "model.weights": "raw",
            "data.source": "digits",
            "data.batch_size": 32,
            "data.micro_batch": 16,
            "data.eval_batch_size": 100,
            "data.workers": 0,
            "data.augment": "crop",
            "data.mean": [0.3],
            "data.std": [0.4],
            "data.interpolation": "nearest",
            "data.crop_pct": 0.9,
            "data.val_split": 0.2,
            "data.val_seed": 3,
            "data.train_limit": 400,
            "data.val_limit": 60,
            "quantization.method": "staged",
            "quantization.target_bits": 2.5,
            "quantization.latency_table": None,  # its other value is tests/cli/test_options.py's
            "quantization.cost": "weights",
            "quantization.max_bits": 6,
            "quantization.state_dtype": "bfloat16",
            "staged.search_share": 0.5,
            "staged.soft_share": 0.75,
            "staged.beta_initial": 2.0,
            "staged.beta_final": 30.0,
            "staged.latent_lr": 0.02,
            "staged.latent_lr_power": 1.0,
            "staged.fisher_decay": 0.9,
            "staged.refresh_every": 1,
            "staged.recovery": 0.5,
            "staged.per_channel": False,
            "staged.step_factor": 1.3,
            "staged.scale_lr": 0.01,
            "layers.exclude": ["conv1"],
            "layers.min_bits": {"fc": 2},
            "layers.max_bits": {"conv2": 3},
            "layers.floor": 0,
            "adaptation.epochs": 1,
            "adaptation.lr": 0.001,
            "finetune.epochs": 1,
            "finetune.lr": 0.01,
            "finetune.staged_lr": 0.003,
            "finetune.teacher": "builtin:digits_float",
        },
    ),
    "optimizer, activations": (
        DIGITS,
        {
            "epochs": 1,
            "max_steps": 3,
            "amp": "bf16",
            "quantization.target_bits": 4,
            "batchnorm": "frozen",
            "quantization.act_bits": "auto",
            "quantization.target_act_bits": 4,
            "quantization.act_per": "macs",
            "quantization.act_method": "pact",
            "quantization.allocator": "importance",
            "quantization.trials": 5,
            "layers.keep": ["fc"],
            "optimizer.name": "sgd",
            "optimizer.lr": 0.02,
            "optimizer.momentum": 0.8,
            "optimizer.weight_decay": 0.001,
            "optimizer.schedule": "steps",
            "optimizer.milestones": [1],
            "optimizer.warmup_epochs": 0.5,
            "optimizer.clip_grad_norm": 1.0,
            "optimizer.label_smoothing": 0.1,
            "optimizer.distill": 0.3,
            "optimizer.distill_features": 0.5,
            "optimizer.mixup": 0.2,
            "optimizer.cutmix": 0.2,
            "optimizer.on_nonfinite": "rollback",
        },
    ),
    "planes written by hand": (
        f"{DIGITS} --target-bits 3 --method ste",
        {"max_steps": 1, "epochs": 1, "quantization.allocator": "manual", "quantization.planes": {"*": 2, "fc": 5}},
    ),
    "model": (
        "search --quiet --epochs 1 --target-bits 2 --data digits",
        {
            "model.source": "tests.plain_models:Corners",
            "model.pretrained": False,
            "model.checkpoint": None,
            "model.warm_start": None,  # its other value is tests/sweeping/test_sweep.py's
            "model.arguments": {"tiny": 0.5},
            "data.input_size": 10,
            "max_steps": 1,
            "compile": False,  # its other value is tests/cli/test_options.py's
            "quantization.method": "staged",
        },
    ),
    "ptq": (
        f"{DIGITS} --epochs 0 --target-bits 2",
        {
            "quantization.method": "ptq",
            "data.calib": "zeroq",
            "ptq.images": 40,
            "ptq.passes": 2,
            "ptq.rounding": "nearest",
            "ptq.follow_inputs": False,
            "ptq.correct_bias": False,
            "ptq.damping": 0.1,
            "ptq.recovery": 1.0,
            "ptq.zeroq_images": 40,
            "ptq.zeroq_steps": 3,
        },
    ),
    **{
        name: (
            f"{DIGITS} --epochs 2",
            {
                "max_steps": 3,
                "quantization.method": name,
                "quantization.target_bits": 1 if name in ("twn", "xnor") else 2,
                **{f"{name}.{key}": value for key, value in settings.items()},
            },
        )
        for name, settings in (
            (
                "parq",
                {
                    "anneal_start": 0.1,
                    "anneal_end": 0.6,
                    "steepness": 50.0,
                    "refit_every": 2,
                    "per_channel": False,
                    "step_factor": 1.0,
                },
            ),
            ("ste", {"per_channel": True}),
            ("lsq", {"per_channel": True}),
            ("dorefa", {"rescale": False}),
            ("pact", {"rescale": False, "quantizer": "sawb"}),
            ("lq-nets", {"iterations": 2, "decay": 0.5, "per_channel": False}),
            ("bsq", {"strength": 0.1, "requantize_share": 0.3, "search_share": 0.6}),
            (
                "msq",
                {"rescale": False, "strength": 0.1, "prune_share": 0.2, "threshold": 0.9, "search_share": 0.7},
            ),
            ("twn", {"threshold": 0.5}),
            ("xnor", {"gradient": "straight-through"}),
            ("scaled-uniform", {"bucket": "layer"}),
        )
    },
    **{
        name: (
            f"{DIGITS} --epochs 2 --target-bits 2",
            {"max_steps": 3, "quantization.method": name}
            | {
                f"{name}.{key}": value
                for key, value in {
                    "beta_initial": 2.0,
                    "beta_final": 50.0,
                    "beta_schedule": "epoch",
                    "logit": 0.5,
                    "refit_scale": False,
                    "digits": "sign-magnitude",
                    "init_scale": "mse",
                    "gate_steps": "sgd",
                    "per_channel": False,
                    "gate_limit": 3.0,
                    "straight_through_at": 0.3,
                    "straight_through_rate": 2.0,
                    "restart_beta": 3.0,
                    "precision_count": "soft",
                    "fix_masks_at": 0.5,
                    "rounding": "threshold",
                    "measure_unit_steps": True,
                    "harden_at": 0.5,
                    "reg_strength": 0.1,
                    "mask_logit": 0.5,
                }.items()
                if key in CARDS[name].settings.model_fields
            },
        )
        for name in ("csq", "csq-uniform")
    },
}


def test_every_key_has_a_row() -> None:
    rows = {key for _, keys in RUNS.values() for key in keys}
    wanted = {*Recipe.leaves(), *(f"{c.section}.{key}" for c in CARDS.values() for key in c.settings.model_fields)}
    assert wanted - rows == set(), "give them a row"
    assert rows - wanted == set(), "gone, or renamed"


@pytest.mark.parametrize("row", RUNS)
def test_a_run_with_these_settings_ends_well_and_keeps_them(csq, tmp_path: Path, row: str) -> None:
    command, keys = RUNS[row]
    settings = [text for key, value in keys.items() for text in ("--set", f"{key}={json.dumps(value)}")]
    code, _, err = csq(*command.split(), *settings, "--output", tmp_path / "run")
    assert code == 0, err
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    for key, value in keys.items():
        found = recipe
        for part in key.split("."):
            found = found[part]
        assert found == value, key
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["budget"]["mean_bits"] <= (recipe["quantization"]["target_bits"] or 8)
