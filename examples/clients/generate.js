// A bundle and its adapters from Node, without edgetune and without Python: npm install onnxruntime-node
//
//   node generate.js BUNDLE ADAPTER TOKEN_ID…          one adapter (or "-" for the base model), prompt as token ids
//
// prints the answer's token ids. A swap is another set of input tensors: nothing is loaded again but a few 100 kB.
// Text ↔ ids is any library that reads BUNDLE/tokenizer.json, such as @huggingface/tokenizers.
"use strict";
const fs = require("node:fs");
const path = require("node:path");
const ort = require("onnxruntime-node");
const { readAdapter } = require("./onnx_adapter.js");

async function main([bundle, name, ...prompt]) {
  const { greedy, toInputs } = await import("../browser/model.js"); // the loop over engine.onnx
  const manifest = JSON.parse(fs.readFileSync(path.join(bundle, "edgetune.json"), "utf8"));
  const session = await ort.InferenceSession.create(path.join(bundle, manifest.graph.engine));
  const entry = manifest.adapters.find((adapter) => adapter.name === name);
  const adapter = entry ? toInputs(ort, readAdapter(path.join(bundle, entry.onnx_adapter))) : {};
  const answer = [];
  for await (const token of greedy(ort, session, manifest, adapter, prompt.map(Number), 16)) answer.push(token);
  console.log(answer.join(" "));
}

main(process.argv.slice(2)).catch((error) => { console.error(error.message); process.exit(1); });
