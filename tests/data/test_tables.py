"""Data that tables describe: a CSV, Kaggle's ImageNet, parquet and Arrow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from csqcli.data.specs import open_data
from csqcli.errors import UserError


def lines(folder: Path) -> list[str]:
    return [f"{path.relative_to(folder)},{path.parent.name}" for path in sorted(folder.rglob("*.png"))]


def test_a_csv_names_images_and_classes(image_folder: Path) -> None:
    rows = lines(image_folder)
    file = image_folder / "all.csv"
    file.write_text("\n".join(["Label,Filename", *(",".join(reversed(row.split(","))) for row in rows)]))
    opened = open_data(str(file), val_split=0.5)
    assert (len(opened.train), len(opened.val), opened.classes) == (
        9 + 1,
        9 - 1,
        ["bright", "dark"],
    )  # 9 of each: 4 held out
    file.write_text("\n".join(rows))  # without a heading the first two columns
    assert open_data(str(file), val_split=0.5).val.paths == opened.val.paths
    file.write_text("\n".join(["path,label,split", *(f"{row},{row.split('/')[0]}" for row in rows)]))
    assert (len(open_data(f"csv:{file}").train), len(open_data(f"csv:{file}").val)) == (12, 6)


def test_a_folder_of_a_csv_for_each_split(image_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "tables"
    shutil.copytree(image_folder, root / "pictures")
    for split, called in (("train", "train"), ("val", "Validation")):
        rows = [row for row in lines(root) if row.startswith(f"pictures/{split}/")]
        (root / f"{called}.csv").write_text("\n".join(["path,label", *rows]))
    opened, of_folders = open_data(str(root)), open_data(str(image_folder))
    assert (len(opened.train), len(opened.val), opened.classes) == (12, 6, of_folders.classes)
    assert opened.val.labels.tolist() == of_folders.val.labels.tolist()
    assert len(open_data(f"csv:{root}", train=False).val) == 6
    (root / "val.csv").write_text("path,label\n")
    with pytest.raises(
        UserError, match=r"Validation.csv and .*val.csv: both are called like the val split; rename one"
    ):
        open_data(str(root))
    (root / "val.csv").unlink()
    shutil.copytree(image_folder, root, dirs_exist_ok=True)  # where class folders stand, they are the data
    assert str(root / "train" / "dark") in {str(Path(path).parent) for path in open_data(str(root)).train.paths}


def test_class_numbers_of_a_csv_are_in_the_order_of_numbers(image_folder: Path) -> None:
    rows = [row.replace(",dark", ",10").replace(",bright", ",9") for row in lines(image_folder)]
    (image_folder / "all.csv").write_text("\n".join(rows))
    assert open_data(str(image_folder / "all.csv"), val_split=0.2).classes == ["9", "10"]


def test_labels_of_one_number_are_classes_in_the_order_of_their_names(image_folder: Path) -> None:
    rows = [row.replace(",dark", ",1").replace(",bright", ",01") for row in lines(image_folder)]
    (image_folder / "all.csv").write_text("\n".join([rows[0].rpartition(",")[0] + ",2", *rows]))
    assert open_data(str(image_folder / "all.csv"), val_split=0.2).classes == ["01", "1", "2"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("path,label\ntrain/dark/0.png, \n", "line 2: no label; name the class of every image"),
        (
            "path,label\ntrain/dark/0.png,dark\nnowhere.png,dark\n",
            r"1 of its images are not there \(first: .*nowhere.png",
        ),
        (
            "Path,score\ntrain/dark/0.png,1\n",
            "no column for the label among path, score; call it one of label, class, target, category, class_name, or write "
            r"csv:.*all.csv#PATH,LABEL with the names that they have$",
        ),
        (
            "path,apple,ball,cat,split\ntrain/dark/0.png,1,0,1,train\n",
            "apple, ball, cat: one column per class, as it looks; csq takes one label per image: write the name of its class "
            "into one column, `label`",
        ),
        ("path,male,age\ntrain/dark/0.png,1,44\n", "no column for the label among path, male, age"),
        (
            "train/dark/0.png,dark,train\nval/dark/0.png,dark,val\n",
            "line 1: `train` in the third column is called like a split, and no heading says what the columns are; "
            "add the heading path,label,split",
        ),
        ("train/dark/0.png;dark;train\n", "add the heading path;label;split"),
        ("name,kind,fold\ntrain/dark/0.png,dark,train\n", "no column for the path among name, kind, fold"),
        ("label,jpg\ndark,train/dark/0.png\n", "no column for the path among label, jpg; call it one of path, file, "),
        (
            "jpg,kind\ntrain/dark/0.png,dark\n",
            r"1 of its images are not there .*/jpg\); if line 1 is a heading, call the columns path and label, "
            r"or write csv:.*#PATH,LABEL with its names",
        ),
        ("path,label\ntrain/dark/0.png\n", "line 2: 1 fields; path,label is expected"),
        ("path,label,split\ntrain/dark/0.png,dark,holdout\n", "line 2: `holdout` is no split"),
        ("", "no training split"),
    ],
)
def test_what_a_csv_lacks_is_said_by_line(image_folder: Path, text: str, complaint: str) -> None:
    (image_folder / "all.csv").write_text(text)
    with pytest.raises(UserError, match=complaint):
        open_data(str(image_folder / "all.csv"))


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("heading", [True, False])
def test_columns_stand_between_commas_semicolons_or_tabs(image_folder: Path, separator: str, heading: bool) -> None:
    rows = [row.split(",") for row in lines(image_folder)]
    if heading:
        rows = [["label", "path"], *(row[::-1] for row in rows)]
    file = image_folder / "all.TSV"
    file.write_text("\n".join(map(separator.join, rows)))
    opened = open_data(str(file), val_split=0.5)
    assert (opened.classes, len(opened.train)) == (["bright", "dark"], 10)


def test_columns_with_other_names_are_named_after_a_number_sign(image_folder: Path) -> None:
    file = image_folder / "all.csv"
    rows = [f"{row},{row.split('/')[0]}" for row in lines(image_folder)]
    file.write_text("\n".join(["Jpg,Kind of it,part", *rows]))
    assert len(open_data(f"csv:{file}#jpg,kind of it", val_split=0.5).train) == 10
    assert len(open_data(f"csv:{file}#Jpg,Kind of it,part").train) == 12
    with pytest.raises(UserError, match="no column `kind` among Jpg, Kind of it, part"):
        open_data(f"csv:{file}#jpg,kind")
    with pytest.raises(UserError, match=r"`jpg` does not name the columns; write .*all.csv#PATH,LABEL"):
        open_data(f"csv:{file}#jpg")


@pytest.mark.parametrize(
    ("dark", "bright", "complaint"),
    [
        (
            "night|big",
            "day|big",
            r"label `day\|big` is several labels, as it looks: `big` is in `night\|big` too; csq takes one",
        ),
        (
            "night",
            "day; night",
            "label `day; night` is several labels, as it looks: `night` is in `night` too; csq takes one",
        ),
        ('"night,day"', '"day,night"', "`day,night` is several labels"),
        ('"projectile, missile"', "missile", None),  # ImageNet's: a synonym of its own
        ("rock|dark", "sand|bright", None),  # nothing recurs
    ],
)
def test_several_labels_in_one_field_are_refused(
    image_folder: Path, dark: str, bright: str, complaint: str | None
) -> None:
    rows = [row.replace(",dark", f",{dark}").replace(",bright", f",{bright}") for row in lines(image_folder)]
    (image_folder / "all.csv").write_text("\n".join(["path,label", *rows]))
    if complaint is None:
        assert len(open_data(str(image_folder / "all.csv"), val_split=0.5).classes) == 2
        return
    with pytest.raises(UserError, match=complaint):
        open_data(str(image_folder / "all.csv"), val_split=0.5)
    named = open_data(f"csv:{image_folder / 'all.csv'}#path,label", val_split=0.5)  # by who knows what is in it
    assert len(named.classes) == 2


def test_tables_beside_folders_of_classes_are_no_data(image_folder: Path) -> None:
    for name in ("train.csv", "train.tsv", "val.csv"):
        (image_folder / name).write_text("path,label\n")
    assert open_data(str(image_folder)).classes == ["bright", "dark"]


@pytest.fixture
def kaggle(tmp_path: Path, image_folder: Path) -> Path:
    """ImageNet's layout, with two classes."""
    root = tmp_path / "imagenet"
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    rows = ["ImageId,PredictionString"]
    for label, wordnet in (("dark", "n01440764"), ("bright", "n02102040")):
        shutil.copytree(image_folder / "train" / label, images / "train" / wordnet)
        for path in sorted((image_folder / "val" / label).iterdir()):
            (images / "val").mkdir(exist_ok=True)
            name = f"ILSVRC2012_val_{len(rows):08}"
            shutil.copy(path, images / "val" / f"{name}.JPEG")
            rows.append(f"{name},{wordnet} 1 2 3 4 {wordnet} 5 6 7 8")
    (root / "LOC_val_solution.csv").write_text("\n".join([rows[0], *reversed(rows[1:])]) + "\n")
    return root


