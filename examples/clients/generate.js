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
const { readAdapter } = require("./onnx_adapter.js");

// An adapter's tensors, by the names of the inputs that take them.
function adapterInputs(file) {
  const tensors = Object.entries(readAdapter(file));
  return Object.fromEntries(tensors.map(([name, { shape, data }]) => [name, new ort.Tensor("float32", data, shape)]));
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
  const adapter = entry ? adapterInputs(path.join(bundle, entry.onnx_adapter)) : {};
  console.log((await generate(session, manifest, adapter, prompt.map(Number), 16)).join(" "));
}

main(process.argv.slice(2)).catch((error) => { console.error(error.message); process.exit(1); });
