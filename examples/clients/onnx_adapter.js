// A .onnx_adapter as { name: { shape, data } }.
"use strict";
const fs = require("node:fs");

// The file is a FlatBuffer: a root table whose field 3 lists parameters (name, dims, data type, raw bytes).
function readAdapter(file) {
  const bytes = fs.readFileSync(file);
  if (bytes.toString("latin1", 4, 8) !== "TORT") throw new Error(`${file} is no .onnx_adapter`);
  const follow = (at) => at + bytes.readUInt32LE(at);
  const field = (table, index) => {
    const vtable = table - bytes.readInt32LE(table);
    const offset = 4 + 2 * index < bytes.readUInt16LE(vtable) ? bytes.readUInt16LE(vtable + 4 + 2 * index) : 0;
    return offset ? table + offset : 0;
  };
  const tensors = {}, parameters = follow(field(follow(0), 3));
  for (let i = 0; i < bytes.readUInt32LE(parameters); i++) {
    const parameter = follow(parameters + 4 + 4 * i);
    const [name, dims, raw] = [0, 1, 3].map((index) => follow(field(parameter, index)));
    const text = bytes.toString("utf8", name + 4, name + 4 + bytes.readUInt32LE(name));
    const shape = Array.from({ length: bytes.readUInt32LE(dims) }, (_, d) => Number(bytes.readBigInt64LE(dims + 4 + 8 * d)));
    const data = Uint8Array.from(bytes.subarray(raw + 4, raw + 4 + bytes.readUInt32LE(raw))); // copied, so aligned
    tensors[text] = { shape, data: new Float32Array(data.buffer) };
  }
  return tensors;
}

module.exports = { readAdapter };
