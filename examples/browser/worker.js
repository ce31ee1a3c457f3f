// The model beside the page, so that the page stays awake: { id, call, args } in, { id, … } out.
import { Bundle, threads } from "./bundle.js";

let bundle = null;
let stop = false;

const calls = {
  async open(id, url) {
    await bundle?.close();
    bundle = null;
    const start = performance.now();
    let from = null;
    bundle = await Bundle.open(url, (progress) => {
      from = progress.from === "network" ? "network" : (from ?? "cache");
      postMessage({ id, progress });
    });
    const { manifest, total, kept } = bundle;
    const adapters = manifest.adapters.map(({ name, task, rank, path }) => ({
      name,
      task,
      rank,
      bytes: path && manifest.files[`${path}/adapter_model.safetensors`]?.bytes,
    }));
    const { base, task, precision, mode } = manifest;
    const ms = performance.now() - start;
    return { base, task, precision, mode, adapters, total, from, kept, ms, threads };
  },
  load: (id, name) => bundle.load(name),
  async add(id, url) {
    const added = await bundle.add(url);
    return { ...added, task: bundle.adapters.get(added.name).about.task };
  },
  answer(id, prompt, name) {
    stop = false;
    const onText = (text, ids) => postMessage({ id, text, count: ids.length });
    return bundle.answer(prompt, name, { onText, stopped: () => stop });
  },
};

onmessage = async ({ data: { id, call, args } }) => {
  if (call === "stop") {
    stop = true;
    return;
  }
  try {
    postMessage({ id, result: await calls[call](id, ...args) });
  } catch (error) {
    const [line] = String(error?.message ?? error).split("\n");
    postMessage({ id, error: line });
  }
};

postMessage({ ready: true });
