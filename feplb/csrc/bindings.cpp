// feplb._core: the C++ core as Python sees it.
#include "bindings.h"

PYBIND11_MODULE(_core, module) {
  feplb::bind_plan(module);
  feplb::bind_domain(module);
  feplb::bind_cuda(module);  // its memory and its lane are kinds of those above
  feplb::bind_python_lane(module);
}
