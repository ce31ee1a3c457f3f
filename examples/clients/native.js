// A bundle through edgetune's native engine from Node: npm install koffi (it calls C functions)
//
//   node native.js LIBRARY BUNDLE ADAPTER TOKEN_ID…     one adapter (or "-" for the base model), prompt as token ids
//
// prints the answer's token ids. LIBRARY is libedgetune_native.so (macOS: .dylib), in the installed package's
// edgetune/runtime/engine/native/; edgetune_native.h beside it says what the functions do.
"use strict";
const fs = require("node:fs");
const path = require("node:path");
const koffi = require("koffi");
const { readAdapter } = require("./onnx_adapter.js");

const SIZES = ["hidden", "vocab", "layers", "heads", "kv_heads", "head_dim", "positions", "cache_bytes", "cache_step", "most_tokens", "threads"];
koffi.struct("edgetune_sizes", { ...Object.fromEntries(SIZES.map((name) => [name, "int32_t"])), weight_bytes: "uint64_t" });
koffi.struct("edgetune_cache", { memory: "void *", slots: "int64_t", capacity: "int64_t" });
koffi.struct("edgetune_span", { ids: "void *", count: "int32_t", slot: "int32_t", length: "int32_t", adapter: "void *" });

// The functions of the library; those that fail throw the line that the library gives.
function load(file) {
  const library = koffi.load(file), error = Buffer.alloc(512);
  const checked = (name, declaration, failed) => {
    const call = library.func(declaration);
    return (...values) => {
      const result = call(...values, error, error.length);
      if (failed(result)) throw new Error(error.toString("utf8", 0, error.indexOf(0)));
      return result;
    };
  };
  return {
    open: checked("open", "void *edgetune_open(str plan, size_t, str data, int threads, int cache_bits, str set, uint8_t *error, size_t)", (model) => !model),
    sizes: library.func("void edgetune_model_sizes(void *model, _Out_ edgetune_sizes *sizes)"),
    newAdapter: library.func("void *edgetune_adapter_new(void *model)"),
    add: checked("add", "int edgetune_adapter_add(void *adapter, str site, int rank, float *a, float *b, uint8_t *error, size_t)", (code) => code),
    run: checked("run", "int edgetune_run(void *model, edgetune_cache *cache, edgetune_span *spans, int, int32_t *wanted, int, _Out_ float *logits, void *states, uint8_t *error, size_t)", (code) => code),
  };
}

// An adapter of the bundle, bound to the model.
function bind(native, model, manifest, file) {
  const tensors = readAdapter(file), adapter = native.newAdapter(model);
  for (const site of manifest.sites) {
    const a = tensors[site.A], b = tensors[site.B];
    if (a) native.add(adapter, site.name, a.shape[2], a.data, b.data); // a (1, in, rank), b (1, rank, out)
  }
  return adapter;
}

// Greedy decoding. Keys and values lie in memory of ours: one slot, in whole steps of tokens.
function generate(native, model, adapter, prompt, end, maxNewTokens) {
  const sizes = {}, answer = [], all = Int32Array.from([...prompt, ...Array(maxNewTokens).fill(0)]);
  native.sizes(model, sizes);
  const capacity = Math.ceil(all.length / sizes.cache_step) * sizes.cache_step;
  const memory = new Uint8Array(2 * sizes.layers * sizes.kv_heads * capacity * sizes.cache_bytes);
  const logits = new Float32Array(sizes.vocab);
  for (let done = 0, length = prompt.length; answer.length < maxNewTokens; ) {
    const count = Math.min(length - done, sizes.most_tokens), wanted = done + count === length ? 1 : 0; // in pieces
    const span = { ids: all.subarray(done, done + count), count, slot: 0, length: done, adapter };
    native.run(model, { memory, slots: 1, capacity }, span, 1, Int32Array.of(count - 1), wanted, logits, null);
    done += count;
    if (!wanted) continue;
    answer.push(logits.reduce((best, value, i) => (value > logits[best] ? i : best), 0));
    all[length++] = answer.at(-1);
    if (end.includes(answer.at(-1))) break;
  }
  return answer;
}

function main([file, bundle, name, ...prompt]) {
  const manifest = JSON.parse(fs.readFileSync(path.join(bundle, "edgetune.json"), "utf8"));
  const plan = fs.readFileSync(path.join(bundle, "native.json"), "utf8");
  const native = load(file), data = path.join(bundle, "model.onnx.data");
  const model = native.open(plan, Buffer.byteLength(plan), data, 2, 16, null);
  const entry = manifest.adapters.find((adapter) => adapter.name === name);
  const adapter = entry ? bind(native, model, manifest, path.join(bundle, entry.onnx_adapter)) : null;
  console.log(generate(native, model, adapter, prompt.map(Number), manifest.tokenizer.eos_token_ids, 16).join(" "));
}

try { main(process.argv.slice(2)); } catch (error) { console.error(error.message); process.exit(1); }