def test_imagenet_as_kaggle_ships_it(kaggle: Path) -> None:
    for source in (str(kaggle), str(kaggle / "ILSVRC" / "Data" / "CLS-LOC"), f"imagenet:{kaggle}"):
        opened = open_data(source)
        assert opened.classes == ["n01440764", "n02102040"]
        assert opened.val.labels.tolist() == [1, 1, 1, 0, 0, 0]
        assert opened.train.labels.tolist() == [0] * 6 + [1] * 6
    alone = open_data(str(kaggle), train=False)
    assert (alone.classes, alone.train) == (opened.classes, None)


def test_images_that_kaggle_s_labels_name_must_be_there(kaggle: Path) -> None:
    next((kaggle / "ILSVRC" / "Data" / "CLS-LOC" / "val").iterdir()).unlink()
    with pytest.raises(UserError, match=r"1 of the images in LOC_val_solution.csv are not there \(first: "):
        open_data(str(kaggle))


def test_imagenet_s_archives_say_how_they_are_unpacked(tmp_path: Path, image_folder: Path) -> None:
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(b"")
    for source in (f"folder:{tmp_path}", str(tmp_path)):
        with pytest.raises(UserError, match=r"holds ImageNet's archives.*torchvision.*ImageNet\('.*', 'val'\)"):
            open_data(source)
    (image_folder / "ILSVRC2012_img_train.tar").write_bytes(b"")  # unpacked already
    data = open_data(str(image_folder))
    assert data.train is not None
    shutil.rmtree(image_folder / "train")
    assert len(open_data(str(image_folder), train=False).val) == len(data.val)  # nobody asks for the other split
    with pytest.raises(UserError, match=r"train is not unpacked yet"):
        open_data(str(image_folder))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.delitem(__import__("sys").modules, "csqcli.data.tables", raising=False)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"needs the package pyarrow; pip install 'csq\[hf\]'"):
        open_data(str(tmp_path))


