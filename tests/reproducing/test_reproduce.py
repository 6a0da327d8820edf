"""Tables and figures of the paper: the recipes are the paper's, runs are shared and never repeated, the page says both sides."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from csqcli import pipeline
from csqcli.cli import search as search_command
from csqcli.quant.method_settings import PAPER
from csqcli.recipe.resolve import resolve, to_yaml
from csqcli.recipe.schema import Recipe
from csqcli.reporting.words import near_chance
from csqcli.reproducing import page, runs
from csqcli.reproducing.experiments import EXPERIMENTS, Experiment
from csqcli.system.progress import Display

TRIAL = ("--data", "digits", "--model", "digits_cnn", "--scale", "0.002", "--set", "max_steps=2", "--quiet")


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_every_bit_level_row_is_algorithm_1_with_the_papers_settings(name: str) -> None:
    planned = runs.plan(EXPERIMENTS[name], scale=1.0, seeds=[0], more={"data.source": "digits"})
    assert planned
    for row, recipe in ((run.row, run.recipe) for run in planned):
        assert recipe.model.pretrained is False
        assert recipe.quantization.act_bits == row.act_bits
        assert recipe.epochs == {"cifar_resnet20": 600, "cifar_vgg19bn": 300}.get(recipe.model.source or "", 200)
        if row.method not in ("csq", "csq-uniform"):
            continue
        own = recipe.method_settings.model_dump()
        differs = {key for key, value in PAPER.items() if key in own and own[key] != value}
        allowed = {"rounding"} | {key.rpartition(".")[2] for key in row.settings}
        assert (
            differs <= allowed
        )  # levels that keep the trained weight are delivered, the paper's unit steps beside them
        assert own["measure_unit_steps"]


def test_scale_shortens_both_phases_and_a_plan_starts_nothing(csq, tmp_path: Path) -> None:
    code, out, _ = csq("reproduce", "table3-resnet18", "--plan", "--scale", "0.1", "--data", "digits", "-o", tmp_path)
    assert code == 0
    assert out.splitlines()[-1] == "# 3 runs, 90 epochs in all"  # 200 and 100, a tenth
    recipes = [yaml.safe_load(file.read_text()) for file in (tmp_path / "recipes").iterdir()]
    assert [(recipe["epochs"], recipe["finetune"]["epochs"]) for recipe in recipes] == [(20, 10)] * 3
    assert [file.name for file in tmp_path.iterdir()] == ["recipes"]


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, Path]]:
    """What the searches of a test are asked for; none is run."""
    asked: list[tuple[Recipe, Path]] = []

    def search(recipe: Recipe, output: Path, **_: object) -> dict[str, object]:
        asked.append((recipe, output.absolute()))
        return {}

    monkeypatch.setattr(pipeline, "search", search)
    monkeypatch.setattr(search_command, "result_of_run", lambda *_, **__: None)
    return asked


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_every_printed_command_is_the_run_itself_wherever_it_is_started(
    name: str,
    csq,
    searched: list[tuple[Recipe, Path]],
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image_folder.rename(tmp_path / "my images")
    monkeypatch.chdir(tmp_path)
    asked = ("--data", "my images", "--scale", "0.1", "--seeds", "2", "--set", "optimizer.clip_grad_norm=null")
    code, out, err = csq("reproduce", name, *asked, "--plan", "-o", "my tables")
    assert code == 0, err
    more = {"data.source": "my images", "optimizer.clip_grad_norm": None}
    runs.run_all(
        EXPERIMENTS[name], Path("my tables"), scale=0.1, seeds=range(2), more=more, display=Display(quiet=True)
    )
    here, searched[:] = list(searched), []
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for line in out.splitlines()[:-1]:
        code, _, err = csq(*shlex.split(line)[1:], "--quiet")
        assert code == 0, err
    assert searched == here
    assert len(here) == 2 * sum(row.trained for row in EXPERIMENTS[name].rows)
    assert {recipe.data.source for recipe, _ in here} == {str(tmp_path / "my images")}


def test_csq_uniform_has_the_papers_unset_settings_in_a_printed_command(csq, tmp_path: Path) -> None:
    assert csq("reproduce", "table4", "--plan", "--data", "digits", "-o", tmp_path)[0] == 0
    recipe = resolve(str(tmp_path / "recipes" / "cifar10-resnet20-csq-uniform-target_bits2-a3-seed0.yaml"), {})
    own = recipe.method_settings.model_dump()
    assert {key: own[key] for key in ("gate_limit", "restart_beta", "beta_final", "per_channel")} == {
        "gate_limit": None,
        "restart_beta": None,
        "beta_final": 200,
        "per_channel": False,
    }


def test_runs_have_one_folder_where_their_recipes_are_equal_and_only_there() -> None:
    more = {"data.source": "digits"}
    every = [
        run for experiment in EXPERIMENTS.values() for run in runs.plan(experiment, scale=1, seeds=range(2), more=more)
    ]
    recipes: dict[str, str] = {}
    for run in every:
        assert recipes.setdefault(run.name, to_yaml(run.recipe)) == to_yaml(run.recipe), run.name
    assert len(set(recipes.values())) == len(recipes)
    names = {  # λ = 0.01 is the paper's own, so figure 2 has that row in common with table V
        name: {run.name for run in runs.plan(EXPERIMENTS[name], scale=1, seeds=[0], more=more)} for name in EXPERIMENTS
    }
    assert names["fig2"] & names["table5"] == {"cifar10-resnet20-csq-target_bits3-a3-seed0"}
    assert not names["table1"] & names["table2"]


def test_what_the_user_sets_is_not_what_the_rows_are_about(csq, tmp_path: Path) -> None:
    for assignment, key in (
        ("act_bits=4", "quantization.act_bits"),
        ("seed=3", "seed"),
        ("reg_strength=1", "csq.reg_strength"),
    ):
        code, _, err = csq("reproduce", "fig2", "--plan", "--set", assignment, "-o", tmp_path / "out")
        assert (code, err) == (
            2,
            f"csq: error: --set: `{key}` is what fig2 sets for each of its runs; leave it out\n",
        )
    (tmp_path / "file").write_text("")
    code, _, err = csq("reproduce", "fig2", "--data", "digits", "--plan", "-o", tmp_path / "file")
    assert (code, err.count("\n")) == (2, 1)
    assert "choose another --output" in err


def test_a_plan_needs_data_and_replaces_no_recipe_of_another_plan(csq, tmp_path: Path) -> None:
    code, _, err = csq("reproduce", "fig2", "--plan", "-o", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "no data given" in err
    assert not (tmp_path / "out").exists()
    plan = ("reproduce", "fig2", "--data", "digits", "--plan", "-o", tmp_path / "out")
    assert csq(*plan)[0] == 0
    before = {file.name: file.read_text() for file in (tmp_path / "out" / "recipes").iterdir()}
    code, _, err = csq(*plan, "--scale", "0.5")
    assert (code, err.count("\n")) == (2, 1)
    assert "is the recipe of a plan with other settings; choose another --output" in err
    assert before == {file.name: file.read_text() for file in (tmp_path / "out" / "recipes").iterdir()}
    assert csq(*plan, "--set", "data.workers=0")[0] == 0  # which changes no result
    assert "workers: 0" in next((tmp_path / "out" / "recipes").iterdir()).read_text()


def test_a_planned_run_is_collected_and_one_with_other_settings_is_refused(csq, tmp_path: Path, monkeypatch) -> None:
    code, out, err = csq("reproduce", "table4", *TRIAL, "--plan", "-o", tmp_path)
    assert code == 0, err
    commands = [shlex.split(line)[1:] for line in out.splitlines()[:-1]]
    (uniform,) = (words for words in commands if "csq-uniform-target_bits2-" in " ".join(words))
    code, _, err = csq(*uniform, "--quiet")
    assert code == 0, err
    report = Path(uniform[uniform.index("-o") + 1]) / "report.json"
    written = report.stat().st_mtime_ns

    experiment = EXPERIMENTS["table4"]
    kept = [row for row in experiment.rows if row.label in ("FP", "CSQ-Uniform 2")]
    monkeypatch.setitem(EXPERIMENTS, "table4", dataclasses.replace(experiment, rows=kept))  # the others take long
    code, out, err = csq("reproduce", "table4", *TRIAL, "-o", tmp_path)
    assert code == 0, err
    assert report.stat().st_mtime_ns == written
    table = json.loads((tmp_path / "table4.json").read_text())
    assert table["rows"][1]["ours"]["top1"] == [json.loads(report.read_text())["accuracy"]["hard_top1"]]

    other = ["max_steps=1" if word == "max_steps=2" else word for word in TRIAL]
    code, _, err = csq("reproduce", "table4", *other, "-o", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "max_steps 2 then, 1 now" in err
    assert "choose another --output" in err
    assert "--force" not in err


def report(top1: float = 90.0, *, planes: float = 2.0, target: float | None = 2.0, layers: tuple[int, ...] = (3, 1)):
    """What a page reads of a run's report.json: ten classes, 1,000 bytes of 4,000."""
    return {
        "model": {"source": "m", "weights_from": "random"},
        "classes": [str(number) for number in range(10)],
        "recipe": {"data": {"source": "d"}, "epochs": 600},
        "accuracy": {"hard_top1": top1},
        "budget": {"mean_bits": planes, "target_mean_bits": target},
        "sizes": {"float_bytes": 4000, "file_bytes": 1000},
        "layers": [{"name": f"conv{number}.weight", "bits": bits} for number, bits in enumerate(layers)],
        "history": [{"mean_bits": planes}],
    }


