"""What libraries say when memory ran out, and what they say of other faults; as their sources and people's reports have them."""

# 显存不足没有统一的异常：每个库说的都不一样，认错一句就要么白白退出，要么把真正的错误藏起来
# 每个库留一两句；全部说法的写法见 out_of_memory.py 里的表达式

import errno

import torch

# 库 -> 它说过的话
OUT_OF_MEMORY = {
    "CUDA allocator": (
        "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 12.00 GiB of which 512.00 MiB is free.",
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":1016, please report a bug to PyTorch.',
    ),
    "CUDA runtime and driver": (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "Triton Error [CUDA]: out of memory", "CUDA_ERROR_OUT_OF_MEMORY: out of memory", "cudaErrorMemoryAllocation",
        "failed to alloc 34359738368 bytes on host: CUDA_ERROR_OUT_OF_MEMORY", "could not allocate pinned host memory of size: 34359738368",
    ),
    "cuBLAS": (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtCreate(&handle)`",
    ),
    "cuDNN": (
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ),
    "cuSOLVER": (
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnSgetrf`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
    ),
    "cuSPARSE": ("CUDA error: CUSPARSE_STATUS_NOT_INITIALIZED when calling `cusparseCreate(handle)`",),
    "cuFFT, cuRAND": ("cuFFT error: CUFFT_ALLOC_FAILED", "CURAND_STATUS_ALLOCATION_FAILED"),
    "NCCL": (
        "NCCL error: unhandled cuda error\nLast error:\nFailed to CUDA calloc 536870912 bytes",
        "Last error:\nFailed to CUDA host alloc 4194304 bytes", "Last error:\nCuda failure 2 'out of memory'",
    ),
    "CPU allocator": (
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073741824 bytes.",
        "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to allocate 37984010240 bytes.",
        "Could not allocate memory to change Tensor SizesAndStrides!", "unable to mmap 29764 bytes from file </torch_10>: Cannot allocate memory (12)",
    ),
    "C++ and oneMKL": ("std::bad_alloc", "bad allocation", "Intel oneMKL ERROR: Not enough memory to allocate", "Intel oneMKL fatal error: cannot allocate memory"),
    "MPS": (
        "MPS backend out of memory (MPS allocated: 9.05 GiB, max allowed: 9.07 GiB). Tried to allocate 20.00 MiB on private pool.",
        "Invalid buffer size: 32.00 GiB", "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    ),
    "HIP": (
        "HIP out of memory. Tried to allocate 20.00 MiB.", "hipErrorOutOfMemory", "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
        "miopenStatusAllocFailed", "rocblas_status_memory_error", "HSA_STATUS_ERROR_OUT_OF_RESOURCES: the runtime failed to allocate the necessary resources",
    ),
    "XPU": (
        "XPU out of memory. Tried to allocate 1.00 GiB.", "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)", "ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY", "CL_MEM_OBJECT_ALLOCATION_FAILURE",
    ),
}

# 不是内存不足：半个批也一样会错，吞掉它们只会把真正的原因藏起来
OTHER_FAULTS = (
    "CUDA error: an illegal memory access was encountered", "CUDA error: device-side assert triggered", "CUDA error: misaligned address",
    "CUDA error: too many resources requested for launch", "CUDA error: initialization error", "CUDA error: invalid configuration argument",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle, opa, opb, m, n, k)`", "cuDNN error: CUDNN_STATUS_BAD_PARAM",
    "CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasGemmEx`", "cuFFT error: CUFFT_INVALID_SIZE", "index out of range in self",
    "NCCL error: ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.",
    "shape '[2, 3]' is invalid for input of size 7", "mat1 and mat2 shapes cannot be multiplied (4x16 and 17x64)",
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
    "setStorage: sizes [4, 16] requiring a storage size of 256 are out of bounds for storage of size 128",
    "out of resource: shared memory, Required: 147456, Hardware limit: 101376", "DataLoader worker (pid 123) exited unexpectedly",
    'allocator_ INTERNAL ASSERT FAILED at "c10/core/StorageImpl.h":72',
)


def memory_errors() -> list[Exception]:
    """An error for every known way to say that memory ran out; new objects each time."""
    said = [RuntimeError(text) for texts in OUT_OF_MEMORY.values() for text in texts]
    windows = OSError("The paging file is too small for this operation to complete")
    # 只有 Windows 上的 OSError 自带这个编号
    windows.winerror = 1455
    numpy = MemoryError("Unable to allocate 8.00 GiB for an array with shape (1073741824,) and data type float64")
    return [*said, torch.OutOfMemoryError(str(said[0])), MemoryError(), numpy, OSError(errno.ENOMEM, "Cannot allocate memory"), windows]


def other_errors() -> list[Exception]:
    """Errors that have nothing to do with memory running out."""
    return [*map(RuntimeError, OTHER_FAULTS), ValueError("out of memory"), OSError(errno.ENOENT, "No such file"), KeyError("x")]
