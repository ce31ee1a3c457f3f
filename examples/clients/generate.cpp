// A bundle and its adapters from C++, without edgetune and without Python: ONNX Runtime's C++ API (1.20 or later).
//
//   generate BUNDLE ADAPTER[,ADAPTER…] TOKEN_ID…       adapters of the bundle ("-" is the base model), prompt as token ids
//
// prints the answer's token ids, a line for each adapter. The base is opened once; a swap is another Ort::LoraAdapter of a
// few 100 kB in the run options. Text ↔ ids is any library that reads BUNDLE/tokenizer.json.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <regex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fs = std::filesystem;
using Ids = std::vector<int64_t>;

// The ids that end an answer, out of edgetune.json (whoever has a JSON library reads them with it).
std::set<int64_t> endTokens(const fs::path& bundle) {
  std::stringstream manifest;
  manifest << std::ifstream(bundle / "edgetune.json").rdbuf();
  const std::string text = manifest.str();
  std::smatch list;
  std::regex_search(text, list, std::regex("\"eos_token_ids\"\\s*:\\s*\\[([^\\]]*)\\]"));
  std::istringstream numbers(std::regex_replace(list.str(1), std::regex(","), " "));
  return {std::istream_iterator<int64_t>(numbers), {}};
}

class Model {
 public:
  explicit Model(const fs::path& bundle) : session_(env_, (bundle / "model.onnx").c_str(), Ort::SessionOptions()) {
    Ort::AllocatorWithDefaultOptions allocator;
    for (size_t i = 0; i < session_.GetInputCount(); ++i) {
      const std::string name = session_.GetInputNameAllocated(i, allocator).get();
      if (name.rfind("past_key_values.", 0) != 0) continue;  // the adapter inputs have empty defaults: nothing to bind
      inputs_.push_back(name);
      cacheShape_ = session_.GetInputTypeInfo(i).GetTensorTypeAndShapeInfo().GetShape();  // (batch, heads, past, width)
    }
    outputs_.push_back("logits");
    for (const std::string& name : inputs_) outputs_.push_back("present." + name.substr(sizeof("past_key_values.") - 1));
    inputs_.insert(inputs_.begin(), {"input_ids", "attention_mask"});
  }

  // Greedy decoding; `adapter` null is the base model.
  Ids generate(const Ort::LoraAdapter* adapter, Ids prompt, const std::set<int64_t>& end, size_t maxNewTokens) {
    Ort::RunOptions options;
    if (adapter) options.AddActiveLoraAdapter(*adapter);
    std::vector<Ort::Value> cache;
    Ids answer, mask(prompt.size(), 1), empty = {1, cacheShape_[1], 0, cacheShape_[3]};
    for (size_t i = 2; i < inputs_.size(); ++i) cache.push_back(Ort::Value::CreateTensor<float>(memory_, nullptr, 0, empty.data(), 4));
    for (Ids ids = prompt; answer.size() < maxNewTokens; ids = {answer.back()}, mask.push_back(1)) {
      std::vector<Ort::Value> values;
      values.push_back(tensor(ids));
      values.push_back(tensor(mask));
      std::move(cache.begin(), cache.end(), std::back_inserter(values));
      std::vector<Ort::Value> found =
          session_.Run(options, pointers(inputs_).data(), values.data(), values.size(), pointers(outputs_).data(), outputs_.size());
      const float* logits = found[0].GetTensorData<float>();  // (1, 1, vocabulary): of the last token
      const size_t size = found[0].GetTensorTypeAndShapeInfo().GetElementCount();
      answer.push_back(std::max_element(logits, logits + size) - logits);
      if (end.count(answer.back())) break;
      cache.assign(std::make_move_iterator(found.begin() + 1), std::make_move_iterator(found.end()));
    }
    return answer;
  }

 private:
  Ort::Value tensor(Ids& ids) {
    const int64_t shape[] = {1, static_cast<int64_t>(ids.size())};
    return Ort::Value::CreateTensor<int64_t>(memory_, ids.data(), ids.size(), shape, 2);
  }
  static std::vector<const char*> pointers(const std::vector<std::string>& names) {
    std::vector<const char*> found;
    for (const std::string& name : names) found.push_back(name.c_str());
    return found;
  }

  Ort::Env env_{ORT_LOGGING_LEVEL_ERROR};
  Ort::Session session_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<std::string> inputs_, outputs_;
  Ids cacheShape_;
};

int main(int count, char** arguments) try {
  if (count < 4) throw std::runtime_error("usage: generate BUNDLE ADAPTER[,ADAPTER...] TOKEN_ID...");
  const fs::path bundle = arguments[1];
  const std::set<int64_t> end = endTokens(bundle);
  Model model(bundle);
  Ids prompt;
  for (int i = 3; i < count; ++i) prompt.push_back(std::stoll(arguments[i]));
  std::stringstream names(arguments[2]);
  for (std::string name; std::getline(names, name, ',');) {
    Ort::LoraAdapter adapter(nullptr);
    const fs::path file = bundle / "adapters" / name / (name + ".onnx_adapter");
    if (name != "-" && !fs::exists(file)) throw std::runtime_error("no adapter here: " + file.string());
    if (name != "-") adapter = Ort::LoraAdapter::CreateLoraAdapter(file.native(), nullptr);
    for (int64_t id : model.generate(name == "-" ? nullptr : &adapter, prompt, end, 16)) std::cout << id << " ";
    std::cout << std::endl;
  }
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 1;
}