def summary_of(experiment: Experiment, *found: list[dict], scale: float = 1.0):
    """Of these reports in the experiment's order, of as many as usual where none are given."""
    reports = found or tuple([report()] if row.trained else [] for row in experiment.rows)
    seeds = range(max(map(len, reports)))
    return runs.summary(experiment, reports, scale=scale, seeds=seeds)


def rows_of(name: str, *labels: str) -> Experiment:
    """The first row of each label alone."""
    rows = [next(row for row in EXPERIMENTS[name].rows if row.label == label) for label in labels]
    return dataclasses.replace(EXPERIMENTS[name], rows=rows)


def test_a_table_says_which_of_its_methods_have_other_levels() -> None:
    def caption(name: str, *labels: str) -> str:
        experiment = rows_of(name, *labels)
        return page.markdown(experiment, summary_of(experiment)).split("\n\n")[1]

    rivals = ("LQ-Nets", "PACT", "DoReFa")
    assert "Levels of a method at k planes: 2^(k+1) − 1; LQ-Nets, PACT, DoReFa: 2^k." in caption(
        "table1", "CSQ T2", "BSQ", *rivals, rivals[0]
    )
    assert caption("table1", "CSQ T2").endswith("Levels of a method at k planes: 2^(k+1) − 1.")
    assert "Levels" not in caption("table1", "FP")


