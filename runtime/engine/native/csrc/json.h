// Just enough JSON to read a plan; errors are thrown as std::runtime_error with one line.
#pragma once
#include <string>
#include <utility>
#include <vector>

namespace edgetune {

struct Json {
    enum Kind { NOTHING, BOOLEAN, NUMBER, TEXT, LIST, OBJECT } kind = NOTHING;
    bool boolean = false;
    double number = 0;
    std::string text;
    std::vector<Json> items;
    std::vector<std::pair<std::string, Json>> members;

    bool null() const { return kind == NOTHING; }
    // A member of an object; an error names the one that is missing.
    const Json &at(const char *name) const;
    // The member, or null where there is none.
    const Json *find(const char *name) const;
    // A whole number from `low` to `high`.
    int64_t whole(const char *name, int64_t low, int64_t high) const;
    double real(const char *name) const;
    bool truth(const char *name) const;
    const std::string &string(const char *name) const;
};

Json parse_json(const char *text, size_t bytes);

} // namespace edgetune
