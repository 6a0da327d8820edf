"""Recipes, --set, names and environment variables."""

from __future__ import annotations

import contextlib
import json
import random

from tests.fuzz.values import CANARY, DEEP, SECRET, hostile, mutate_bytes, mutate_tree, odd_key

YAML_SNIPPETS = [
    "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b]\n"
    "d: &d [*c, *c, *c, *c, *c, *c, *c, *c]\ne: &e [*d, *d, *d, *d, *d, *d, *d, *d]\nf: [*e, *e, *e, *e, *e, *e, *e, *e]\n",
    "model: {arguments: &m {x: *m}}\n",
    "model:\n  arguments: &a [x,x,x,x,x,x,x,x,x]\n  b: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nlayers: {keep: *b}\n",
    f"x: !!python/object/apply:os.system ['touch {SECRET}']\n",
    f"x: !!python/name:{CANARY}.boom\n",
    "x: !!python/module:os\n",
    "seed: 0x" + "f" * 6000 + "\n",
    "seed: " + "9" * 5000 + "\n",
    "seed: 1" + ":59" * 3000 + "\n",
    "epochs: 1e400\n",
    "optimizer: {lr: .inf}\n",
    "optimizer: {lr: .nan}\n",
    'description: "\\ud800"\n',
    'description: "\\e[2J"\n',
    "x: " + DEEP + "\n",
    "x: " + "{a: " * 2000 + "\n",
    "- " * 3000 + "\n",
    "? [a, b]\n: c\n",
    "? {a: b}\n: c\n",
    "x: !!timestamp nonsense\n",
    "x: 2001-99-99\n",
    "x: !!binary '@@'\n",
    "x: !!int ''\n",
    "x: !!float ''\n",
    "x: !!bool maybe\n",
    "x: !!set {a, b}\n",
    "1: 2\nnull: 3\ntrue: 4\n",
    "data: {workers: 1000000}\n",
    "data: [1]\n",
    "model: null\n",
    "data: 7\n",
    "\ttab: 1\n",
    "%YAML 9.9\n---\n",
    "--- a\n--- b\n",
    "<<: {epochs: 3}\n",
    "\0",
    "\ufeff",
    "layers: {min_bits: {fc: 99999999999999999999}}\n",
]


def mutate_yaml(text: str, rng: random.Random) -> bytes:
    import yaml

    kind = rng.randrange(4)
    if kind == 0:
        return mutate_bytes(text.encode(), rng, "".join(YAML_SNIPPETS).encode())
    if kind == 1:
        lines = text.splitlines(keepends=True)
        at = rng.randrange(len(lines) + 1)
        return "".join([*lines[:at], rng.choice(YAML_SNIPPETS), *lines[at:]]).encode("utf-8", "surrogatepass")
    if kind == 2:
        return rng.choice(YAML_SNIPPETS).encode("utf-8", "surrogatepass")
    with contextlib.suppress(yaml.YAMLError, RecursionError, ValueError):
        return yaml.safe_dump(mutate_tree(yaml.safe_load(text), rng)).encode("utf-8", "surrogatepass")
    return text.encode()


def assignment(rng: random.Random) -> str:
    from csqcli.quant.catalog import CARDS
    from csqcli.recipe.keys import leaves_of

    card = rng.choice(list(CARDS.values()))
    key = rng.choice(
        [*leaves_of(card), "lr", "max_bits", "model.arguments.x", "layers.min_bits.fc", "..", "", odd_key(rng)]
    )
    values = [
        json.dumps(hostile(rng)),
        *(s.partition(": ")[2].strip() for s in YAML_SNIPPETS),
        "{",
        "*a",
        "&a",
        "!!x y",
    ]
    return f"{key}={rng.choice(values)}"


_VARIABLES = [
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "CSQ_DEBUG"),
    *(
        "COLUMNS",
        "LINES",
        "TERM",
        "NO_COLOR",
        "FORCE_COLOR",
        "TTY_COMPATIBLE",
        "HF_ENDPOINT",
        "TORCH_HOME",
        "TMPDIR",
        "HOME",
    ),
]


def environment(rng: random.Random) -> dict[str, str]:
    """Variables that csq or its libraries read, with values that nobody meant. No group of processes that could form."""
    values = [
        "",
        "0",
        "1",
        "2",
        "-1",
        "abc",
        "1.5",
        " 1",
        "\u0662",
        "9" * 400,
        "\x1b[2J",
        "/nowhere",
        "[red]",
        "é",
        "true",
    ]
    found = {rng.choice(_VARIABLES): rng.choice(values) for _ in range(rng.choice([1, 2, 4]))}
    return found | ({"MASTER_PORT": rng.choice(["", "abc", "-1", "99999999"])} if rng.random() < 0.7 else {})


def odd_name(rng: random.Random) -> str:
    """A file's, folder's, class's or layer's name as a file system would allow it: no slash, no zero byte."""
    parts = [
        *(
            "a",
            "fc",
            "conv1.weight",
            "[/red]",
            "[bold]",
            "\x1b[2J",
            "\x1b]0;t\x07",
            "\n",
            "\t",
            "\r",
            " ",
            ".",
            "..",
            "-",
            "--",
        ),
        *(
            "\u202e",
            "\u200b",
            "\u00a0",
            "\u3000",
            "\u00ad",
            "\udce9",
            "\ufeff",
            "é",
            "日本",
            "%s",
            "{0}",
            "$(x)",
            "*",
            "?",
            "[",
        ),
        *(
            "x" * 60,
            ".pth",
            ".onnx",
            ".safetensors",
            ".yaml",
            "timm:",
            "csq:",
            "builtin:",
            "digits",
            "os:getcwd",
            "~",
            "\\",
        ),
    ]
    return "".join(rng.choice(parts) for _ in range(rng.choice([1, 2, 3]))).replace("/", "") or "a"
