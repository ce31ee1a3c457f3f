// Text ↔ token ids as edgetune's runtime makes them: chat or plain, as the adapter was trained. A
// control token that a prompt spells, such as <|im_end|>, stays characters: such a prompt is read
// by a second tokenizer, whose control tokens have other names (edgetune/core/control_tokens.py).
import { Template } from "./node_modules/@huggingface/jinja/dist/index.js";
import { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";

const STAND_INS = 0xf0000; // private use, a character a token
const MARK = `\ufdd0${crypto.getRandomValues(new Uint32Array(2)).join("")}\ufdd1`; // in no text

export class BundleText {
  // `document`: tokenizer.json; `template`: the chat template's text, or null.
  constructor(manifest, document, template) {
    const info = manifest.tokenizer;
    this.special = Object.fromEntries(
      Object.entries(info.special_tokens).map(([name, token]) => [name, token?.content ?? token]),
    );
    const config = {
      clean_up_tokenization_spaces: info.clean_up ?? false,
      eos_token: this.special.eos_token,
    };
    const names = document.added_tokens
      .filter((token) => token.special)
      .map((token) => token.content)
      .sort((one, other) => other.length - one.length);
    this.standIns = new Map(names.map((name, i) => [name, String.fromCodePoint(STAND_INS + i)]));
    const spelled = names.map((name) => name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|");
    this.exactly = new RegExp(spelled || "(?!)", "g");
    this.anyCase = new RegExp(spelled || "(?!)", "gi");
    this.taken = names.length
      ? new RegExp(`[\\u{f0000}-\\u{${(STAND_INS + names.length - 1).toString(16)}}]`, "gu")
      : /(?!)/g;
    this.template = template === null ? null : new Template(template);
    this.tokenizer = new Tokenizer(document, config);
    this.makeApart = () => new Tokenizer(this.renamed(document), config);
    this.vocabulary = manifest.graph.vocab_size;
  }

  // Ids of a prompt as an adapter with this prompt_format (null: none) was trained on it.
  promptIds(prompt, format) {
    const chat = (format?.template ?? (this.template ? "chat" : "plain")) === "chat";
    if (!chat) return this.textIds(prompt, format);
    if (!this.template) throw new Error("this adapter wants a chat template, the bundle has none");
    const tokens = format?.control_tokens === "tokens";
    const mark = (text) =>
      tokens ? text : text.replace(this.anyCase, (name) => name[0] + MARK + name.slice(1));
    const system = format?.system == null ? [] : [{ role: "system", content: mark(format.system) }];
    const made = this.template.render({
      messages: [...system, { role: "user", content: mark(prompt) }],
      add_generation_prompt: true,
      ...this.special,
    });
    if (!made.includes(MARK)) return this.ids(this.tokenizer, made, false);
    const apart = made
      .replace(this.taken, "\ufffd")
      .replace(this.exactly, (name) => this.standIns.get(name))
      .replaceAll(MARK, "");
    return this.ids(this.apart, apart, false);
  }

  // Ids of a text, with the tokens that the tokenizer puts around one.
  textIds(text, format) {
    const spells = format?.control_tokens !== "tokens" && text.search(this.anyCase) >= 0;
    return spells
      ? this.ids(this.apart, text.replace(this.taken, "\ufffd"), true)
      : this.ids(this.tokenizer, text, true);
  }

  ids(tokenizer, text, special) {
    const { ids } = tokenizer.encode(text, { add_special_tokens: special });
    const unknown = ids.find((id) => id == null || id >= this.vocabulary);
    if (unknown !== undefined) throw new Error(`the model does not know the token ${unknown}`);
    return ids;
  }

  // Text of an answer's ids; `whole` false: without a last character that lacks bytes yet.
  decode(ids, whole) {
    if (!ids.length) return "";
    const text = this.tokenizer.decode(ids, { skip_special_tokens: true });
    return whole ? text : text.replace(/\ufffd+$/, "");
  }

  get apart() {
    this.made ??= this.makeApart();
    return this.made;
  }

  // tokenizer.json with stand-ins for the control tokens' names; every id stays.
  renamed(document) {
    const name = (token) => this.standIns.get(token) ?? token;
    const everywhere = (value) => {
      if (typeof value === "string") return name(value);
      if (Array.isArray(value)) return value.map(everywhere);
      if (value === null || typeof value !== "object") return value;
      return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, everywhere(one)]));
    };
    const { model, added_tokens: added, post_processor: around } = document;
    const vocab = Array.isArray(model.vocab)
      ? model.vocab.map(([token, score]) => [name(token), score])
      : Object.fromEntries(Object.entries(model.vocab).map(([token, id]) => [name(token), id]));
    return {
      ...document,
      model: { ...model, vocab, unk_token: name(model.unk_token) },
      added_tokens: added.map((token) =>
        this.standIns.has(token.content)
          ? { ...token, content: name(token.content), normalized: false }
          : token,
      ),
      post_processor: everywhere(around),
    };
  }
}
