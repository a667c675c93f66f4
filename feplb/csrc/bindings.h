// What the binding files share. They are the only ones that know pybind11: one bind_* function per
// part of the core. UserError becomes ValueError (pybind11 translates std::invalid_argument), Error
// becomes RuntimeError. Whatever can block releases the GIL.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "plan_types.h"

namespace feplb {

namespace py = pybind11;

using CountsArray = py::array_t<int32_t, py::array::c_style>;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

// None, or one integer per name, picoseconds.
std::optional<UnitCosts> costs_from(const py::object& given);

void bind_plan(py::module_& module);
void bind_domain(py::module_& module);
void bind_cuda(py::module_& module);
void bind_python_lane(py::module_& module);

}  // namespace feplb
