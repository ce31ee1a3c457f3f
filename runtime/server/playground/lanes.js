// One answer pane: a model, what it says, and how fast it says it.
class Lane {
  constructor(letter) {
    this.letter = letter;
    this.node = $("#lane-template").content.firstElementChild.cloneNode(true);
    this.node.classList.add(letter);
    this.node.setAttribute("aria-label", `Answer ${letter.toUpperCase()}`);
    $(".tag", this.node).textContent = letter.toUpperCase();
    this.select = $("select", this.node);
    this.select.id = `model-${letter}`;
    $("label", this.node).htmlFor = this.select.id;
    $("label", this.node).textContent = `Model of answer ${letter.toUpperCase()}`;
    this.output = $(".answer", this.node);
    this.output.setAttribute("aria-label", `Text of answer ${letter.toUpperCase()}`);
    this.select.addEventListener("change", () => this.describe());
    this.idle();
  }

  offer(models, fallback) {
    const before = this.select.value;
    this.models = models;
    this.select.replaceChildren(...models.map((model) => element("option", { value: model.id }, model.id)));
    this.select.value = models.some((model) => model.id === before) ? before : fallback;
    this.describe();
  }

  get model() { return this.models.find((model) => model.id === this.select.value); }

  describe() {
    const model = this.model;
    if (!model) return;
    const kind = model.parent ? `adapter, r = ${model.rank ?? "?"}` : "base model";
    $(".endpoint", this.node).textContent = model.task === "text-generation" ? `${kind} · ${model.prompt_template} prompt` : kind;
  }

  idle() {
    this.output.className = "answer idle";
    this.output.textContent = "The answer appears here.";
  }

  number(name, value, unit = "") {
    const place = $(`[data-number="${name}"]`, this.node);
    place.replaceChildren(value, unit ? element("small", {}, ` ${unit}`) : "");
  }

  begin() {
    this.output.className = "answer live";
    this.output.textContent = "";
    for (const name of ["speed", "ttft", "tpot", "tokens", "reason"]) this.number(name, "–");
    $(".gaps", this.node).replaceChildren();
  }

  fail(error) {
    const stopped = error.name === "AbortError";
    this.output.classList.remove("live");
    if (stopped) this.number("reason", "you");
    else {
      this.output.className = "answer error";
      this.output.textContent = error.message;
      this.number("reason", "error");
    }
  }

  // Streams an answer; gives {lane, model, ttft, speed} for the plots, or null when it failed.
  async generate(prompt, settings, system, signal) {
    this.begin();
    const model = this.model, chat = model.prompt_template === "chat", gaps = [];
    const messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: prompt }];
    const question = chat ? { messages } : { prompt };
    const body = { model: model.id, ...question, ...settings, stream: true, stream_options: { include_usage: true } };
    const start = performance.now();
    let first = null, last = null, closing = null;
    try {
      for await (const chunk of stream(chat ? "v1/chat/completions" : "v1/completions", body, signal)) {
        const choice = chunk.choices[0], text = choice ? (chat ? choice.delta.content : choice.text) : null;
        if (choice && choice.finish_reason) this.number("reason", choice.finish_reason);
        if (chunk.usage) closing = chunk;
        if (!text) continue;
        const now = performance.now();
        if (first === null) {
          first = now;
          this.number("ttft", milliseconds(now - start));
        } else gaps.push(now - last);
        last = now;
        this.append(text);
        if (gaps.length) this.progress(gaps, first, now);
      }
      this.output.classList.remove("live");
      return this.finish(model, closing, first === null ? null : first - start);
    } catch (error) {
      this.fail(error);
      return null;
    }
  }

  append(text) {
    const stuck = this.output.scrollHeight - this.output.scrollTop - this.output.clientHeight < 40;
    this.output.append(text);
    if (stuck) this.output.scrollTop = this.output.scrollHeight;
  }

  progress(gaps, first, now) {
    this.number("tokens", String(gaps.length + 1));
    this.number("speed", ((gaps.length * 1000) / (now - first)).toFixed(0));
    this.number("tpot", milliseconds((now - first) / gaps.length));
    drawGaps($(".gaps", this.node), gaps);
  }

  finish(model, closing, ttft) {
    if (!this.output.textContent) {
      this.output.className = "answer idle";
      this.output.textContent = "(an empty answer)";
    }
    if (!closing) return null;
    const tpot = closing.timings.tpot_ms, speed = tpot ? 1000 / tpot : null;
    this.number("tokens", String(closing.usage.completion_tokens));
    if (speed) {
      this.number("speed", speed.toFixed(0));
      this.number("tpot", milliseconds(tpot));
    }
    return { lane: this.letter, model: model.id, ttft, speed };
  }

  async classify(text, signal) {
    this.begin();
    const model = this.model, start = performance.now();
    try {
      const answer = await post("classify", { model: model.id, input: text }, signal);
      const took = performance.now() - start, found = answer.data[0];
      this.output.className = "answer";
      const labels = model.labels || found.probs.map((_, i) => `LABEL_${i}`);
      if (found.value !== undefined) this.output.replaceChildren(found.value.toFixed(4));
      else this.bars(labels.map((label, i) => ({ label, score: found.probs[i] })), found.rejected);
      this.number("ttft", milliseconds(took));
      this.number("tokens", String(answer.usage.prompt_tokens));
      return { lane: this.letter, model: model.id, ttft: took, speed: null };
    } catch (error) {
      this.fail(error);
      return null;
    }
  }

  async tag(text, signal) {
    this.begin();
    const model = this.model, start = performance.now();
    try {
      const answer = await post("tag", { model: model.id, input: text }, signal);
      const took = performance.now() - start, found = answer.data[0];
      const spans = found.entities.length ? found.entities : found.words.filter((word) => word.tag !== "O").map((word) => ({ ...word, type: word.tag }));
      this.spans(found.text, spans);
      this.number("ttft", milliseconds(took));
      this.number("tokens", String(answer.usage.prompt_tokens));
      return { lane: this.letter, model: model.id, ttft: took, speed: null };
    } catch (error) {
      this.fail(error);
      return null;
    }
  }

  spans(text, spans) {
    const kinds = [...new Set(spans.map((span) => span.type))], letters = [...text], parts = [];
    let at = 0;
    for (const span of spans) {
      const name = element("small", {}, ` ${span.type}`);
      parts.push(letters.slice(at, span.start).join(""));
      parts.push(element("mark", { class: `kind${kinds.indexOf(span.type) % 4}`, title: `${(span.score * 100).toFixed(1)} %` }, letters.slice(span.start, span.end).join(""), name));
      at = span.end;
    }
    this.output.className = "answer";
    this.output.replaceChildren(...parts, letters.slice(at).join(""));
  }

  bars(scores, rejected) {
    const best = [...scores].sort((a, b) => b.score - a.score).slice(0, 12);
    const rows = best.map(({ label, score }, i) => {
      const fill = element("div", { class: "fill" });
      fill.style.width = `${(score * 100).toFixed(2)}%`;
      const track = element("div", { class: "track", "aria-hidden": "true" }, fill);
      return element("div", { class: i === 0 ? "bar first" : "bar" }, element("span", {}, label), element("span", {}, `${(score * 100).toFixed(1)} %`), track);
    });
    this.output.className = "answer";
    const none = rejected === undefined ? null : element("p", { class: "rejected" }, `No label: not sure enough of ${rejected}.`);
    this.output.replaceChildren(...(none ? [none] : []), element("div", { class: none ? "bars unsure" : "bars" }, ...rows));
  }
}
