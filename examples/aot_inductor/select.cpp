// Runs the program that export.py wrote, without Python, and compares what it gives.

#include <dlfcn.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

namespace {

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// What torch.save wrote of a list of tensors.
std::vector<at::Tensor> tensors(const std::string& path) {
  const std::string bytes = read(path);
  const c10::IValue list = torch::jit::pickle_load({bytes.begin(), bytes.end()});
  std::vector<at::Tensor> found;
  for (const c10::IValue& element : list.toListRef()) found.push_back(element.toTensor());
  return found;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) throw std::runtime_error("expected the folder that export.py wrote into");
  const std::string folder = argv[1];

  // The program calls torch.ops.claa by name: the library that registers them comes first.
  if (!dlopen(read(folder + "/library.txt").c_str(), RTLD_NOW)) throw std::runtime_error(dlerror());
  torch::inductor::AOTIModelPackageLoader selection(folder + "/selection.pt2");

  const std::vector<at::Tensor> inputs = tensors(folder + "/inputs.pt");
  const std::vector<at::Tensor> expected = tensors(folder + "/expected.pt");
  const std::vector<at::Tensor> outputs = selection.run(inputs);
  bool same = outputs.size() == expected.size();
  for (size_t i = 0; same && i < outputs.size(); ++i) same = outputs[i].equal(expected[i]);
  std::cout << outputs[0].size(1) << " of " << inputs[0].size(1) << " tokens kept, "
            << (same ? "the same bits as in Python" : "other numbers than in Python") << '\n';
  return same ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 2;
}
