// The module megatron_rl.kernels._ops: importing it registers the operators torch.ops.megatron_rl.*
#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(megatron_rl, m) { m.set_python_module("megatron_rl.kernels"); }

extern "C" PyObject* PyInit__ops() {
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_ops", "operators of csrc/", -1, nullptr,
                                     nullptr,               nullptr, nullptr,              nullptr};
    return PyModule_Create(&definition);
}
