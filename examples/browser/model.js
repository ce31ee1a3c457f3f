// A bundle's engine.onnx over ONNX Runtime, in a browser or in Node (`ort` is either package):
// tokens in, tokens or logits out. An adapter is a set of input tensors, so a swap loads nothing.

// An adapter's tensors, { name: { shape, data } }, as inputs.
export function toInputs(ort, tensors) {
  return Object.fromEntries(
    Object.entries(tensors).map(([name, { shape, data }]) => [
      name,
      new ort.Tensor("float32", data, shape),
    ]),
  );
}

// The base model: every site with rank 0, and of an encoder a head without labels.
export function noAdapter(ort, manifest) {
  const tensors = {};
  const empty = (name, shape) => {
    tensors[name] = { shape, data: new Float32Array(0) };
  };
  for (const site of manifest.mode === "merged" ? [] : manifest.sites) {
    empty(site.A, [1, site.in, 0]);
    empty(site.B, [1, 0, site.out]);
  }
  if (manifest.head && manifest.task !== "text-generation") {
    empty(manifest.head.weight, [1, manifest.head.in, 0]);
    empty(manifest.head.bias, [1, 0]);
  }
  return toInputs(ort, tensors);
}

const int64 = (ort, values) =>
  new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

function emptyCache(ort, manifest, capacity) {
  const { layers, kv_heads: heads, head_dim: width } = manifest.graph;
  const cache = {};
  for (let layer = 0; layer < layers; layer++) {
    for (const side of ["key", "value"]) {
      const data = new Float32Array(heads * capacity * width);
      const shape = [1, heads, capacity, width];
      cache[`past_key_values.${layer}.${side}`] = new ort.Tensor("float32", data, shape);
    }
  }
  return cache;
}

// One run of a decoder over `ids`, the last of `length` tokens so far.
function step(ort, session, inputs, cache, ids, length, outputs) {
  const own = {
    input_ids: int64(ort, ids),
    seqlens_k: new ort.Tensor("int32", Int32Array.of(length - 1), [1]),
    total_sequence_length: new ort.Tensor("int32", Int32Array.of(length), []),
    logits_index: int64(ort, [ids.length - 1]),
  };
  return session.run({ ...own, ...cache, ...inputs }, outputs);
}

// Greedy decoding: yields token ids up to an end token, itself included. The cache that a step
// gives is the next one's input.
export async function* greedy(ort, session, manifest, adapter, prompt, maxNewTokens) {
  const inputs = { ...noAdapter(ort, manifest), ...adapter };
  const most = Math.min(maxNewTokens, manifest.graph.max_length - prompt.length);
  let cache = emptyCache(ort, manifest, prompt.length + most);
  const present = (name) => name.replace("past_key_values", "present");
  const outputs = ["logits", ...Object.keys(cache).map(present)];
  for (let ids = prompt, made = 0; made < most; made++) {
    const found = await step(ort, session, inputs, cache, ids, prompt.length + made, outputs);
    cache = Object.fromEntries(Object.keys(cache).map((name) => [name, found[present(name)]]));
    const token = largest(found.logits.data.subarray(0, manifest.graph.vocab_size));
    yield token;
    if (manifest.tokenizer.eos_token_ids.includes(token)) return;
    ids = [token];
  }
}

function largest(logits) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (!Number.isFinite(logits[best])) throw new Error("what the model computed is not finite");
  return best;
}

// The logits (labels,) of a text: of a decoder, its adapter's head on the last token's state.
export async function labelLogits(ort, session, manifest, adapter, ids) {
  const inputs = { ...noAdapter(ort, manifest), ...adapter };
  if (manifest.task !== "text-generation") {
    const own = {
      input_ids: int64(ort, ids),
      attention_mask: int64(
        ort,
        ids.map(() => 1),
      ),
    };
    if (manifest.graph.token_type_ids)
      own.token_type_ids = int64(
        ort,
        ids.map(() => 0),
      );
    return (await session.run({ ...own, ...inputs }, ["logits"])).logits.data;
  }
  const { weight, bias } = manifest.head;
  const { [weight]: matrix, [bias]: offset, ...rest } = inputs;
  const cache = emptyCache(ort, manifest, ids.length);
  const outputs = ["last_hidden_state"];
  const found = await step(ort, session, rest, cache, ids, ids.length, outputs);
  const state = found.last_hidden_state.data;
  return offset.data.map((start, label) =>
    state.reduce(
      (sum, value, i) => sum + value * matrix.data[i * offset.data.length + label],
      start,
    ),
  );
}

// Logits → what Runtime.classify answers: { label, scores, rejected }, `value` of a regression.
export function readLogits(logits, { labels, problem, confidence }) {
  if (!logits.every(Number.isFinite)) throw new Error("what the model computed is not finite");
  if (problem === "regression") return { label: "value", scores: [], value: logits[0] };
  const scaled = Array.from(logits, (value) => value / (confidence?.temperature ?? 1));
  const top = Math.max(...scaled);
  const powers = scaled.map((value) => Math.exp(value - top));
  const sum = powers.reduce((total, value) => total + value, 0);
  const several = problem === "multi-label";
  const scores = labels
    .map((label, i) => ({
      label,
      score: several ? 1 / (1 + Math.exp(-scaled[i])) : powers[i] / sum,
    }))
    .sort((one, other) => other.score - one.score);
  const [best] = scores;
  const least = several ? null : confidence?.threshold;
  const rejected = least != null && best.score < least ? best.label : null;
  return { label: rejected === null ? best.label : null, scores, rejected, threshold: least };
}
