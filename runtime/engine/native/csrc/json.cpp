#include "json.h"

#include <cmath>
#include <cstdlib>
#include <stdexcept>

namespace edgetune {

namespace {

[[noreturn]] void fail(const std::string &what) {
    throw std::runtime_error("the native plan cannot be read: " + what);
}

constexpr int DEEPEST = 16;

struct Parser {
    const char *p, *end;

    void space() {
        while (p < end && (*p == ' ' || *p == '\n' || *p == '\t' || *p == '\r')) p++;
    }
    char next() {
        space();
        if (p == end) fail("it ends too early");
        return *p;
    }
    void expect(char c) {
        if (next() != c) fail(std::string("expected ") + c + ", got " + *p);
        p++;
    }
    bool word(const char *w) {
        const char *q = p;
        for (; *w; w++, q++)
            if (q == end || *q != *w) return false;
        p = q;
        return true;
    }
    std::string text() {
        expect('"');
        std::string s;
        while (true) {
            if (p == end) fail("a text does not end");
            char c = *p++;
            if (c == '"') return s;
            if (c != '\\') {
                s += c;
                continue;
            }
            if (p == end) fail("a text does not end");
            switch (c = *p++) {
            case '"': case '\\': case '/': s += c; break;
            case 'n': s += '\n'; break;
            case 't': s += '\t'; break;
            case 'r': s += '\r'; break;
            default: fail("an escape that a plan has no use for");
            }
        }
    }
    Json value(int depth) {
        if (depth > DEEPEST) fail("it is nested too deeply");
        Json v;
        char c = next();
        if (c == '{') {
            v.kind = Json::OBJECT;
            p++;
            if (next() == '}') { p++; return v; }
            while (true) {
                next();
                std::string name = text();
                expect(':');
                v.members.emplace_back(std::move(name), value(depth + 1));
                if (next() == ',') { p++; continue; }
                expect('}');
                return v;
            }
        }
        if (c == '[') {
            v.kind = Json::LIST;
            p++;
            if (next() == ']') { p++; return v; }
            while (true) {
                v.items.push_back(value(depth + 1));
                if (next() == ',') { p++; continue; }
                expect(']');
                return v;
            }
        }
        if (c == '"') {
            v.kind = Json::TEXT;
            v.text = text();
            return v;
        }
        if (word("null")) return v;
        if (word("true") || word("false")) {
            v.kind = Json::BOOLEAN;
            v.boolean = p[-2] == 'u';
            return v;
        }
        std::string digits;
        while (p < end && ((*p >= '0' && *p <= '9') || *p == '-' || *p == '+' || *p == '.' ||
                           *p == 'e' || *p == 'E') && digits.size() < 40)
            digits += *p++;
        char *rest = nullptr;
        v.kind = Json::NUMBER;
        v.number = std::strtod(digits.c_str(), &rest);
        if (digits.empty() || *rest || !std::isfinite(v.number)) fail("not a number: " + digits);
        return v;
    }
};

} // namespace

const Json *Json::find(const char *name) const {
    for (auto &member : members)
        if (member.first == name) return member.second.null() ? nullptr : &member.second;
    return nullptr;
}

const Json &Json::at(const char *name) const {
    if (kind != OBJECT) fail(std::string("expected an object that has ") + name);
    for (auto &member : members)
        if (member.first == name) return member.second;
    fail(std::string("it has no ") + name);
}

int64_t Json::whole(const char *name, int64_t low, int64_t high) const {
    double value = real(name);
    if (value < double(low) || value > double(high) || value != std::floor(value))
        fail(std::string(name) + ": expected " + std::to_string(low) + " to " +
             std::to_string(high));
    return int64_t(value);
}

double Json::real(const char *name) const {
    const Json &v = at(name);
    if (v.kind != NUMBER) fail(std::string(name) + ": expected a number");
    return v.number;
}

bool Json::truth(const char *name) const {
    const Json &v = at(name);
    if (v.kind != BOOLEAN) fail(std::string(name) + ": expected true or false");
    return v.boolean;
}

const std::string &Json::string(const char *name) const {
    const Json &v = at(name);
    if (v.kind != TEXT) fail(std::string(name) + ": expected a text");
    return v.text;
}

Json parse_json(const char *text, size_t bytes) {
    Parser parser{text, text + bytes};
    Json v = parser.value(0);
    parser.space();
    if (parser.p != parser.end) fail("something follows its end");
    return v;
}

} // namespace edgetune
