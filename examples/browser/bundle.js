// A bundle that is open in this tab: one base, and the adapters that were asked for.
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { packAdapter } from "./adapter.js";
import { fetchFile, fetchJson } from "./files.js";
import { greedy, labelLogits, readLogits, toInputs } from "./model.js";
import { BundleText } from "./text.js";

const WEIGHTS = "adapter_model.safetensors";
const CONFIG = "adapter_config.json";
const METADATA = "edgetune_adapter.json";

ort.env.logLevel = "error";
// Settings of an adapter that change its answers and that greedy decoding here does not know.
const NOT_FOLLOWED = ["temperature", "repetition_penalty", "frequency_penalty", "presence_penalty"];
NOT_FOLLOWED.push("logit_bias", "stop", "schema", "regex", "grammar");

// Threads need memory that they share, which a page has where its server sends two headers.
export const threads = globalThis.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
ort.env.wasm.numThreads = threads;

export class Bundle {
  // Fetch and open the bundle at `url`. `progress({ done, total, from })` counts the base's bytes.
  static async open(url, progress = () => {}) {
    const bundle = new Bundle();
    bundle.url = new URL(url.endsWith("/") ? url : `${url}/`, location.href).href;
    bundle.manifest = await fetchJson(bundle.at("edgetune.json"));
    refuse(bundle.manifest);
    const { graph, tokenizer } = bundle.manifest;
    const names = [graph.engine, graph.data, tokenizer.file, tokenizer.chat_template];
    const total = names.reduce((sum, name) => sum + (name ? bundle.info(name).bytes : 0), 0);
    let done = 0;
    const files = [];
    bundle.kept = true;
    for (const name of names) {
      const counted = (bytes) => progress({ done: (done += bytes), total, from: "network" });
      const file = name ? await fetchFile(bundle.at(name), bundle.info(name), counted) : null;
      if (file?.from === "cache") {
        progress({ done: (done += file.bytes.length), total, from: "cache" });
      }
      if (file?.kept === false) bundle.kept = false;
      files.push(file?.bytes ?? null);
    }
    const [engine, data, document, template] = files;
    const text = (bytes) => new TextDecoder().decode(bytes);
    bundle.text = new BundleText(
      bundle.manifest,
      JSON.parse(text(document)),
      template && text(template),
    );
    const externalData = data ? [{ path: graph.data, data }] : [];
    const options = { executionProviders: ["wasm"], externalData };
    bundle.session = await ort.InferenceSession.create(engine, options);
    bundle.total = total;
    bundle.adapters = new Map(bundle.manifest.adapters.map((entry) => [entry.name, { entry }]));
    return bundle;
  }

  // Fetch and pack an adapter where that was not done yet; what it cost: { ms, bytes, from }.
  async load(name) {
    const start = performance.now();
    const held = this.adapters.get(name);
    if (!held) throw new Error(`no adapter ${name}`);
    if (held.inputs) return { ms: performance.now() - start, bytes: held.bytes, from: "memory" };
    const found =
      this.manifest.mode === "merged"
        ? { inputs: {}, about: held.entry, bytes: 0, from: "the base" }
        : await this.read(held);
    Object.assign(held, found);
    return { ms: performance.now() - start, bytes: held.bytes, from: held.from };
  }

  // Add an adapter folder from anywhere, as `edgetune train` or `edgetune compress` wrote it.
  async add(url) {
    const folder = new URL(url.endsWith("/") ? url : `${url}/`, location.href).href;
    const path = new URL(folder).pathname.replace(/(\/adapter)?\/$/, ""); // named after its run
    const name = decodeURIComponent(path.split("/").pop());
    if (this.adapters.has(name)) throw new Error(`there is an adapter ${name} already`);
    this.adapters.set(name, { entry: null, folder });
    try {
      return { name, ...(await this.load(name)) };
    } catch (error) {
      this.adapters.delete(name);
      throw error;
    }
  }

