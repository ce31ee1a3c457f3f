#include "bundle.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "json.h"
#include "pack.h"

namespace edgetune {

namespace {

constexpr int64_t LARGEST = 1 << 24;   // of a vocabulary, a context or a width
constexpr int64_t MOST_LAYERS = 1024;
constexpr size_t PIECE = size_t(4) << 20; // bytes of the file that are packed before they are let go

[[noreturn]] void fail(const std::string &what) {
    throw std::runtime_error("the native plan does not fit: " + what);
}

std::vector<uint8_t> from_base64(const std::string &text) {
    std::vector<uint8_t> bytes;
    uint32_t bits = 0;
    int have = 0;
    for (char c : text) {
        int value;
        if (c >= 'A' && c <= 'Z') value = c - 'A';
        else if (c >= 'a' && c <= 'z') value = c - 'a' + 26;
        else if (c >= '0' && c <= '9') value = c - '0' + 52;
        else if (c == '+') value = 62;
        else if (c == '/') value = 63;
        else if (c == '=') break;
        else fail("a constant is not base64");
        bits = bits << 6 | uint32_t(value);
        have += 6;
        if (have >= 8) {
            have -= 8;
            bytes.push_back(uint8_t(bits >> have));
        }
    }
    return bytes;
}

struct Reader {
    OpenModel &open;
    std::vector<Stored> stored; // of every matrix, in the order of `matrices`

    // A tensor's bytes; exactly `bytes` of them, aligned to 4.
    const uint8_t *place(const Json &json, int64_t bytes, const char *what) {
        const int64_t offset = json.whole("offset", 0, int64_t(1) << 46);
        if (json.whole("bytes", 1, int64_t(1) << 46) != bytes)
            fail(std::string(what) + ": expected " + std::to_string(bytes) + " bytes");
        if (const Json *text = json.find("inline")) {
            if (text->kind != Json::TEXT) fail(std::string(what) + ": inline is a text");
            open.inlined.push_back(from_base64(text->text));
            if (int64_t(open.inlined.back().size()) != bytes)
                fail(std::string(what) + ": expected " + std::to_string(bytes) + " bytes inline");
            return open.inlined.back().data();
        }
        if (offset % 4 || offset > int64_t(open.file->size()) ||
            bytes > int64_t(open.file->size()) - offset)
            fail(std::string(what) + ": it lies beyond the end of the weights");
        return open.file->data() + offset;
    }

    // `count` numbers in whole vectors, the rest zeros.
    const float *padded(const Json &json, int count, const char *what) {
        const uint8_t *bytes = place(json, int64_t(count) * 4, what);
        const int width = round_up(count, LANES);
        open.floats.emplace_back(new float[size_t(width)]());
        float *to = open.floats.back().get();
        std::memcpy(to, bytes, size_t(count) * 4);
        for (int i = 0; i < count; i++)
            if (!std::isfinite(to[i])) fail(std::string(what) + ": a number that is not finite");
        return to;
    }

    Norm norm(const Json &json, int width, const char *what) {
        Norm n;
        n.present = true;
        const std::string &kind = json.string("kind");
        if (kind != "rms" && kind != "layer") fail(std::string(what) + ": rms or layer");
        n.layer = kind == "layer";
        n.epsilon = float(json.real("epsilon"));
        if (!(n.epsilon >= 0) || n.epsilon > 1) fail(std::string(what) + ": epsilon");
        n.weight = padded(json.at("weight"), width, what);
        if (const Json *bias = json.find("bias")) n.bias = padded(*bias, width, what);
        return n;
    }

    Norm optional_norm(const Json &json, const char *name, int width) {
        const Json *found = json.find(name);
        return found ? norm(*found, width, name) : Norm();
    }

