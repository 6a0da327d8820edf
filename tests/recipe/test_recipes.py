"""Every shipped recipe is valid, the paper's are the paper's, and mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from csqcli.cli.search import search_settings
from csqcli.errors import UserError
from csqcli.quant.catalog import CARDS
from csqcli.quant.method_settings import PAPER
from csqcli.recipe.complete import without_effect
from csqcli.recipe.keys import full_key, merged, parse_assignments
from csqcli.recipe.planes import replaced_target
from csqcli.recipe.resolve import json_schema, resolve, resolve_stored, to_yaml, validate
from csqcli.recipe.yaml_files import builtin_names


@pytest.mark.parametrize("name", builtin_names())
def test_shipped_recipe_is_valid_described_and_survives_a_round_trip(name: str) -> None:
    recipe = resolve(name, {})
    assert recipe.description
    assert validate(yaml.safe_load(to_yaml(recipe)), where=name).to_dict() == recipe.to_dict()


def test_the_expected_recipes_ship() -> None:
    papers = {"cifar10-resnet20", "cifar10-vgg19bn", "imagenet-resnet18", "imagenet-resnet50"}
    assert {
        "digits",
        "short",
        "photographs",
        "photographs-minutes",
        *papers,
        *(f"cifar10-resnet20-{name}" for name in ("bsq", "pact", "parq")),
    } <= set(builtin_names())


@pytest.mark.parametrize(
    ("method", "epochs", "decay", "milestones", "act_bits"),
    [  # the authors' own, for CIFAR-10; BSQ's 350 epochs of search and 300 of finetune are one run
        ("bsq", 650, 1e-4, [250], 4),
        ("pact", 200, 2e-4, [60, 120], 4),
        ("parq", 200, 2e-4, [80, 120, 150], 32),
    ],
)
def test_the_recipes_of_published_methods_hold_their_authors_settings(
    method: str, epochs: int, decay: float, milestones: list[int], act_bits: int
) -> None:
    recipe = resolve(f"cifar10-resnet20-{method}", {})
    optimizer = recipe.optimizer
    assert (recipe.quantization.method, recipe.epochs, recipe.data.batch_size) == (method, epochs, 128)
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.1, 0.9, decay)
    assert (optimizer.schedule, optimizer.milestones) == ("steps", milestones)
    assert recipe.quantization.act_bits == act_bits
    if method == "bsq":
        shares = recipe.method_settings
        assert (round(shares.search_share * 650), round(shares.requantize_share * 650)) == (350, 50)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"method": "lsq", "layers.floor": 0}, "layers.floor: `lsq` has no layer of 0 planes"),
        ({"method": "msq", "layers.max_bits": {"fc": 0}}, "layers.max_bits: fc: `msq` has no layer of 0 planes"),
        ({"ship_as": "bit-packed"}, "ship_as goes with target_size or target_compression"),
        ({"target_size": "20kB", "cost": "bops"}, "cost is what target_bits counts"),
        ({"act_per": "macs"}, "act_per goes with target_act_bits"),
    ],
)
def test_what_would_be_ignored_is_refused(given: dict, complaint: str) -> None:
    target = {} if "target_size" in given else {"target_bits": 2}
    with pytest.raises(UserError, match=complaint):
        resolve("digits", {"quantization.target_bits": None} | target | given)
    assert resolve("digits", {"method": "staged", "layers.floor": 0, "target_bits": 2}).layers.floor == 0


def test_a_section_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """YAML would take the second, and lose every key of the first."""
    file = tmp_path / "twice.yaml"
    file.write_text("data: {source: digits}\nepochs: 3\ndata: {batch_size: 8}\n")
    with pytest.raises(UserError, match="`data` occurs twice in one section"):
        resolve(str(file), {})
    file.write_text("base: &base {batch_size: 8}\ndata: {<<: *base, source: digits}\n")
    with pytest.raises(UserError, match="base"):  # merging is YAML's, and only `base` is no key of a recipe
        resolve(str(file), {})


def test_milestones_belong_to_steps() -> None:
    for given in ({"optimizer.milestones": [3]}, {"optimizer.schedule": "steps"}):
        with pytest.raises(UserError, match="optimizer: schedule steps and milestones go together"):
            resolve("digits", given)


@pytest.mark.parametrize(
    ("given", "activations"),
    [
        ({"method": "dorefa"}, "dorefa"),
        ({"method": "pact"}, "pact"),
        ({"method": "dorefa", "act_method": "lsq"}, "lsq"),
        ({"method": "lsq"}, "lsq"),
        ({}, "lsq"),
    ],
)
def test_activations_follow_the_method_s_paper_unless_named(given: dict, activations: str) -> None:
    assert resolve("digits", given).quantization.act_method == activations


@pytest.mark.parametrize(
    ("name", "epochs", "finetune", "decay", "warmup"),
    [  # section IV-A of the paper
        ("cifar10-resnet20", 600, 0, 5e-4, 0),
        ("cifar10-vgg19bn", 300, 0, 5e-4, 0),
        ("imagenet-resnet18", 200, 100, 1e-4, 5),
        ("imagenet-resnet50", 200, 100, 1e-4, 5),
    ],
)
def test_the_papers_recipes_hold_the_papers_settings(
    name: str, epochs: int, finetune: int, decay: float, warmup: int
) -> None:
    recipe = resolve(name, {})
    assert (recipe.epochs, recipe.finetune.epochs) == (epochs, finetune)
    assert recipe.model.pretrained is False
    settings, optimizer = recipe.method_settings, recipe.optimizer
    assert (recipe.quantization.method, recipe.quantization.max_bits) == ("csq", 8)
    assert settings.reg_strength == 0.01
    assert (settings.beta_initial, settings.beta_final, settings.beta_schedule) == (1, 200, "epoch")
    assert (settings.harden_at, settings.refit_scale) == (1, False)
    assert (settings.rounding, settings.measure_unit_steps) == (
        "nearest",
        True,
    )  # the paper's, and one that keeps what is trained
    assert (settings.digits, settings.init_scale, settings.gate_steps) == ("sign-magnitude", 1, "sgd")
    assert (settings.precision_count, settings.fix_masks_at, settings.restart_beta) == ("sign", 1, None)
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.schedule) == ("momentum", 0.1, 0.9, "cosine")
    assert (optimizer.weight_decay, optimizer.chosen(adamw=False).warmup_epochs) == (decay, warmup)


def test_the_default_recipe_is_ten_epochs_from_pretrained_weights() -> None:
    recipe = resolve("short", {})
    assert recipe.epochs == 10
    assert recipe.model.pretrained
    assert recipe.quantization.method == "staged"
    assert recipe.method_why == "from trained weights"


def test_command_line_beats_recipe_beats_default() -> None:
    recipe = resolve("digits", parse_assignments(["batch_size=32", "quantization.target_bits=1.5"]))
    assert recipe.data.batch_size == 32  # command line over the recipe's 64
    assert recipe.data.source == "digits"  # recipe over the default
    assert recipe.optimizer.momentum == 0.9  # default
    assert recipe.quantization.target_bits == 1.5


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ({"quantization": {"target_bit": 3}}, "unknown key `quantization.target_bit`; did you mean `target_bits`"),
        ({"epoch": 3}, "unknown key `epoch`; did you mean `epochs`"),
        ({"epochs": -1}, "epochs: Input should be greater than or equal to 0"),
        ({"epochs": 0, "quantization": {"method": "staged"}}, "epochs: `staged` needs at least 1"),
        ({"epochs": 2, "quantization": {"method": "ptq"}}, "epochs: `ptq` trains nothing (got 2)"),
        ({"data": {"calib": "images"}}, "data.calib: images without labels cannot be trained on"),
        ({"quantization": {"target_bits": -1}}, "quantization.target_bits: Input should be greater than 0"),
        ({"quantization": {"target_bits": 9}}, "target_bits 9 is too many; at most 8"),
        ({"quantization": {"method": "cqs"}}, "quantization.method: no method `cqs`; did you mean `csq`"),
    ],
)
def test_wrong_recipes_are_one_line(raw: dict, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(raw, where="r.yaml")
    assert caught.value.line().startswith(f"r.yaml: {complaint}")


def test_from_scratch_the_bit_level_method_has_the_papers_settings_but_for_the_choice_of_planes_and_the_hardening() -> (
    None
):
    scratch = {"model.pretrained": False, "quantization.target_bits": 2, "epochs": 40}
    own = resolve("short", scratch).method_settings.model_dump()
    ours = {"rounding": "nearest", "precision_count": "soft", "fix_masks_at": 0.6, "harden_at": 0.9}
    assert {key: own[key] for key in PAPER} == PAPER | ours
    typed = resolve("short", scratch | {"quantization.method": "csq", "fix_masks_at": 0.5}).method_settings.model_dump()
    assert (typed["fix_masks_at"], typed["beta_final"]) == (0.5, 200)
    tuned = resolve("short", {"quantization.method": "csq", "quantization.target_bits": 2})  # from a checkpoint
    assert tuned.method_settings.model_dump()["fix_masks_at"] == 0.4
    adapted = resolve("short", scratch | {"quantization.method": "csq", "adaptation.epochs": 1})
    assert adapted.method_settings.model_dump()["fix_masks_at"] == 0.4


def test_on_and_off_need_no_quotes() -> None:
    recipe = resolve("short", parse_assignments(["amp=off", "channels_last=on"]))
    assert (recipe.amp, recipe.channels_last) == ("off", "on")


def test_an_ambiguous_short_key_lists_its_full_names() -> None:
    with pytest.raises(UserError, match=r"`max_bits` is ambiguous; write `quantization.max_bits` or `layers.max_bits`"):
        full_key("max_bits", CARDS["staged"])


def test_every_setting_has_help_text() -> None:
    def properties(schema: dict):
        yield from schema.get("properties", {}).items()
        for definition in schema.get("$defs", {}).values():
            yield from definition.get("properties", {}).items()

    missing = [name for name, schema in properties(json_schema()) if not schema.get("description")]
    assert missing == []
    for card in CARDS.values():
        schema = card.settings.model_json_schema()
        assert all(part.get("description") for part in schema.get("properties", {}).values()), card.name


@pytest.mark.parametrize("name", sorted(CARDS))
def test_a_card_says_what_its_method_says(name: str) -> None:
    card = CARDS[name]
    method = card.load()
    for said in ("name", "takes", "finetunes", "min_planes", "max_planes"):
        assert getattr(method, said) == getattr(card, said)
    assert method.Settings is card.settings


@pytest.mark.parametrize(
    ("overrides", "method", "why"),
    [
        ({"epochs": 2}, "staged", "from trained weights"),
        ({"epochs": 200}, "staged", "from trained weights"),
        ({"epochs": 2, "pretrained": False, "checkpoint": None}, "csq", "from scratch"),
        (  # float epochs leave weights that are to be kept
            {"epochs": 2, "pretrained": False, "checkpoint": None, "adaptation.epochs": 1},
            "staged",
            "from trained weights",
        ),
        ({"epochs": 90, "method": "staged"}, "staged", ""),
        ({"epochs": 0}, "ptq", ""),
        ({"method": "ptq"}, "ptq", ""),
    ],
)
def test_auto_chooses_by_the_schedule_and_says_why(overrides: dict, method: str, why: str) -> None:
    recipe = resolve("digits", overrides)
    assert (recipe.quantization.method, recipe.method_why) == (method, why)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            {"reg_strength": 0.1},
            "`reg_strength` is a setting of method csq, and this run's is staged; pass --method csq",
        ),
        ({"method": "csq", "search_share": 0.2}, "`search_share` is a setting of method staged"),
        ({"csq.logit": 2.0}, "`csq.logit` is a setting of method csq"),
        ({"method": "ste", "latent_lr": 0.1}, "`latent_lr` is a setting of method staged, and this run's is ste"),
        ({"method": "csq", "reg_strenght": 0.1}, "unknown key `reg_strenght`; did you mean `reg_strength`"),
    ],
)
def test_settings_of_another_method_are_refused_by_name(overrides: dict, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve("digits", overrides)
    assert complaint in caught.value.line()


def test_a_section_of_another_method_in_a_file_is_refused_by_name() -> None:
    raw = {"quantization": {"method": "staged"}, "csq": {"reg_strength": 0.1}}
    with pytest.raises(UserError, match=r"r.yaml: `csq.reg_strength` is a setting of method csq"):
        validate(raw, where="r.yaml")


OLD = {  # quantization of a complete recipe that csq 0.1 wrote
    "method": "csq", "target_bits": 2.0, "max_bits": 8, "act_bits": 32, "act_method": "lsq",
    "search_share": 0.2, "soft_share": 0.5, "mask_beta_initial": 1.0, "mask_beta_final": 30.0, "latent_lr": 0.01,
    "recovery": 0.25, "per_channel": True, "state_dtype": "float32", "beta_initial": 1.0, "beta_final": 100.0,
    "beta_schedule": "step", "reg_strength": 0.01, "logit": 1.0, "mask_logit": 1.0, "refit_scale": True,
    "rounding": "nearest", "harden_at": 0.9,
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "now", "kept"),
    [
        ("csq", "staged", {"search_share": 0.2, "beta_final": 30.0}),
        (
            "csq-paper",
            "csq",
            {"beta_final": 100.0, "reg_strength": 0.01, "digits": "sign-magnitude", "fix_masks_at": 1.0},
        ),
        ("csq-uniform", "csq-uniform", {"beta_final": 100.0, "harden_at": 0.9}),
        ("ste", "ste", {}),
    ],
)
def test_recipes_of_csq_0_1_keep_their_meaning(method: str, now: str, kept: dict) -> None:
    recipe = validate({"quantization": OLD | {"method": method}}, where="old.yaml")
    assert recipe.quantization.method == now
    assert {name: getattr(recipe.method_settings, name) for name in kept} == kept


def test_the_old_name_of_the_papers_method_is_the_paper_s_recipe() -> None:
    recipe = resolve("digits", {"method": "csq-paper"})
    assert recipe.quantization.method == "csq"
    assert recipe.method_settings.model_dump() == {**recipe.method_settings.model_dump(), **PAPER}
    assert resolve("digits", {"method": "csq-paper", "rounding": "nearest"}).method_settings.rounding == "nearest"


def test_a_recipe_inside_a_file_names_nothing_that_is_read_imported_or_started() -> None:
    raw = {
        "model": {"source": "evil:f"},
        "data": {"source": "/secret", "workers": 900, "batch_size": 7},
        "compile": True,
        "quantization": {"method": "staged", "cost": "evil:f", "allocator": "evil:f"},
    }
    recipe = resolve_stored(raw, {}, where="file")
    assert (recipe.model.source, recipe.data.source, recipe.data.workers, recipe.compile) == (None, None, 2, False)
    assert (recipe.quantization.cost, recipe.quantization.allocator, recipe.data.batch_size) == ("weights", None, 7)
    with pytest.raises(UserError, match="asks to import the method `evil:F`; pass --trust-code"):
        resolve_stored({"quantization": {"method": "evil:F"}}, {}, where="file")


@pytest.mark.parametrize(
    ("settings", "planes"),
    [
        ({}, 8),
        ({"act_bits": 8}, 7),
        ({"act_bits": 4}, 7),
        ({"act_bits": 32}, 8),
        ({"act_bits": 8, "max_bits": 8}, 8),  # who asks for 8 gets 8
        ({"act_bits": 8, "target_bits": 7.5}, 8),
    ],
)
def test_beside_rounded_activations_integers_fit_int8(settings: dict[str, float], planes: int) -> None:
    recipe = resolve("short", {f"quantization.{key}": value for key, value in settings.items()})
    assert recipe.quantization.max_bits == planes


@pytest.mark.parametrize(
    ("said", "operations"), [("5G", 5e9), ("800M", 8e8), ("800m", 8e8), ("1.5k", 1500.0), ("2e9", 2e9), (7, 7.0)]
)
def test_bit_operations_are_a_number_or_a_round_one(said: object, operations: float) -> None:
    assert resolve("digits", {"quantization.target_bops": said}).quantization.target_bops == operations


@pytest.mark.parametrize(
    ("said", "size"),
    [("2MB", 2 * 10**6), ("20kB", 20_000), ("20kb", 20_000), ("20KB", 20_000), ("1mib", 2**20), ("7", 7)],
)
def test_a_size_is_one_in_upper_and_lower_case(said: str, size: int) -> None:
    assert resolve("digits", {"quantization.target_size": said}).quantization.target_size == size


def test_one_name_is_a_list_of_one() -> None:
    layers = resolve("digits", {"layers.exclude": "fc", "layers.keep": "conv*"}).layers
    assert (layers.exclude, layers.keep) == (["fc"], ["conv*"])


@pytest.mark.parametrize("bits", range(2, 9))
def test_inputs_of_layers_have_2_to_8_bits(bits: int) -> None:
    assert resolve("digits", {"act_bits": bits}).quantization.act_bits == bits


def test_a_target_that_takes_the_place_of_the_one_in_a_file_of_planes_is_said(tmp_path: Path) -> None:
    file = tmp_path / "planes.yaml"
    file.write_text("target_bits: 3\nplanes: {'*': 2}\n")
    for typed in (["--target-bits"], ["--set", "target_bits=2.5"], ["--set", "quantization.target_bits=2.5"]):
        options = {"planes": file} | ({"settings": typed[1:]} if typed[1:] else {"target_bits": 2.5})
        overrides = search_settings(options)
        assert resolve("digits", overrides).quantization.target_bits == 2.5
        assert replaced_target(file, overrides) == f"{file}: its target_bits 3 gives way to 2.5"
    for same in ({}, {"target_bits": 3.0}):
        assert replaced_target(file, search_settings({"planes": file} | same)) == ""
    file.write_text("planes: {'*': 2}\n")
    assert replaced_target(file, search_settings({"planes": file, "target_bits": 2.5})) == ""
    assert replaced_target(None, {"target_bits": 2.5}) == ""


@pytest.mark.parametrize("name", ["csq", "csq-uniform"])
def test_a_complete_recipe_of_0_2_keeps_what_gates_did_then(name: str) -> None:
    """What a run of 0.2 wrote has every key of then; a section of a few keys is of today."""
    recipe = resolve("digits", {"quantization.method": name, "quantization.target_bits": 2}).to_dict()
    then = {"per_channel": False, "gate_limit": None}
    now = {"per_channel": True, "gate_limit": 4.0}
    assert {key: recipe[name][key] for key in now} == now
    of_then = {key: value for key, value in recipe[name].items() if key not in then and "straight" not in key}
    again = validate(recipe | {name: of_then}, where="recipe.yaml").method_settings.model_dump()
    assert {key: again[key] for key in then} == then
    few = validate(recipe | {name: {"digits": "signed"}}, where="recipe.yaml").method_settings.model_dump()
    assert {key: few[key] for key in now} == now


def test_a_complete_recipe_of_0_2_keeps_the_levels_that_parq_had_then() -> None:
    recipe = resolve("digits", {"quantization.method": "parq", "quantization.target_bits": 2}).to_dict()
    of_then = {key: value for key, value in recipe["parq"].items() if key != "step_factor"}
    again = validate(recipe | {"parq": of_then}, where="recipe.yaml").method_settings.model_dump()
    assert (recipe["parq"]["step_factor"], again["step_factor"]) == (1.2, 1.0)


def test_a_complete_recipe_of_0_2_keeps_the_scales_that_staged_had_then() -> None:
    recipe = resolve("digits", {"quantization.method": "staged", "quantization.target_bits": 2}).to_dict()
    of_then = {key: value for key, value in recipe["staged"].items() if key not in ("step_factor", "scale_lr")}
    again = validate(recipe | {"staged": of_then}, where="recipe.yaml").method_settings.model_dump()
    assert (recipe["staged"]["scale_lr"] > 0, again["scale_lr"], again["step_factor"]) == (True, 0.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"straight_through_rate": 3}, "digits: csq: straight_through_rate is for straight_through_at, which is unset"),
        ({"straight_through_at": 0.9}, "straight_through_at 0.9 is not below harden_at 0.9"),
        ({"straight_through_at": 0.5, "fix_masks_at": 1}, "set fix_masks_at below 1, too"),
    ],
)
def test_straight_through_is_refused_where_it_would_be_ignored(settings: dict[str, float], message: str) -> None:
    csq = {f"csq.{key}": value for key, value in settings.items()}
    with pytest.raises(UserError, match=message):
        resolve("digits", {"quantization.method": "csq", "quantization.target_bits": 2} | csq)


@pytest.mark.parametrize(
    "asked",
    [{"target_bits": 2}, {"target_bits": 1, "layers.keep": ["fc"]}, {"target_bits": 1, "layers.min_bits": {"fc": 2}}],
)
def test_methods_of_one_plane_are_refused_more_before_anything_is_loaded(asked: dict[str, object]) -> None:
    assert resolve("short", {"quantization.method": "twn", "target_bits": 1}).card.max_planes == 1
    with pytest.raises(UserError, match="`twn` has layers of 1 plane at most"):
        resolve("short", {"quantization.method": "twn"} | asked)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({"epochs": 0, "optimizer.distill": 0.9}, "optimizer.distill: nothing is trained beside the float model"),
        ({"epochs": 0, "mixup": 1.0}, "optimizer.mixup: nothing is trained"),
        ({"epochs": 0, "optimizer.lr": 0.1, "adaptation.epochs": 1}, None),
        ({"epochs": 0, "optimizer.distill": 0.9, "finetune.epochs": 1}, None),
        (
            {"quantization.method": "lsq", "state_dtype": "bfloat16"},
            "quantization.state_dtype: the state of lsq is float32",
        ),
        ({"state_dtype": "bfloat16"}, None),
        ({"finetune.teacher": "f.pth"}, "finetune.teacher: a search follows the float model that it has at hand"),
        ({"trials": 5}, "quantization.trials: staged makes no trials"),
        ({"trials": 5, "allocator": "haq"}, None),
        ({"allocator": "importance", "staged.recovery": 1.0}, "staged.recovery: planes are those of importance"),
        (
            {"epochs": 0, "ptq.rounding": "nearest", "follow_inputs": False},
            "ptq.follow_inputs: rounding to the nearest level follows no inputs",
        ),
        ({"quantization.method": "float", "target_bits": 2}, "quantization.target_bits: float quantizes nothing"),
    ],
)
def test_what_was_typed_and_does_nothing_is_said(typed: dict[str, object], said: str | None) -> None:
    assert without_effect(resolve("digits", typed), typed) == ([] if said is None else [said])


def test_zero_epochs_in_a_recipe_file_are_post_training_whatever_the_budgets_unit() -> None:
    recipe = validate({"epochs": 0, "quantization": {"target_bops": "20M"}}, where="mine.yaml")
    assert recipe.card.name == "ptq"


@pytest.mark.parametrize(
    ("typed", "assignments"),
    [
        ({"epochs": 2}, ["epochs=2"]),
        ({"amp": "off"}, ["amp=off"]),
        ({"data.batch_size": 32}, ["batch_size=32", "data.batch_size=32"]),
        ({"quantization.target_bits": 2.0, "epochs": None}, ["target_bits=2", "epochs=3"]),
    ],
)
def test_the_same_value_may_be_given_by_an_option_and_by_set(typed: dict[str, Any], assignments: list[str]) -> None:
    assigned = parse_assignments(assignments)
    both = merged(typed, assigned, as_named=str.format, as_setting=str.format)
    assert both == assigned | {key: value for key, value in typed.items() if value is not None}


def test_two_values_of_one_setting_are_refused_in_whatever_spelling() -> None:
    with pytest.raises(UserError, match=r"`batch_size=32` and `data.batch_size=64` say different things"):
        parse_assignments(["batch_size=32", "data.batch_size=64"])
    said = {"as_named": lambda key, value: f"--{key} {value}", "as_setting": lambda key, value: f"--set {key}={value}"}
    with pytest.raises(
        UserError, match=r"`--data.batch_size 32` and `--set batch_size=64` say different things; give one"
    ):
        merged({"data.batch_size": 32}, {"batch_size": 64}, **said)
