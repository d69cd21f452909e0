"""How kernels are proven without a GPU, and processes without a cluster, for all tests alike.

- `host`: the CUDA C++ sources, bindings included, compiled for the CPU under a shim.
- `interpreter`: Triton kernels on CPU tensors, in a worker process.
- `aot`: Triton kernels compiled for GPUs that are not there, with their resource usage.
- `nvcc`: the same for CUDA C++.
- `cases`: the inputs on which kernels go wrong.
- `torchrun`: several processes that find themselves under torchrun, for what they share.

Where there is a GPU, the same tests run the kernels on it.
"""