def test_rivals_are_said_to_be_trained_by_csqs_recipe_and_where_theirs_are() -> None:
    text = page.markdown(EXPERIMENTS["table1"], summary_of(EXPERIMENTS["table1"]))
    assert (
        "LQ-Nets, BSQ, PACT, DoReFa: trained by this table's recipe and schedule, which are CSQ's (cifar10-resnet20, from scratch), "
        "not by their authors'; `csq search --recipe` has theirs in cifar10-resnet20-bsq, cifar10-resnet20-lq-nets, "
        "cifar10-resnet20-pact. BSQ begins with a network trained in float, here for as many epochs." in text
    )
    assert "authors" not in page.markdown(EXPERIMENTS["table5"], summary_of(EXPERIMENTS["table5"]))


def test_bsq_begins_with_a_network_trained_for_as_many_epochs() -> None:
    for run in runs.plan(rows_of("table1", "BSQ", "PACT"), scale=0.1, seeds=[0], more={"data.source": "digits"}):
        recipe, pretrained = run.recipe, run.row.method == "bsq"
        assert recipe.adaptation.epochs == (recipe.epochs if pretrained else 0)
        assert recipe.adaptation.lr == (recipe.optimizer.lr if pretrained else None)
        assert ("-pretrained-" in run.name) == pretrained
    (few,) = runs.plan(rows_of("table1", "BSQ"), scale=0.1, seeds=[0], more={"data.source": "digits", "epochs": 3})
    assert (few.recipe.epochs, few.recipe.adaptation.epochs) == (3, 3)


