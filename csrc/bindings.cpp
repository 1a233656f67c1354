// The border between Python and the kernels: addresses, int64 sizes, a dtype code, and a thread count or a stream.
// Everything is keyword-only, so that no two pointers can be swapped. Python has checked the tensors; an address of 0
// stands for an output that is not wanted. The interpreter lock is released while a kernel runs.

#include <pthread.h>

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "ccpl_bindings.h"
#include "cpu_isa.h"
#include "dual_pool_attention_bindings.h"
#include "dual_pool_attention_pad2d_bindings.h"
#include "matting_laplacian_bindings.h"
#include "pac_conv2d_bindings.h"
#include "relu_split_bindings.h"

namespace restoration {

void refuse_dtype(const char* operator_name, DType dtype) {
  throw std::invalid_argument(std::string(operator_name) +
                              ": dtype must be one that this kernel was compiled for, got code " +
                              std::to_string(static_cast<int64_t>(dtype)));
}

#if defined(RESTORATION_CUDA)
const char* cuda_unavailable_reason(int64_t device);
#endif

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = RESTORATION_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#if defined(RESTORATION_CUDA)
  info["cuda"] = RESTORATION_CUDA_VERSION;
  info["cuda_architectures"] = py::str(RESTORATION_CUDA_ARCHITECTURES).attr("split")(",");
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::list();
#endif
#if defined(_OPENMP)
  info["openmp"] = _OPENMP;  // year and month of the standard
#else
  info["openmp"] = py::none();
#endif
  info["cpu_isa"] = kCpuIsaNames[cpu_isa];
  return info;
}

}  // namespace

PYBIND11_MODULE(RESTORATION_MODULE, module) {
  try {
    cpu_isa = choose_cpu_isa();
  } catch (const std::invalid_argument& error) {
    throw py::import_error(error.what());
  }
  if (pthread_atfork(nullptr, nullptr, [] { forked = true; }) != 0) {
    throw py::import_error("pthread_atfork failed, and a fork could not be noticed");
  }
  module.doc() = "Compiled kernels of restoration_kernels. Call the functions of the package instead.";
  module.attr("DTYPES") = py::dict(
      "float32"_a = static_cast<int64_t>(DType::float32), "float64"_a = static_cast<int64_t>(DType::float64),
      "float16"_a = static_cast<int64_t>(DType::float16), "bfloat16"_a = static_cast<int64_t>(DType::bfloat16));
  module.def("build_info", &build_info, "What the module was built with, and the CPU instruction set in use.");
#if defined(RESTORATION_CUDA)
  module.def("cuda_unavailable_reason", &cuda_unavailable_reason, py::kw_only(), "device"_a,
             "None if the kernels run on this CUDA device, else why they do not.");
#endif
  bind_dual_pool_attention(module);
  bind_dual_pool_attention_pad2d(module);
  bind_neighbor_difference(module);
  bind_info_nce(module);
  bind_matting_laplacian(module);
  bind_pac_conv2d(module);
  bind_relu_split(module);
}

}  // namespace restoration
