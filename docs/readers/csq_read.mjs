// Reads csq's bit-packed files (docs/format.md) in Node.js, with nothing but its own modules.
//
//   node docs/readers/csq_read.mjs model.safetensors
//
// prints a line per quantized layer, "integers SHA256 NAME", and a line per tensor of the state dict,
// "tensor SHA256 DTYPE [SHAPE] NAME"; exit code 2 and one line for any other file. As a module: `read(bytes)` gives
// { layers: [{ name, shape, integers }], tensors: Map(name → { dtype, shape, bytes }) }.
// Section numbers are those of docs/format.md.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import { inflateRawSync } from "node:zlib";

const WIDTHS = { float64: 8, float32: 4, float16: 2, bfloat16: 2, int64: 8, int32: 4, int16: 2, int8: 1, uint8: 1, bool: 1 };
const MANIFEST_LIMIT = 2 ** 23;

const refuse = (what) => {
  throw new Error(what);
};
const product = (shape) => shape.reduce((all, side) => all * side, 1);
const parse = (bytes) => JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));

function inflate(bytes, size, exact = true) {
  const { buffer, engine } = inflateRawSync(bytes, { maxOutputLength: Math.max(size, 1), info: true });
  if (buffer.length > size || (exact && buffer.length !== size) || engine.bytesWritten !== bytes.length) {
    refuse("a DEFLATE stream that does not end where its shape says");
  }
  return buffer;
}

/** Section 1: the parsed header, and a function from a tensor's name to its bytes. */
function open(file) {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const length = file.length > 8 ? Number(view.getBigUint64(0, true)) : 0;
  if (!length || length > file.length - 8) refuse("not a safetensors file");
  const header = parse(file.subarray(8, 8 + length));
  const bytesOf = (name) => {
    const { dtype, data_offsets: [start, end] } = header[name] ?? refuse(`tensor ${name} is missing`);
    if (dtype !== "U8" || !(0 <= start && start <= end && end <= file.length - 8 - length)) refuse(`tensor ${name} is damaged`);
    return file.subarray(8 + length + start, 8 + length + end);
  };
  return { head: header.__metadata__?.csq, bytesOf };
}

function halfToNumber(half) {
  const exponent = (half >> 10) & 31;
  const fraction = half & 1023;
  if (exponent === 31) refuse("a float16 number that is not finite");
  const size = exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24;
  return half >> 15 ? -size : size;
}

/** Section 5: all entries of packed_others, name → { dtype, shape, bytes }. */
function unpackOthers(records, bytesOf) {
  const groups = new Map();
  for (const record of records) {
    const stored = record.stored ?? record.dtype;
    if (!(stored in WIDTHS) || !(record.dtype in WIDTHS)) refuse(`type ${stored}`);
    groups.set(stored, [...(groups.get(stored) ?? []), record]);
  }
  const tensors = new Map();
  for (const [stored, members] of groups) {
    const width = WIDTHS[stored];
    const total = members.reduce((sum, record) => sum + product(record.shape), 0);
    const raw = inflate(bytesOf(`csq_${stored}`), total * width);
    let start = 0;
    for (const record of members) {
      const count = product(record.shape);
      let bytes = new Uint8Array(count * width);
      for (let i = 0; i < count; i++) for (let b = 0; b < width; b++) bytes[i * width + b] = raw[b * total + start + i];
      start += count;
      if (stored !== record.dtype) {
        if (stored !== "float16" || record.dtype !== "float32") refuse(`${record.name} is ${record.dtype} stored as ${stored}`);
        const halves = bytes;
        const floats = new DataView(new ArrayBuffer(4 * count));
        const unit = 2 ** -(record.exponent ?? 0);
        for (let i = 0; i < count; i++) floats.setFloat32(4 * i, halfToNumber(halves[2 * i] | (halves[2 * i + 1] << 8)) * unit, true);
        bytes = new Uint8Array(floats.buffer);
      }
      tensors.set(record.name, { dtype: record.dtype, shape: record.shape, bytes });
    }
  }
  return tensors;
}

/** Section 3: a layer's integers. */
function decode(layer, payload) {
  const [, digits, coded] = /^codes(2|4|8|16)(\+huffman)?$/.exec(layer.encoding) ?? refuse(`encoding ${layer.encoding}`);
  const width = Number(digits);
  const count = product(layer.shape);
  const size = Math.ceil((count * width) / 8);
  const codes = coded ? inflate(payload, size) : payload;
  if (codes.length !== size) refuse(`codes of ${layer.name} do not fill its shape`);
  const perByte = 8 / width;
  return Int16Array.from({ length: count }, (_, i) => {
    const code = width === 16 ? codes[i] | (codes[count + i] << 8) : (codes[Math.floor(i / perByte)] >> (width * (i % perByte))) & (2 ** width - 1);
    return code - (2 ** (width - 1) - 1);
  });
}