def test_size_and_planes_stand_beside_target_and_paper() -> None:
    experiment = rows_of("table1", "FP", "BSQ", "CSQ T2")
    found = [report(92.0, target=None)], [report(91.0, planes=1.6, target=1.663)], [report(91.5)]
    lines = page.markdown(experiment, summary_of(experiment, *found)).splitlines()
    assert [line for line in lines if line.startswith("|")] == [
        "| Method | A-bits | target | planes | bytes | compression | 32 / planes | top-1, hard | gap to float | paper: W-bits "
        "| paper: compression | paper: top-1 | paper: gap |",
        "|" + " --- |" * 13,
        "| FP | 32 | – | float | 1,000 | 4.00 | – | 92.00 | +0.00 | 32 | 1.00 | 92.62 | +0.00 |",
        "| BSQ | 32 | 1.663 | 1.600 | 1,000 | 4.00 | 20.00 | 91.00 | -1.00 | MP | 19.24 | 91.87 | -0.75 |",
        "| CSQ T2 | 32 | 2 | 2.000 | 1,000 | 4.00 | 16.00 | 91.50 | -0.50 | MP | 16.00 | 92.68 | +0.06 |",
    ]


def test_the_papers_compression_is_32_over_the_bits_that_it_prints() -> None:
    printed = {(row.bits, row.compression) for experiment in EXPERIMENTS.values() for row in experiment.rows}
    counted = {(bits, times) for bits, times in printed if bits not in ("", "MP") and times is not None}
    odd = ("3", 9.14)  # of Non-Linear, as Table II has it
    assert all(times == pytest.approx(32 / float(bits), abs=0.006) for bits, times in counted - {odd})
    assert {("1.97", 16.24), ("3", 10.67), odd} <= counted


def test_columns_and_sentences_that_say_nothing_are_left_out() -> None:
    fig2, table5 = (page.markdown(EXPERIMENTS[name], summary_of(EXPERIMENTS[name])) for name in ("fig2", "table5"))
    assert "paper: " not in fig2
    assert "gap" not in fig2
    assert "unit steps" not in table5
    assert "standard deviation" not in table5
    two = page.markdown(EXPERIMENTS["fig2"], summary_of(EXPERIMENTS["fig2"], *[[report(90), report(92)]] * 6))
    assert "mean ± standard deviation" in two
    assert "| 91.00 ± 1.41 |" in two  # √2


def test_a_page_says_that_the_paper_prints_no_values() -> None:
    said = "as an image, without values in text"
    pages = {name: page.markdown(one, summary_of(one)) for name, one in EXPERIMENTS.items()}
    assert {name for name, text in pages.items() if said in text} == {"table4", "fig2", "fig3", "fig4"}
    assert "from its other tables" in pages["fig4"]
    assert "from its other tables" not in pages["fig2"]


def test_figure_4_lists_the_planes_of_each_layer() -> None:
    experiment = rows_of("fig4", "CSQ T2", "CSQ T3")
    found = [report(layers=(3, 1)), report(layers=(3, 2))], [report(layers=(4, 2)), report(layers=(4, 2))]
    text = page.markdown(experiment, summary_of(experiment, *found))
    table = "| layer | CSQ T2 | CSQ T3 |\n| --- | --- | --- |\n| conv0 | 3 | 4 |\n| conv1 | 1.50 | 2 |\n"
    assert f"means over the seeds:\n\n{table}" in text
    assert "means over the seeds" not in page.markdown(experiment, summary_of(experiment))


def test_rows_at_chance_and_searches_short_of_their_target_are_marked() -> None:
    experiment = rows_of("table1", "FP", "LQ-Nets", "CSQ T2")
    found = [report(90)], [report(15.0, planes=1.5)], [report(15.1, planes=1.69)]  # of ten classes, so chance is 10 %
    text = page.markdown(experiment, summary_of(experiment, *found))
    marked = {line.split(" | ")[0]: ("†" in line, "‡" in line) for line in text.splitlines() if line.startswith("| ")}
    assert marked == {
        **dict.fromkeys(("| Method", "| ---", "| FP"), (False, False)),
        "| LQ-Nets": (True, False),  # which is given its planes
        "| CSQ T2": (False, True),
    }
    assert "\n† the run ended at chance: 15 % or less, where guessing has 10 %." in text
    assert "\n‡ the run ended more than 0.3 planes below its target" in text
    one_of_two = [report(90)] * 2, [report(60)] * 2, [report(70), report(10)]
    text = page.markdown(experiment, summary_of(experiment, *one_of_two))
    assert "| 40.00 ± 42.43 † |" in text
    assert "‡" not in text
    assert near_chance(50) == 55  # 75 % of two classes is not chance


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_everything_has_a_figure(name: str) -> None:
    drawn = page.figure(EXPERIMENTS[name], summary_of(EXPERIMENTS[name]))
    assert drawn.svg().startswith("<svg")
    if name.startswith("table"):
        papers = {row[1]: (row[2], row[3]) for row in drawn.rows if row[0] == "the paper"}
        assert drawn.columns[2].startswith("compression")
        assert {row[2] for row in drawn.rows if row[0] != "the paper"} == {4}  # 4,000 bytes of 1,000
        assert (papers == {}) == (name == "table4")
        if name == "table1":
            assert papers["BSQ A3"] == (11.04, 92.16)


