"""ONNX files: other graphs, other metadata, with the hash made right or not."""

from __future__ import annotations

import json
import random

from tests.fuzz.values import SECRET, dump, mutate_bytes, mutate_tree


def mutate_onnx(data: bytes, rng: random.Random, other: bytes) -> bytes:
    import onnx

    from csqcli.exporting import runtime

    kind = rng.randrange(5)
    if kind == 0:
        return mutate_bytes(data, rng, other)
    proto = onnx.ModelProto.FromString(data)
    entry = next(entry for entry in proto.metadata_props if entry.key == "csq")
    manifest = json.loads(entry.value)
    if kind in (1, 2):
        entry.value = dump(mutate_tree(manifest, rng), rng).encode("utf-8", "replace").decode()
        return proto.SerializeToString()
    graph = proto.graph
    value, node = rng.choice(graph.initializer), rng.choice(graph.node)
    change = rng.randrange(6)
    if change == 0:
        value.data_location = onnx.TensorProto.EXTERNAL
        value.ClearField("raw_data")
        value.external_data.add(key="location", value=rng.choice([SECRET, "../x", "/etc/passwd", "model.safetensors"]))
    elif change == 1:
        value.dims[:] = [rng.choice([0, 1, 2, 10, 2**31, 2**40]) for _ in range(rng.randrange(4))]
    elif change == 2:
        value.data_type = rng.randrange(0, 24)
    elif change == 3:
        node.op_type = rng.choice(["Loop", "If", "Nothing", "Expand", "ConstantOfShape", "Gather", "Identity", ""])
    elif change == 4 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(["", "images", "nowhere", node.output[0], "logits"])
    else:
        graph.output[0].name = rng.choice(["x", "images", ""])
    if kind == 3:  # and the hash is made right
        manifest["parity"]["graph_sha256"] = runtime.graph_sha256(proto)
        entry.value = json.dumps(manifest)
    return proto.SerializeToString()


# ---- the corpus
