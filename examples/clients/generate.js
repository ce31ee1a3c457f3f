// A bundle and its adapters from Node, without edgetune and without Python: npm install onnxruntime-node
//
//   node generate.js BUNDLE ADAPTER TOKEN_ID…          one adapter (or "-" for the base model), prompt as token ids
//
// prints the answer's token ids. A swap is another set of input tensors: nothing is loaded again but a few 100 kB.
// Text ↔ ids is any library that reads BUNDLE/tokenizer.json, such as @huggingface/transformers.
"use strict";
const fs = require("node:fs");
const path = require("node:path");
const ort = require("onnxruntime-node");

// A .onnx_adapter is a FlatBuffer: a root table whose field 3 lists parameters (name, dims, data type, raw bytes).
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
    tensors[text] = new ort.Tensor("float32", new Float32Array(data.buffer), shape);
  }
  return tensors;
}

// The base model: every site with rank 0.
function noAdapter(manifest) {
  const tensors = {};
  for (const site of manifest.sites) {
    tensors[site.A] = new ort.Tensor("float32", new Float32Array(0), [1, site.in, 0]);
    tensors[site.B] = new ort.Tensor("float32", new Float32Array(0), [1, 0, site.out]);
  }
  return tensors;
}

async function generate(session, manifest, adapter, prompt, maxNewTokens) {
  const { layers, kv_heads: heads, head_dim: width, vocab_size: vocabulary } = manifest.graph;
  const capacity = prompt.length + maxNewTokens, cache = {}, answer = [];
  for (let layer = 0; layer < layers; layer++) {
    for (const side of ["key", "value"]) {
      const empty = new Float32Array(heads * capacity * width);
      cache[`past_key_values.${layer}.${side}`] = new ort.Tensor("float32", empty, [1, heads, capacity, width]);
    }
  }
  for (let ids = prompt, length = prompt.length; answer.length < maxNewTokens; length += 1) {
    const inputs = {
      input_ids: new ort.Tensor("int64", BigInt64Array.from(ids.map(BigInt)), [1, ids.length]),
      seqlens_k: new ort.Tensor("int32", Int32Array.of(length - 1), [1]),
      total_sequence_length: new ort.Tensor("int32", Int32Array.of(length), []),
      logits_index: new ort.Tensor("int64", BigInt64Array.of(BigInt(ids.length - 1)), [1, 1]),
    };
    const outputs = await session.run({ ...inputs, ...cache, ...noAdapter(manifest), ...adapter });
    for (const name of Object.keys(cache)) cache[name] = outputs[name.replace("past_key_values", "present")];
    const logits = outputs.logits.data.subarray(0, vocabulary);
    const token = logits.reduce((best, value, i) => (value > logits[best] ? i : best), 0); // greedy
    answer.push(token);
    if (manifest.tokenizer.eos_token_ids.includes(token)) break;
    ids = [token];
  }
  return answer;
}

async function main([bundle, name, ...prompt]) {
  const manifest = JSON.parse(fs.readFileSync(path.join(bundle, "edgetune.json"), "utf8"));
  const session = await ort.InferenceSession.create(path.join(bundle, manifest.graph.engine));
  const entry = manifest.adapters.find((adapter) => adapter.name === name);
  const adapter = entry ? readAdapter(path.join(bundle, entry.onnx_adapter)) : {};
  console.log((await generate(session, manifest, adapter, prompt.map(Number), 16)).join(" "));
}

main(process.argv.slice(2)).catch((error) => { console.error(error.message); process.exit(1); });
