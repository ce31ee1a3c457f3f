// The page: what is asked of the worker, and what is shown of its answers.
//
//   index.html?bundle=ADDRESS&adapter=ADDRESS&adapter=ADDRESS     opens a bundle and adds adapters
const $ = (id) => document.getElementById(id);
const waiting = new Map(); // id of a call → what hears of it
let calls = 0;
let model = null;

const worker = new Worker("worker.js", { type: "module" });
worker.onerror = () =>
  show("the model’s code cannot be loaded: run npm install in this page’s folder");
worker.onmessage = ({ data }) => {
  const call = waiting.get(data.id);
  if (!call) return;
  if (!("result" in data || "error" in data)) return call.hear(data);
  waiting.delete(data.id);
  if ("error" in data) call.reject(new Error(data.error));
  else call.resolve(data.result);
};

function ask(call, args, hear = () => {}) {
  const id = ++calls;
  worker.postMessage({ id, call, args });
  return new Promise((resolve, reject) => waiting.set(id, { resolve, reject, hear }));
}

const megabytes = (bytes) =>
  bytes >= 1e6 ? `${(bytes / 1e6).toFixed(1)} MB` : `${Math.ceil(bytes / 1e3)} kB`;
const milliseconds = (ms) =>
  ms >= 1e4 ? `${(ms / 1e3).toFixed(1)} s` : `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
const chosen = () => document.querySelector("#adapters :checked")?.value ?? "";

function show(line) {
  $("error").textContent = line;
  $("error").hidden = !line;
}

// Run what a control asks for with everything else switched off; an error is one line.
async function busy(work) {
  const controls = [...document.querySelectorAll("button, input")].filter(
    (one) => one.id !== "stop",
  );
  for (const one of controls) one.disabled = true;
  show("");
  try {
    await work();
  } catch (error) {
    show(error.message);
  }
  for (const one of controls) one.disabled = false;
  $("answer-button").disabled = !model;
  $("add").querySelector("button").disabled = !model || model.mode === "merged";
}

async function open(url) {
  model = null;
  $("adapters").replaceChildren();
  for (const id of ["opened", "switched", "numbers"]) $(id).textContent = "";
  clear();
  $("facts").textContent = "No bundle is open.";
  $("progress").hidden = false;
  $("progress").value = 0;
  try {
    model = await ask("open", [url], ({ progress }) => {
      $("progress").value = progress.done / progress.total;
      $("opened").textContent = `${megabytes(progress.done)} of ${megabytes(progress.total)}`;
    });
  } catch (error) {
    $("opened").textContent = "";
    throw error;
  } finally {
    $("progress").hidden = true;
  }
  const { base, precision, total, from, kept, ms, threads } = model;
  $("facts").textContent =
    `${base.name} · ${precision.weights} · ${threads} thread${threads > 1 ? "s" : ""}`;
  const network = kept ? "from the network, and kept" : "from the network; no room to keep it";
  const source = from === "cache" ? "out of this browser’s cache" : network;
  $("opened").textContent = `${megabytes(total)} ${source}, open after ${milliseconds(ms)}.`;
  if (model.mode !== "merged") list({ name: "", task: "the base model" });
  for (const adapter of model.adapters) list(adapter);
  $("adapters").querySelector("input").checked = true;
}

function list({ name, task, rank, bytes }) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), {
    type: "radio",
    name: "adapter",
    value: name,
  });
  const title = Object.assign(document.createElement("b"), { textContent: name || "none" });
  const facts = [task, rank ? `rank ${rank}` : null, bytes ? megabytes(bytes) : null];
  const about = Object.assign(document.createElement("span"), {
    textContent: facts.filter(Boolean).join(" · "),
  });
  label.className = "adapter";
  label.append(input, title, about);
  $("adapters").append(label);
  return input;
}

function switched(name, { ms, bytes, from }) {
  const size = bytes
    ? ` (${megabytes(bytes)} from ${from === "memory" ? "memory" : `the ${from}`})`
    : "";
  $("switched").textContent = `${name || "The base model"} after ${milliseconds(ms)}${size}.`;
  $("switched").dataset.ms = ms;
  $("switched").dataset.from = from;
}

async function choose(name) {
  clear();
  switched(name, name ? await ask("load", [name]) : { ms: 0, bytes: 0, from: "memory" });
}

async function add(url) {
  const added = await ask("add", [url]);
  list(added).checked = true;
  switched(added.name, added);
}

function clear() {
  $("answer").replaceChildren();
  $("numbers").textContent = "";
  $("ids-shown").hidden = true;
}

async function answer() {
  clear();
  $("stop").disabled = false;
  try {
    const found = await ask("answer", [$("prompt").value, chosen() || null], ({ text, count }) => {
      $("answer").textContent = text;
      $("numbers").textContent = `${count} tokens`;
    });
    if (found.ids) showText(found);
    else showLabels(found);
  } finally {
    $("stop").disabled = true;
  }
}

function showText({ text, ids, prompt, first, total, passedOver }) {
  $("answer").textContent = text;
  const rate =
    ids.length > 1
      ? `, then ${(((ids.length - 1) / (total - first)) * 1e3).toFixed(1)} a second`
      : "";
  const other = passedOver.length
    ? ` The adapter’s own ${passedOver.join(", ")} is not followed here.`
    : "";
  const counts = `${prompt.length} tokens read, ${ids.length} written`;
  $("numbers").textContent = `${counts}: the first after ${milliseconds(first)}${rate}.${other}`;
  $("ids").textContent = ids.join(" ");
  $("ids-shown").hidden = false;
}

function showLabels({ label, scores, rejected, threshold, value, prompt, total }) {
  if (value !== undefined) $("answer").textContent = value;
  if (rejected !== null && rejected !== undefined) {
    $("answer").textContent = `No label: ${rejected} is below the threshold of ${threshold}.\n\n`;
  }
  for (const { label: name, score } of scores) {
    const bar = document.createElement("div");
    bar.className = "bar";
    bar.append(
      ...[name, `${(100 * score).toFixed(1)} %`].map((text) =>
        Object.assign(document.createElement("span"), { textContent: text }),
      ),
    );
    bar.append(Object.assign(document.createElement("meter"), { value: score, ariaLabel: name }));
    bar.dataset.score = score;
    $("answer").append(bar);
  }
  $("answer").dataset.label = label ?? "";
  $("numbers").textContent = `${prompt.length} tokens read in ${milliseconds(total)}.`;
}

const submitted = (id, work) =>
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    busy(work);
  });
submitted("open", () => open($("url").value));
submitted("add", () => add($("adapter-url").value));
submitted("ask", answer);
$("adapters").addEventListener("change", () => busy(() => choose(chosen())));
$("stop").addEventListener("click", () => worker.postMessage({ call: "stop" }));
$("forget").addEventListener("click", () =>
  busy(async () => {
    const { CACHE } = await import("./files.js");
    await caches.delete(CACHE);
    $("switched").textContent = "Forgotten: the next bundle comes from the network.";
  }),
);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.ctrlKey && model) $("ask").requestSubmit();
});

const wanted = new URLSearchParams(location.search);
$("url").value = wanted.get("bundle") ?? "";
$("answer-button").disabled = $("add").querySelector("button").disabled = true;
if ($("url").value) {
  await busy(async () => {
    await open($("url").value);
    for (const url of wanted.getAll("adapter")) await add(url);
  });
}
document.body.dataset.ready = "yes";
