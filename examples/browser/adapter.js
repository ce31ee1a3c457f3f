// An adapter's folder → the tensors that a bundle's graph takes: A (1, in, rank) and B (1, rank,
// out) for each site, scaling folded into B, and its head (1, hidden, labels), (1, labels).
import { PEFT, readTensors } from "./tensor_file.js";

const LORA = /^(.+)\.lora_([AB])(?:\.default)?\.weight$/;
const HEAD = /^(?:\w+\.)?(?:classifier|score)(?:\.modules_to_save(?:\.default)?)?\.(weight|bias)$/;
// What PEFT can do besides W + scaling · B A, which a graph's adapter inputs cannot.
const REFUSED = [
  "use_dora",
  "lora_bias",
  "trainable_token_indices",
  "target_parameters",
  "layer_replication",
  "alora_invocation_tokens",
  "use_qalora",
  "use_bdlora",
  "arrow_config",
  "kasa_config",
  "monteclora_config",
];
const CHANGES_THE_BASE = /^(pissa|olora|corda|loftq|lora_ga)/;

// `config` and `metadata` are the folder's JSON files, `bytes` its weights. Error in one line.
export function packAdapter(manifest, { config, metadata, bytes }) {
  refuse(manifest, config, metadata);
  const { pairs, head } = sorted(readTensors(bytes));
  const tensors = { ...packSites(manifest, scaled(pairs, config)), ...packHead(manifest, head) };
  for (const [name, { data }] of Object.entries(tensors)) {
    if (!data.every(Number.isFinite)) throw new Error(`${name} holds NaN or infinite values`);
  }
  return tensors;
}

function refuse(manifest, config, metadata) {
  if (manifest.mode === "merged")
    throw new Error("this bundle's adapter is merged into its weights");
  const coded = "edgetune_codes" in config;
  if (coded && config.edgetune_codes !== 1) {
    throw new Error(`edgetune_codes: expected 1, got ${config.edgetune_codes}`);
  }
  if (!coded && config.peft_type !== "LORA") {
    throw new Error(`peft_type: expected LORA, got ${config.peft_type}`);
  }
  const changed = CHANGES_THE_BASE.test(config.init_lora_weights) ? "init_lora_weights" : null;
  const bias = (config.bias ?? "none") === "none" ? null : "bias";
  const set = (value) => value && !(typeof value === "object" && !Object.keys(value).length);
  const other = REFUSED.find((key) => set(config[key])) ?? changed ?? bias;
  if (other) throw new Error(`${other} is set: adapter inputs take plain LoRA`);
  const digest = metadata?.base?.digest;
  if (metadata && digest !== manifest.base.digest) {
    const got = `${metadata.base?.name} (${String(digest).slice(0, 15)}…)`;
    throw new Error(`trained on another base: expected ${manifest.base.name}, got ${got}`);
  }
  if (metadata?.head === "transformers") {
    throw new Error("its head has layers of transformers' own, which this page does not compute");
  }
}

// Module → { A, B }, and the head's weight and bias.
function sorted(tensors) {
  const pairs = new Map();
  const head = {};
  for (const [key, tensor] of Object.entries(tensors)) {
    const name = key.startsWith(PEFT) ? key.slice(PEFT.length) : key;
    const lora = LORA.exec(name);
    const layer = HEAD.exec(name);
    if (lora) pairs.set(lora[1], { ...pairs.get(lora[1]), [lora[2]]: tensor });
    else if (layer) head[layer[1]] = tensor;
    else throw new Error(`${key}: the graph has no input for it`);
  }
  return { pairs, head };
}

// PEFT's scaling: alpha / r, or alpha / √r, with patterns by module. Codes have scaling 1.
function scaled(pairs, config) {
  if ("edgetune_codes" in config) return pairs;
  const chosen = (pattern, module, otherwise) => {
    const found = Object.entries(pattern ?? {}).find(([key]) =>
      new RegExp(`^(?:.*\\.)?(?:${key})$`).test(module),
    );
    return found ? found[1] : otherwise;
  };
  for (const [module, { A, B }] of pairs) {
    const alpha = chosen(config.alpha_pattern, module, config.lora_alpha ?? 8);
    const rank = chosen(config.rank_pattern, module, config.r ?? 8);
    if (A && A.shape[0] !== rank) {
      throw new Error(`${module}.lora_A: expected rank ${rank}, got ${A.shape[0]}`);
    }
    const scaling = Math.fround(config.use_rslora ? alpha / Math.sqrt(rank) : alpha / rank);
    if (B) B.data = B.data.map((value) => value * scaling);
  }
  return pairs;
}

const withoutFirst = (module) => {
  const rest = module.slice(module.indexOf(".") + 1);
  return /^\d/.test(rest) ? module : rest;
};

// The parts' A side by side along rank, their B block-diagonally.
function packSites(manifest, pairs) {
  const left = new Map(pairs);
  const take = (module) => {
    const key = [...left.keys()].find((name) =>
      [module, withoutFirst(module)].some((one) => one === name || one === withoutFirst(name)),
    );
    const pair = left.get(key);
    left.delete(key);
    return pair;
  };
  const tensors = {};
  for (const site of manifest.sites) {
    const parts = site.parts
      .map((part) => ({ ...part, ...take(part.module) }))
      .filter((part) => part.A || part.B);
    if (parts.length) Object.assign(tensors, packSite(site, parts));
  }
  if (left.size) throw new Error(`${[...left.keys()][0]}: the graph has no adapter input for it`);
  return tensors;
}

function packSite(site, parts) {
  for (const { module, start, stop, A, B } of parts) {
    const rank = A?.shape[0];
    const fits =
      A && B && `${A.shape}` === `${[rank, site.in]}` && `${B.shape}` === `${[stop - start, rank]}`;
    if (!fits)
      throw new Error(`${module}: not of the shapes (r, ${site.in}), (${stop - start}, r)`);
  }
  const rank = parts.reduce((sum, { A }) => sum + A.shape[0], 0);
  const a = new Float32Array(site.in * rank); // (in, rank)
  const b = new Float32Array(rank * site.out); // (rank, out)
  let row = 0;
  for (const { start, stop, A, B } of parts) {
    const own = A.shape[0];
    for (let k = 0; k < own; k++, row++) {
      for (let i = 0; i < site.in; i++) a[i * rank + row] = A.data[k * site.in + i];
      for (let i = start; i < stop; i++) b[row * site.out + i] = B.data[(i - start) * own + k];
    }
  }
  return {
    [site.A]: { shape: [1, site.in, rank], data: a },
    [site.B]: { shape: [1, rank, site.out], data: b },
  };
}

function packHead(manifest, { weight, bias }) {
  if (!weight) return {};
  if (!manifest.head) throw new Error("this graph takes no task head; export the bundle again");
  const [labels, hidden] = weight.shape;
  if (hidden !== manifest.head.in || (bias && bias.data.length !== labels)) {
    throw new Error(`its head: expected (labels, ${manifest.head.in}), got (${weight.shape})`);
  }
  const turned = new Float32Array(hidden * labels);
  for (let i = 0; i < turned.length; i++) {
    turned[i] = weight.data[(i % labels) * hidden + Math.floor(i / labels)];
  }
  return {
    [manifest.head.weight]: { shape: [1, hidden, labels], data: turned },
    [manifest.head.bias]: { shape: [1, labels], data: bias?.data ?? new Float32Array(labels) },
  };
}