def test_few_epochs_are_said_before_anything_runs(
    csq, searched: list[tuple[Recipe, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Display, "say", lambda _, text, **__: said.append(f"{len(searched)}: {text}"))
    for scale, line in (
        (0.005, "0: 3 epochs of the paper's 600: too few to learn much"),
        (0.02, "0: fig2, run 1 of 6"),
    ):
        searched.clear()
        said.clear()
        more = {"data.source": "digits"}
        runs.run_all(EXPERIMENTS["fig2"], tmp_path, scale=scale, seeds=[0], more=more, display=Display())
        assert said[0].startswith(line)
    said.clear()
    assert csq("reproduce", "fig2", "--data", "digits", "--scale", "0.001", "--plan", "-o", tmp_path)[0] == 0
    assert "1 epoch of the paper's 600" in said[0]


def test_a_plan_refuses_data_that_its_runs_would_refuse(csq, image_folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(image_folder / "val")
    plan = ("reproduce", "fig2", "--data", image_folder, "--plan", "-o", tmp_path / "out")
    code, out, err = csq(*plan)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no validation split" in err
    assert not (tmp_path / "out").exists()
    assert csq(*plan, "--set", "val_split=0.5")[0] == 0


def test_a_table_is_trained_once_and_its_runs_serve_the_figures(csq, tmp_path: Path, monkeypatch) -> None:
    code, out, err = csq("reproduce", "table5", *TRIAL, "--seeds", "2", "-o", tmp_path)
    assert code == 0, err
    assert "| CSQ T3 | 3 |" in out
    assert "| 3.05 | 10.49 | 92.42 | -0.20 |" in out  # the paper's own line
    table = json.loads((tmp_path / "table5.json").read_text())
    rows = {row["label"]: row for row in table["rows"]}
    assert len(rows["CSQ T1"]["ours"]["top1"]) == 2
    assert all(planes <= row["ours"]["target"] for row in table["rows"][1:] for planes in row["ours"]["planes"])
    own = json.loads((tmp_path / "cifar10-resnet20-csq-target_bits2-a3-seed1" / "report.json").read_text())
    assert rows["CSQ T2"]["ours"]["top1"][1] == own["accuracy"]["hard_top1"]
    model = tmp_path / "cifar10-resnet20-csq-target_bits2-a3-seed1" / "model.safetensors"
    assert rows["CSQ T2"]["ours"]["bytes"][1] == model.stat().st_size

    from csqcli.training import phase

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(phase, "train", never)
    for name in ("table5", "fig3", "fig4"):
        code, _, err = csq("reproduce", name, *TRIAL, "--output", tmp_path, "--json")
        assert code == 0, err
        assert (tmp_path / f"{name}.svg").read_text().startswith("<svg")
    assert "Rank correlation of planes with depth" in (tmp_path / "fig4.md").read_text()


def test_the_depth_trend_is_the_rank_correlation() -> None:
    assert runs.depth_trend([1, 2, 3, 5]) == pytest.approx(1)
    assert runs.depth_trend([4, 3, 3, 1]) == pytest.approx(-0.9486833)  # ranks 3, 1.5, 1.5, 0
    assert runs.depth_trend([2, 2, 2]) == 0


def test_a_wrong_name_is_one_line_with_the_right_one(csq) -> None:
    code, _, err = csq("reproduce", "tabel5")
    assert code == 2
    assert "did you mean `table5`" in err
    code, out, _ = csq("reproduce")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(EXPERIMENTS)
