// The page: which models there are, what runs, what has run.
const lanes = [new Lane("a"), new Lane("b")];
const state = { models: [], task: "text-generation", runs: [], abort: null };

function setStatus(kind, text) {
  $("#status").className = `status ${kind}`;
  $("#status span").textContent = text;
}

async function checkReady() {
  try {
    const response = await fetch("ready");
    setStatus(response.ok ? "good" : "bad", response.ok ? "ready" : "draining");
  } catch { setStatus("bad", "not reachable"); }
}

async function refreshModels() {
  try {
    state.models = (await get("v1/models")).data;
  } catch (error) {
    setStatus("bad", error.status === 401 ? "needs an API key" : error.message);
    if (error.status === 401) $("#key-menu").open = true;
    return;
  }
  const adapters = state.models.filter((model) => model.parent), base = state.models.find((model) => !model.parent);
  const shown = base || state.models[0];
  state.task = shown.task;
  $("#base").textContent = shown.root;
  $("#facts").textContent = `${state.task.replace("-", " ")} · context ${shown.max_model_len}`;
  const answering = adapters.filter((model) => model.task !== "reward");  // a reward's scores are for /score
  const offered = state.task === "text-generation" ? [...(base ? [base] : []), ...answering] : answering;
  const unchanged = lanes[0].models && offered.map((m) => m.id).join() === lanes[0].models.map((m) => m.id).join();
  showAdapters(adapters);
  if (unchanged) return;
  lanes[0].offer(offered, (answering[0] || offered[0] || {}).id);
  lanes[1].offer(offered, (answering[1] || base || offered[0] || {}).id);
  showTask();
  showLatency();
}

function showTask() {
  const generates = state.task === "text-generation";
  document.querySelectorAll("[data-task]").forEach((node) => { node.hidden = node.dataset.task !== state.task; });
  $("#compose-title").textContent = generates ? "Prompt" : "Text";
  $("label[for=prompt]").textContent = generates ? "Prompt" : "Text to classify or tag";
  $("#mode-hint").textContent = generates ? "adapters trained on chats get a user turn, others the bare prompt" : "classifiers show every label, taggers the words they mark";
  if (!generates) $("#prompt").placeholder = "A text to classify or tag";
  for (const name of ["speed", "tpot", "reason"]) {
    for (const lane of lanes) $(`[data-number="${name}"]`, lane.node).parentElement.hidden = !generates;
  }
  for (const lane of lanes) {
    $(".gaps", lane.node).hidden = !generates;
    $('[data-number="ttft"]', lane.node).previousSibling.textContent = generates ? "first token" : "answer";
  }
}

function showLanes() {
  const two = $("#compare").checked;
  $("#lanes").classList.toggle("two", two);
  $("#lanes").replaceChildren(...lanes.slice(0, two ? 2 : 1).map((lane) => lane.node));
}

function settings() {
  const chosen = {};
  for (const name of ["max_tokens", "temperature", "top_p", "top_k", "seed"]) {
    if ($(`#${name}`).value !== "") chosen[name] = Number($(`#${name}`).value);
  }
  if ($("#stop_text").value) chosen.stop = [$("#stop_text").value];
  return chosen;
}

async function run(event) {
  event.preventDefault();
  const prompt = $("#prompt").value;
  if (!prompt || state.abort) return;
  state.abort = new AbortController();
  $("#run").disabled = true;
  $("#stop").disabled = false;
  const used = lanes.slice(0, $("#compare").checked ? 2 : 1), { signal } = state.abort;
  const answers = used.map((lane) => (state.task === "text-generation"
    ? lane.generate(prompt, settings(), $("#system").value, signal)
    : lane.model.task === "token-classification" ? lane.tag(prompt, signal) : lane.classify(prompt, signal)));
  state.runs.push(...(await Promise.all(answers)).filter(Boolean));
  state.abort = null;
  $("#run").disabled = false;
  $("#stop").disabled = true;
  showLatency();
  refreshModels();
}

function showLatency() {
  const generates = state.task === "text-generation", first = generates ? "Time to first token (ms)" : "Time to answer (ms)";
  const charts = [chart(first, state.runs, (r) => r.ttft, milliseconds)];
  if (generates) charts.push(chart("Tokens per second", state.runs, (r) => r.speed, (value) => value.toFixed(0)));
  $("#charts").replaceChildren(...charts);
  const names = [...new Set(state.runs.map((r) => r.model))];
  const rows = names.map((name) => {
    const own = state.runs.filter((r) => r.model === name), speeds = own.map((r) => r.speed).filter(Boolean);
    const ttft = own.map((r) => r.ttft).filter((value) => value !== null), speed = quantile(speeds, 0.5);
    const cells = [name, String(own.length), milliseconds(quantile(ttft, 0.5)), milliseconds(quantile(ttft, 0.95)), speed ? speed.toFixed(0) : generates ? "–" : ""];
    return element("tr", {}, ...cells.map((cell) => element("td", {}, cell)));
  });
  $("#latency-table tbody").replaceChildren(...rows);
  $("#latency-table").hidden = !rows.length;
  const [, , ttft, , speed] = $("#latency-table").querySelectorAll("th");
  ttft.textContent = generates ? "First token, median" : "Answer, median";
  speed.textContent = generates ? "Tokens/s, median" : "";
}

function showAdapters(adapters) {
  const resident = adapters.filter((model) => model.resident);
  $("#adapter-count").textContent = `${adapters.length} known, ${resident.length} in memory (${megabytes(resident.reduce((sum, m) => sum + m.bytes, 0))})`;
  const rows = adapters.map((model) => {
    const unload = element("button", { class: "button quiet small", type: "button", "aria-label": `Unload ${model.id}` }, "Unload");
    unload.addEventListener("click", () => change("v1/unload_lora_adapter", { lora_name: model.id }));
    const size = model.resident ? megabytes(model.bytes) : "not yet";
    return element("tr", {}, element("td", {}, model.id), element("td", {}, String(model.rank ?? "?")), element("td", {}, size), element("td", { class: "end" }, unload));
  });
  const none = element("tr", {}, element("td", { class: "empty", colspan: 4 }, "No adapters yet."));
  $("#adapters tbody").replaceChildren(...(rows.length ? rows : [none]));
}

async function change(path, body) {
  const note = $("#load-note");
  note.className = "note";
  note.textContent = "…";
  try {
    const said = await post(path, body);
    await refreshModels(); // what is said to be done can be seen
    note.textContent = said;
    note.classList.add("good");
    return true;
  } catch (error) {
    note.textContent = error.message;
    note.classList.add("bad");
    return false;
  }
}

$("#compose").addEventListener("submit", run);
$("#prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && state.abort) state.abort.abort();
});
$("#stop").addEventListener("click", () => state.abort && state.abort.abort());
$("#compare").addEventListener("change", showLanes);
$("#load").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (await change("v1/load_lora_adapter", { lora_name: $("#load-name").value, lora_path: $("#load-path").value })) event.target.reset();
});
$("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("#key").value);
  $("#key-menu").open = false;
  refreshModels();
});

showLanes();
showLatency();
checkReady();
refreshModels();
setInterval(checkReady, 10000);