  async read({ entry, folder }) {
    const at = (name) => (folder ? `${folder}${name}` : this.at(`${entry.path}/${name}`));
    const listed = (name) => this.manifest.files[`${entry.path}/${name}`] ?? null;
    const metadata =
      entry && !listed(METADATA)
        ? null
        : await fetchJson(at(METADATA), folder ? null : listed(METADATA), null);
    const info = async (name) =>
      folder
        ? metadata?.files?.[name]
          ? { sha256: metadata.files[name], bytes: null }
          : null
        : this.info(`${entry.path}/${name}`);
    const config = await fetchJson(at(CONFIG), await info(CONFIG));
    const { bytes, from } = await fetchFile(at(WEIGHTS), await info(WEIGHTS));
    const inputs = toInputs(ort, packAdapter(this.manifest, { config, metadata, bytes }));
    const about = { ...entry, ...metadata };
    if (about.task === "sequence-classification" && !inputs[this.manifest.head.weight]) {
      throw new Error(`${WEIGHTS} has no head, which its task needs`);
    }
    return { inputs, about, bytes: bytes.length, from };
  }

  // Answer with an adapter, or (null) with the base: { ids, text, first, total } in ms, or a
  // classification. `onText(text, ids)` hears of each token; `stopped()` ends it.
  async answer(prompt, name, { onText = () => {}, stopped = () => false } = {}) {
    const merged = this.manifest.mode === "merged" ? this.manifest.adapters[0].name : null;
    const chosen = name ?? merged;
    if (chosen === null && this.manifest.task !== "text-generation") {
      throw new Error("choose an adapter: this base alone gives no answers");
    }
    if (chosen !== null) await this.load(chosen);
    const { inputs, about } =
      chosen === null ? { inputs: {}, about: {} } : this.adapters.get(chosen);
    const task = about.task ?? this.manifest.task;
    if (task === "sequence-classification") return this.classify(prompt, inputs, about);
    if (task !== "text-generation") {
      throw new Error(`an adapter for ${task}: this page generates and classifies`);
    }
    return this.generate(prompt, inputs, about, onText, stopped);
  }

  async generate(prompt, inputs, about, onText, stopped) {
    const ids = this.text.promptIds(prompt, about.prompt_format);
    this.check(ids, this.manifest.graph.max_length - 1);
    const most = about.generation?.max_new_tokens ?? 256;
    const start = performance.now();
    const made = [];
    let first = null;
    for await (const token of greedy(ort, this.session, this.manifest, inputs, ids, most)) {
      made.push(token);
      first ??= performance.now() - start;
      onText(this.text.decode(made, false), made);
      await new Promise((later) => setTimeout(later)); // so that a stop is heard
      if (stopped()) break;
    }
    const total = performance.now() - start;
    const passedOver = NOT_FOLLOWED.filter((key) => about.generation?.[key]);
    return { ids: made, text: this.text.decode(made, true), prompt: ids, first, total, passedOver };
  }

  async classify(text, inputs, about) {
    if (about.prompt_format?.text_pair != null)
      throw new Error("it reads two texts at once: this page gives one");
    const ids = this.text.textIds(text, about.prompt_format);
    this.check(ids, this.manifest.graph.max_length);
    const start = performance.now();
    const logits = await labelLogits(ort, this.session, this.manifest, inputs, ids);
    return { ...readLogits(logits, about), prompt: ids, total: performance.now() - start };
  }

  check(ids, most) {
    if (!ids.length) throw new Error("an empty prompt");
    if (ids.length > most) throw new Error(`expected at most ${most} tokens, got ${ids.length}`);
  }

  at(name) {
    return new URL(name, this.url).href;
  }

  info(name) {
    const found = this.manifest.files[name];
    if (!found) throw new Error(`edgetune.json does not list ${name}; export the bundle again`);
    return found;
  }

  async close() {
    await this.session?.release();
  }
}

function refuse({ schema, graph, precision }) {
  if (schema !== 1 && schema !== 2)
    throw new Error(`edgetune.json: expected schema 1 or 2, got ${schema}`);
  if (graph.encoder) throw new Error("an encoder-decoder: this page runs decoders and encoders");
  if (precision.weights === "fp16") {
    throw new Error("an fp16 bundle, for GPUs: export it in fp32, int8 or int4 for a browser");
  }
}
