#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding/operations.h"
#include "quantattn/alibi.h"
#include "quantattn/error.h"

namespace py = pybind11;

namespace quantattn::binding {
namespace {

void define_errors(py::module_& module) {
  // Later registrations are asked first, and the two runtime errors share a base: each has a class of its own.
  py::register_exception<Unsupported>(module, "UnsupportedError", PyExc_RuntimeError);
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const InvalidArgument& e) {
      py::set_error(PyExc_ValueError, e.what());
    } catch (const DeviceError& e) {
      py::set_error(PyExc_RuntimeError, e.what());
    }
  });
  module.attr("UnsupportedError").attr("__module__") = "pyquantattn";
  module.attr("UnsupportedError").attr("__doc__") = "The call is well formed, but this build or machine has no kernel for it.";
}

void define_cache(py::module_& module) {
  py::class_<CacheHandle>(module, "CacheHandle")
      .def(py::init<py::object, py::object, py::object, py::object, py::handle, py::object>())
      .def_property_readonly("kv_format", [](const CacheHandle& self) { return std::string(name(self.view().format)); })
      .def_property_readonly("num_pages", [](const CacheHandle& self) { return self.view().num_pages; })
      .def_property_readonly("page_size", [](const CacheHandle& self) { return self.view().page_size; })
      .def_property_readonly("num_kv_heads", [](const CacheHandle& self) { return self.view().num_kv_heads; })
      .def_property_readonly("head_dim", [](const CacheHandle& self) { return self.view().head_dim; });
}

}  // namespace
}  // namespace quantattn::binding

PYBIND11_MODULE(_core, module) {
  using namespace quantattn::binding;
  module.doc() = "Kernels of pyquantattn. Tensors are checked here and passed to libquantattn by pointer.";
  define_errors(module);
  define_cache(module);
  define_runtime(module);
  module.def("decode_attention", &decode_attention);
  module.def("prefill_attention", &prefill_attention);
  module.def("hybrid_attention", &hybrid_attention);
  module.def("append_kv", &append_kv);
  module.def("quantize_kv", &quantize_kv);
  module.def("dequantize_kv", &dequantize_kv);
  module.def("merge_states", &merge_states);
  module.def("get_alibi_slopes", &quantattn::get_alibi_slopes);
}