FEATURES = {
    "info": {"features": {"picture": {"_type": "Image"}, "kind": {"names": ["dark", "bright"], "_type": "ClassLabel"}}}
}


def table(images: Path, *, described: bool = True):
    """What `datasets` makes of class folders."""
    pa = pytest.importorskip("pyarrow")
    paths = sorted(images.rglob("*.png"))
    columns = {
        "picture": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "kind": [["dark", "bright"].index(path.parent.name) for path in paths],
    }
    metadata = {b"huggingface": json.dumps(FEATURES).encode()} if described else None
    return pa.table(columns).replace_schema_metadata(metadata)


def write(table, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=4)
        return
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=5)


@pytest.mark.parametrize(
    "names",
    [
        ("data/train-00000-of-00001-ab.parquet", "data/validation-00000-of-00001-cd.parquet"),  # the Hub
        ("train/data-00000-of-00001.arrow", "validation/data-00000-of-00001.arrow"),  # save_to_disk
        ("beans-train.arrow", "beans-validation.arrow"),  # the cache of load_dataset
    ],
)
def test_parquet_and_arrow_are_read_row_by_row(image_folder: Path, names: tuple[str, str]) -> None:
    root = image_folder.parent / "table"
    for split, name in zip(("train", "val"), names, strict=True):
        write(table(image_folder / split), root / name)
    opened = open_data(str(root))
    assert opened.classes == ["dark", "bright"]
    folder = open_data(str(image_folder))
    assert opened.train.labels.tolist() == [1] * 6 + [0] * 6  # bright/ first, as the folder's walk
    for index in (11, 0, 5):
        assert opened.train.pil(index, 3).tobytes() == folder.train.pil(index, 3).tobytes()
    assert (len(opened.val), open_data(f"hf:{root}", train=False).train) == (6, None)


def test_a_label_column_that_cannot_be_told_is_asked_for(image_folder: Path) -> None:
    file = image_folder.parent / "train.parquet"
    write(table(image_folder / "train", described=False), file)
    with pytest.raises(
        UserError, match=r"which of picture, kind is the label is not clear; write .*train.parquet#COLUMN"
    ):
        open_data(str(file), val_split=0.5)
    opened = open_data(f"hf:{file}#kind", val_split=0.5)
    assert (opened.classes, len(opened.val)) == (["0", "1"], 6)
