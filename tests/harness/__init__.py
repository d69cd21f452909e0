"""How kernels are proven without a GPU, for all operators alike.

- `host`: the CUDA C++ sources, bindings included, compiled for the CPU under a shim.
- `interpreter`: Triton kernels on CPU tensors, in a worker process.
- `aot`: Triton kernels compiled for GPUs that are not there, with their resource usage.
- `nvcc`: the same for CUDA C++.
- `cases`: the inputs on which kernels go wrong.

Where there is a GPU, the same tests run the kernels on it.
"""
