// A bundle through edgetune's native engine from C++: its C interface and the standard library, nothing else.
//
//   native BUNDLE TOKEN_ID…                 prompt as token ids; prints the base model's answer as token ids
//
// Text ↔ ids is any library that reads BUNDLE/tokenizer.json. The library and its header lie in the installed package,
// edgetune/runtime/engine/native/.
#include <edgetune_native.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <regex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fs = std::filesystem;
using Ids = std::vector<int32_t>;

std::string contents(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot be read: " + path.string());
  return {std::istreambuf_iterator<char>(file), {}};
}

// The ids that end an answer, out of edgetune.json (whoever has a JSON library reads them with it).
std::set<int32_t> endTokens(const fs::path& bundle) {
  const std::string text = contents(bundle / "edgetune.json");
  std::smatch list;
  std::regex_search(text, list, std::regex("\"eos_token_ids\"\\s*:\\s*\\[([^\\]]*)\\]"));
  std::istringstream numbers(std::regex_replace(list.str(1), std::regex(","), " "));
  return {std::istream_iterator<int32_t>(numbers), {}};
}

class Model {
 public:
  Model(const fs::path& bundle, int threads) : model_(nullptr, edgetune_close) {
    const std::string plan = contents(bundle / "native.json"), data = (bundle / "model.onnx.data").string();
    model_.reset(edgetune_open(plan.data(), plan.size(), data.c_str(), threads, 16, nullptr, error_, sizeof error_));
    if (!model_) throw std::runtime_error(error_);
    edgetune_model_sizes(model_.get(), &sizes_);
  }

  // Greedy decoding. Keys and values lie in memory of ours: one slot, in whole steps of tokens.
  Ids generate(const Ids& prompt, const std::set<int32_t>& end, size_t maxNewTokens) {
    const int64_t step = sizes_.cache_step, tokens = int64_t(prompt.size() + maxNewTokens);
    const int64_t capacity = (tokens + step - 1) / step * step;
    std::vector<uint8_t> memory(size_t(2 * sizes_.layers * sizes_.kv_heads * capacity * sizes_.cache_bytes));
    const edgetune_cache cache = {memory.data(), 1, capacity};
    std::vector<float> logits(size_t(sizes_.vocab));
    Ids answer, all = prompt;
    for (size_t done = 0; answer.size() < maxNewTokens;) {
      const int32_t count = int32_t(std::min(all.size() - done, size_t(sizes_.most_tokens))), last = count - 1;
      const edgetune_span span = {all.data() + done, count, 0, int32_t(done), nullptr};
      const int wanted = done + size_t(count) == all.size();  // a long prompt goes in pieces
      if (edgetune_run(model_.get(), &cache, &span, 1, &last, wanted, logits.data(), nullptr, error_, sizeof error_))
        throw std::runtime_error(error_);
      done += size_t(count);
      if (!wanted) continue;
      answer.push_back(int32_t(std::max_element(logits.begin(), logits.end()) - logits.begin()));
      all.push_back(answer.back());
      if (end.count(answer.back())) break;
    }
    return answer;
  }

 private:
  char error_[512] = "";
  std::unique_ptr<edgetune_model, void (*)(edgetune_model*)> model_;
  edgetune_sizes sizes_;
};

int main(int count, char** arguments) try {
  if (count < 3) throw std::runtime_error("usage: native BUNDLE TOKEN_ID...");
  Model model(arguments[1], 2);
  Ids prompt;
  for (int i = 2; i < count; ++i) prompt.push_back(std::stoi(arguments[i]));
  for (int32_t id : model.generate(prompt, endTokens(arguments[1]), 16)) std::cout << id << " ";
  std::cout << std::endl;
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 1;
}