    // `parts`: widths of what lies side by side in the output; each begins a group of its own.
    // Gated: two parts, whose groups alternate.
    void matrix(Matrix &m, const Json &json, const char *what, int inputs,
                const std::vector<std::pair<int, int>> &parts, bool gated) {
        m.inputs = int(json.whole("inputs", inputs, inputs));
        int outputs = 0, width = 0;
        for (auto &part : parts) outputs += part.first, width += part.second;
        m.outputs = int(json.whole("outputs", outputs, outputs));
        m.groups = width / LANES;
        m.gated = gated;
        m.bits = int(json.whole("bits", 0, 8));
        if (m.bits != 0 && m.bits != 4 && m.bits != 8) fail(std::string(what) + ": 0, 4 or 8 bits");
        open.rows.emplace_back(new int32_t[size_t(width)]);
        int32_t *rows = open.rows.back().get();
        int at = 0, row = 0;
        for (auto &part : parts) {
            for (int i = 0; i < part.second; i++, at++) {
                const int to = gated ? at % (width / 2) / LANES * 2 * LANES + at % LANES +
                                           (at >= width / 2 ? LANES : 0)
                                     : at;
                rows[to] = i < part.first ? row + i : -1;
            }
            row += part.first;
        }
        m.rows = rows;
        Stored s;
        s.means = json.truth("means");
        if (!m.bits) {
            if (s.means) fail(std::string(what) + ": float32 has no means");
            s.weight = place(json.at("weight"), int64_t(outputs) * inputs * 4, what);
        } else {
            m.block = int(json.whole("block_size", 16, 1 << 12));
            if (m.block % COLUMNS)
                throw std::runtime_error("blocks of " + std::to_string(m.block) +
                                         " are not for the native engine");
            m.blocks = (inputs + m.block - 1) / m.block;
            if (s.means && inputs % m.block) fail(std::string(what) + ": means of blocks in part");
            s.stored_blocks = m.blocks + (s.means ? (m.blocks + m.block - 1) / m.block : 0);
            const int64_t all = int64_t(outputs) * s.stored_blocks;
            s.weight = place(json.at("weight"), all * m.block * m.bits / 8, what);
            s.scales =
                reinterpret_cast<const float *>(place(json.at("scales"), all * 4, what));
            if (const Json *zeros = json.find("zeros")) {
                const int64_t line = m.bits == 8 ? s.stored_blocks : (s.stored_blocks + 1) / 2;
                s.zeros = place(*zeros, outputs * line, what);
            }
            m.offsets = has_offsets(m, s);
        }
        if (const Json *bias = json.find("bias")) {
            const float *from = padded(*bias, outputs, what);
            open.floats.emplace_back(new float[size_t(width)]());
            float *to = open.floats.back().get();
            for (int i = 0; i < width; i++) to[i] = rows[i] < 0 ? 0 : from[rows[i]];
            m.bias = to;
        }
        if (const Json *site = json.find("site")) {
            if (site->kind != Json::TEXT) fail(std::string(what) + ": site is a name");
            m.site = int(open.sites.size());
            open.sites.push_back({site->text, &m});
        }
        stored.push_back(s);
    }
};

void read_layer(Reader &reader, Layer &layer, const Json &json) {
    Model &m = reader.open.model;
    layer.attention_norm = reader.norm(json.at("attention_norm"), m.hidden, "attention_norm");
    std::vector<std::pair<int, int>> heads(size_t(m.heads + 2 * m.kv_heads),
                                           {m.head_dim, m.head_width});
    reader.matrix(layer.qkv, json.at("qkv"), "qkv", m.hidden, heads, false);
    layer.q_norm = reader.optional_norm(json, "q_norm", m.head_dim);
    layer.k_norm = reader.optional_norm(json, "k_norm", m.head_dim);
    if (json.find("rotary"))
        layer.rotary = int(json.whole("rotary", 0, int64_t(m.rotary_count) - 1));
    layer.scale = float(json.real("scale"));
    layer.window = int(json.whole("window", 0, LARGEST));
    layer.softcap = float(json.real("softcap"));
    if (!std::isfinite(layer.scale) || !(layer.softcap >= 0) || !std::isfinite(layer.softcap))
        fail("scale or softcap");
    reader.matrix(layer.attention_out, json.at("attention_out"), "attention_out",
                  m.heads * m.head_dim, {{m.hidden, round_up(m.hidden, LANES)}}, false);
    layer.after_attention = reader.optional_norm(json, "after_attention", m.hidden);
    layer.mlp_norm = reader.norm(json.at("mlp_norm"), m.hidden, "mlp_norm");
    const int middle = int(json.at("down").whole("inputs", 1, LARGEST));
    const std::pair<int, int> half{middle, round_up(middle, LANES)};
    reader.matrix(layer.gate_up, json.at("gate_up"), "gate_up", m.hidden, {half, half}, true);
    const std::string &kind = json.string("activation");
    if (kind == "silu") layer.activation = SILU;
    else if (kind == "gelu") layer.activation = GELU;
    else if (kind == "gelu_tanh") layer.activation = GELU_TANH;
    else fail("activation: silu, gelu or gelu_tanh");
    reader.matrix(layer.down, json.at("down"), "down", middle,
                  {{m.hidden, round_up(m.hidden, LANES)}}, false);
    layer.after_mlp = reader.optional_norm(json, "after_mlp", m.hidden);
}

void read_embedding(Reader &reader, const Json &json) {
    Model &m = reader.open.model;
    Table &t = reader.open.embedding;
    t.rows = int(json.whole("rows", m.vocab, m.vocab));
    t.columns = int(json.whole("columns", m.hidden, m.hidden));
    t.bits = int(json.whole("bits", 0, 8));
    t.multiplier = float(json.real("multiplier"));
    if (!std::isfinite(t.multiplier)) fail("embedding: multiplier");
    if (!t.bits) {
        t.weight = reader.place(json.at("weight"), int64_t(t.rows) * t.columns * 4, "embedding");
        return;
    }
    if (t.bits != 4 && t.bits != 8) fail("embedding: 0, 4 or 8 bits");
    t.block = int(json.whole("block_size", 16, 1 << 12));
    if (t.block % 16) fail("embedding: blocks of a multiple of 16");
    const int64_t blocks = (t.columns + t.block - 1) / t.block, all = blocks * t.rows;
    t.weight = reader.place(json.at("weight"), all * t.block * t.bits / 8, "embedding");
    t.scales =
        reinterpret_cast<const float *>(reader.place(json.at("scales"), all * 4, "embedding"));
    if (const Json *zeros = json.find("zeros"))
        t.zeros = reader.place(*zeros, t.rows * (t.bits == 8 ? blocks : (blocks + 1) / 2),
                               "embedding");
}

void read_rotaries(Reader &reader, const Json &json) {
    OpenModel &open = reader.open;
    if (json.kind != Json::LIST || json.items.size() > 16) fail("rotaries: a list of at most 16");
    for (const Json &item : json.items) {
        Rotary r;
        r.width = int(item.whole("width", 2, open.model.head_dim));
        if (r.width % 2) fail("rotaries: an even width");
        const int64_t positions = item.whole("positions", 1, LARGEST);
        const int64_t bytes = positions * (r.width / 2) * 4;
        r.cos = reinterpret_cast<const float *>(reader.place(item.at("cos"), bytes, "rotaries"));
        r.sin = reinterpret_cast<const float *>(reader.place(item.at("sin"), bytes, "rotaries"));
        if (!open.model.positions || positions < open.model.positions)
            open.model.positions = int(positions);
        open.rotaries.push_back(r);
    }
    open.model.rotaries = open.rotaries.data();
    open.model.rotary_count = int(open.rotaries.size());
}

struct PackJob {
    const Matrix *matrix;
    const Stored *stored;
    bool signed_bytes;
    int first, last, threads;
};

void pack_share(void *context, int thread) {
    const PackJob &job = *static_cast<PackJob *>(context);
    const int64_t count = job.last - job.first;
    pack_groups(*job.matrix, *job.stored, job.signed_bytes,
                job.first + int(count * thread / job.threads),
                job.first + int(count * (thread + 1) / job.threads));
}

// Pack piece by piece, and let the file's pages go: a weight is in memory once.
void pack(OpenModel &open, Matrix &m, const Stored &stored) {
    if (m.bits) m.multiplier = scale_unit(m, stored);
    const size_t row = m.bits ? size_t(stored.stored_blocks) * m.block * m.bits / 8 : 0;
    const int step = row ? int(std::fmax(1, double(PIECE) / (double(row) * LANES))) : m.groups;
    for (int first = 0; first < m.groups; first += step) {
        const int last = first + step < m.groups ? first + step : m.groups;
        PackJob job{&m, &stored, open.kernels->signed_bytes, first, last, open.model.threads};
        open.pool->run(pack_share, &job);
        const size_t piece = row * LANES * size_t(last - first);
        if (row && last < m.groups && &m == &open.model.head)
            open.file->forget(stored.weight + row * LANES * size_t(first), piece);
    }
    const size_t all =
        m.bits ? row * size_t(m.outputs) : size_t(m.outputs) * size_t(m.inputs) * 4;
    open.file->forget(stored.weight, all);
    if (stored.scales)
        open.file->forget(reinterpret_cast<const uint8_t *>(stored.scales),
                          size_t(m.outputs) * size_t(stored.stored_blocks) * 4);
}

void make_buffers(OpenModel &open) {
    Model &m = open.model;
    int widest = round_up(m.heads * m.head_dim, LANES), blocks = 1, line = LANES;
    for (Matrix *matrix : matrices(open)) {
        widest = std::max({widest, round_up(matrix->inputs, LANES), matrix->blocks * matrix->block});
        blocks = std::max(blocks, matrix->blocks);
        line = std::max(line, matrix->blocks * matrix->block);
    }
    m.x_line = round_up(m.hidden, LANES);
    m.z_line = round_up(std::max(widest, m.x_line), LANES);
    m.y_line = (m.heads + 2 * m.kv_heads) * m.head_width;
    m.low_line = MOST_RANKS;
    m.part_blocks = (std::max(m.positions, 1 << 15) + KEYS - 1) / KEYS;
    const size_t part = size_t(FEW_TOKENS) * m.part_blocks * m.heads * (m.head_width + LANES);
    const size_t heads = size_t(std::max(m.heads, 16)) * m.head_width + 8 * KEYS + 4 * m.head_width;
    size_t total = 0;
    uint8_t *base = nullptr;
    auto take = [&](size_t bytes) {
        const size_t at = total;
        total += (bytes + 63) / 64 * 64;
        return base + at;
    };
    auto floats = [&](size_t count) { return reinterpret_cast<float *>(take(count * 4)); };
    for (int pass = 0; pass < 2; pass++) { // first how much, then where
        total = 0;
        m.embedded = floats(size_t(MOST_TOKENS) * m.x_line);
        m.y = floats(size_t(MOST_TOKENS) * m.y_line);
        m.branch = floats(size_t(MOST_TOKENS) * m.x_line);
        m.gated = floats(size_t(MOST_TOKENS) * m.z_line);
        m.parts = floats(part);
        open.lanes.assign(size_t(m.threads), Lane());
        for (int t = 0; t < m.threads; t++) {
            Lane &lane = open.lanes[size_t(t)];
            const size_t tokens = t ? ALONE_TOKENS : MOST_TOKENS;
            lane.x = floats(tokens * m.x_line);
            lane.z = floats(tokens * m.z_line);
            lane.low = floats(tokens * m.low_line);
            lane.heads = floats(heads);
            Rounded &r = lane.rounded;
            const size_t lines = (tokens + TOGETHER - 1) / TOGETHER * TOGETHER;
            r.values = reinterpret_cast<int8_t *>(take(lines * size_t(line)));
            r.scales = floats(lines * size_t(blocks));
            r.sums = floats(lines * size_t(blocks));
            r.starts = reinterpret_cast<int32_t *>(take(lines * size_t(blocks) * 4));
        }
        if (!pass) {
            open.buffers = Block(total, false);
            base = open.buffers.data();
        }
    }
    m.lanes = open.lanes.data();
    open.tokens.resize(MOST_TOKENS);
    make_row(open);
}

} // namespace

std::vector<Matrix *> matrices(OpenModel &open) {
    std::vector<Matrix *> all;
    for (Layer &layer : open.layers)
        for (Matrix *m : {&layer.qkv, &layer.attention_out, &layer.gate_up, &layer.down})
            all.push_back(m);
    all.push_back(&open.model.head);
    return all;
}

std::unique_ptr<OpenModel> open_model(const char *plan, size_t plan_bytes, const std::string &path,
                                      int threads, const Kernels *kernels) {
    std::unique_ptr<OpenModel> open(new OpenModel);
    Model &m = open->model;
    open->kernels = kernels;
    const Json json = parse_json(plan, plan_bytes);
    json.whole("version", 1, 1);
    open->file.reset(new Mapping(path));
    m.threads = threads;
    open->pool.reset(new Pool(threads));
    m.pool = open->pool.get();
    m.hidden = int(json.whole("hidden", 1, 1 << 16));
    m.vocab = int(json.whole("vocab", 1, LARGEST));
    m.heads = int(json.whole("heads", 1, 1024));
    m.kv_heads = int(json.whole("kv_heads", 1, m.heads));
    m.head_dim = int(json.whole("head_dim", 1, 1024));
    if (m.heads % m.kv_heads) fail("heads are no multiple of kv_heads");
    m.head_width = round_up(m.head_dim, LANES);
    Reader reader{*open, {}};
    read_rotaries(reader, json.at("rotaries"));
    read_embedding(reader, json.at("embedding"));
    const Json &layers = json.at("layers");
    if (layers.kind != Json::LIST || layers.items.empty() ||
        int64_t(layers.items.size()) > MOST_LAYERS)
        fail("layers: 1 to " + std::to_string(MOST_LAYERS));
    open->layers.resize(layers.items.size());
    m.layers = open->layers.data();
    m.layer_count = int(open->layers.size());
    for (size_t i = 0; i < layers.items.size(); i++)
        read_layer(reader, open->layers[i], layers.items[i]);
    m.norm = reader.norm(json.at("norm"), m.hidden, "norm");
    reader.matrix(m.head, json.at("head"), "head", m.hidden,
                  {{m.vocab, round_up(m.vocab, LANES)}}, false);
    m.logits_softcap = float(json.real("logits_softcap"));
    if (!(m.logits_softcap >= 0) || !std::isfinite(m.logits_softcap)) fail("logits_softcap");
    m.site_count = int(open->sites.size());

    size_t total = 0;
    std::vector<Matrix *> all = matrices(*open);
    for (Matrix *matrix : all) total += (matrix->bytes() + 63) / 64 * 64;
    open->weights = Block(total, true);
    uint8_t *at = open->weights.data();
    for (Matrix *matrix : all) {
        matrix->groups_at = at;
        at += (matrix->bytes() + 63) / 64 * 64;
    }
    for (size_t i = 0; i < all.size(); i++) pack(*open, *all[i], reader.stored[i]);
    make_buffers(*open);
    return open;
}

} // namespace edgetune