/** Section 6: a layer's float32 weight as bytes. Its scale or basis is taken out of `others`. */
function weigh(layer, integers, others) {
  const take = (part) => {
    const tensor = others.get(layer.name + part) ?? refuse(`tensor ${layer.name}${part} is missing`);
    if (tensor.dtype !== "float32") refuse(`tensor ${layer.name}${part} is ${tensor.dtype}`);
    others.delete(layer.name + part);
    const view = new DataView(tensor.bytes.buffer);
    return { shape: tensor.shape, values: Array.from({ length: tensor.bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true)) };
  };
  const rank = layer.shape.length;
  const dim = ((layer.channel_dim ?? 0) + rank) % rank;
  const channels = layer.shape[dim];
  const inner = product(layer.shape.slice(dim + 1));
  const basis = layer.basis ? take("_basis") : null;
  const scale = Array.isArray(layer.scale) ? take("_scale").values : [Math.fround(layer.scale)];
  const columns = basis ? basis.shape[1] : scale.length;
  if (columns !== 1 && columns !== channels) refuse(`${layer.name} has ${columns} scales`);
  const planes = basis ? basis.shape[0] : 0;
  const weight = new DataView(new ArrayBuffer(4 * integers.length));
  integers.forEach((integer, i) => {
    const column = columns === 1 ? 0 : Math.floor(i / inner) % channels;
    let value = 0;
    if (basis) {
      const code = (integer + 2 ** planes - 1) / 2;
      if (!Number.isInteger(code) || Math.abs(integer) >= 2 ** planes) refuse(`${layer.name} has an integer that is no sum of digits`);
      for (let j = 0; j < planes; j++) {
        const part = ((code >> j) & 1 ? 1 : -1) * basis.values[j * columns + column];
        value = j ? Math.fround(value + part) : part;
      }
    } else value = Math.fround(integer * scale[column]); // exact in float64, then rounded once
    weight.setFloat32(4 * i, value, true);
  });
  return new Uint8Array(weight.buffer);
}

/** Integers as little-endian int16. */
function int16(integers) {
  const view = new DataView(new ArrayBuffer(2 * integers.length));
  integers.forEach((integer, i) => view.setInt16(2 * i, integer, true));
  return new Uint8Array(view.buffer);
}

/** The layers and the state dict of a bit-packed file's bytes (Uint8Array). Throws an Error with one line for any other. */
export function read(file) {
  const { head, bytesOf } = open(file);
  if (typeof head !== "string") refuse("not a bit-packed file of csq");
  const version = JSON.parse(head).schema_version;
  if (version !== 1 && version !== 2) refuse(`schema version ${version}`);
  const manifest = parse(inflate(bytesOf("csq_manifest"), MANIFEST_LIMIT, false));
  const others = unpackOthers(manifest.packed_others ?? [], bytesOf);
  const codes = bytesOf("csq_codes");
  const hash = createHash("sha256");
  const tensors = new Map();
  let start = 0;
  const layers = manifest.layers.map((layer) => {
    if (start + layer.packed_bytes > codes.length) refuse("payloads beyond the codes");
    const integers = decode(layer, codes.subarray(start, (start += layer.packed_bytes)));
    hash.update(layer.name).update(Uint8Array.of(0)).update(int16(integers));
    const weight = { dtype: "float32", shape: layer.shape, bytes: weigh(layer, integers, others) };
    for (const name of [layer.name, ...(layer.aliases ?? [])]) tensors.set(name, weight);
    return { name: layer.name, shape: layer.shape, integers };
  });
  if (start !== codes.length) refuse("codes that belong to no layer");
  if (hash.digest("hex") !== manifest.payload_sha256) refuse("integers do not match their SHA-256");
  for (const [name, tensor] of others) tensors.set(name, tensor);
  return { layers, tensors };
}

if (process.argv[1] && import.meta.url === pathToFileURL(process.argv[1]).href) {
  try {
    const { layers, tensors } = read(readFileSync(process.argv[2] ?? refuse("give the name of a file")));
    const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");
    for (const { name, integers } of layers) console.log(`integers ${sha256(int16(integers))} ${name}`);
    for (const [name, { dtype, shape, bytes }] of tensors) console.log(`tensor ${sha256(bytes)} ${dtype} [${shape}] ${name}`);
  } catch (error) {
    console.error(`csq_read: ${error.message}`);
    process.exitCode = 2;
  }
}
