"""What libraries say when memory ran out, and what they say of other faults; as their sources and people's reports have them."""

# 显存不足没有统一的异常：每个库说的都不一样，认错一句就要么白白退出，要么把真正的错误藏起来
# 句子照抄各库的源码与人们贴出来的报错

import errno

import torch

# 库 -> 它说过的话
OUT_OF_MEMORY = {
    "CUDA allocator": (
        "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 12.00 GiB of which 512.00 MiB is free. Including non-PyTorch "
        "memory, this process has 11.20 GiB memory in use. Of the allocated memory 10.14 GiB is allocated by PyTorch, and 771.43 MiB is reserved.",
        "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 11.76 GiB total capacity; 10.61 GiB already allocated; 14.75 MiB free)",
        "CUDA out of memory. Tried to allocate 2.00 GiB. 12.00 GiB allowed; Of the allocated memory 10.14 GiB is allocated by PyTorch",
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":1016, please report a bug to PyTorch.',
        "expandable segments: CUDA driver error: out of memory",
    ),
    "CUDA runtime and driver": (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA driver error: out of memory", "Triton Error [CUDA]: out of memory", "CUDA_ERROR_OUT_OF_MEMORY: out of memory",
        "cudaErrorMemoryAllocation",
        "failed to alloc 34359738368 bytes on host: CUDA_ERROR_OUT_OF_MEMORY",
    ),
    "cuBLAS": (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasSetWorkspace(handle, workspace, size)`",
    ),
    "cuBLASLt": (
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtCreate(&handle)`",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasLtMatmul with transpose_mat1 1 transpose_mat2 0 m 3072 n 4096 k 768",
    ),
    "cuDNN 8": ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    "cuDNN 9": (
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    ),
    "cuSOLVER": (
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnSgetrf`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_NOT_INITIALIZED, when calling `cusolverDnCreate(handle)`",
    ),
    "cuSPARSE": (
        "CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseSpMM`",
        "CUDA error: CUSPARSE_STATUS_NOT_INITIALIZED when calling `cusparseCreate(handle)`",
    ),
    "cuFFT": ("cuFFT error: CUFFT_ALLOC_FAILED",),
    "cuRAND": ("CURAND_STATUS_ALLOCATION_FAILED",),
    "NCCL": (
        "NCCL error in: ProcessGroupNCCL.cpp:1970, unhandled cuda error, NCCL version 2.21.5\nncclUnhandledCudaError: Call to CUDA function failed.\n"
        "Last error:\nCuda failure 2 'out of memory'",
        "NCCL error: ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc async 2432 bytes",
        "NCCL error: unhandled cuda error\nLast error:\nFailed to CUDA calloc 536870912 bytes",
        "Last error:\nFailed to CUDA host alloc 4194304 bytes",
    ),
    "CPU allocator": (
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073741824 bytes. "
        "Error code 12 (Cannot allocate memory)",
        "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to allocate 37984010240 bytes.",
        "C10 Out of Memory. Trying to allocate 8192 bytes", "Could not allocate memory to change Tensor SizesAndStrides!",
        "unable to mmap 29764 bytes from file </torch_10182_3020184674_63991>: Cannot allocate memory (12)",
    ),
    "C++ and oneMKL": (
        "std::bad_alloc", "bad allocation", "Intel oneMKL ERROR: Not enough memory to allocate", "Cannot run dfti - not enough memory",
        "Intel oneMKL fatal error: cannot allocate memory",
    ),
    "pinned memory": (
        "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
        "could not allocate pinned host memory of size: 34359738368",
    ),
    "MPS": (
        "MPS backend out of memory (MPS allocated: 9.05 GiB, other allocations: 3.29 GiB, max allowed: 9.07 GiB). Tried to allocate 20.00 MiB on "
        "private pool.",
        "Invalid buffer size: 32.00 GiB",
        "Error: command buffer exited with error status. Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    ),
    "HIP": (
        "HIP out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 11.98 GiB of which 0 bytes is free.",
        "HIP error: out of memory", "hipErrorOutOfMemory", "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
        "miopenStatusAllocFailed", "rocblas_status_memory_error",
        "HSA_STATUS_ERROR_OUT_OF_RESOURCES: the runtime failed to allocate the necessary resources",
    ),
    "XPU": (
        "XPU out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 15.91 GiB.",
        "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)", "UR error: 38 (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)",
        "level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)", "Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)",
        "ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY", "CL_MEM_OBJECT_ALLOCATION_FAILURE",
    ),
}

# 不是内存不足：半个批也一样会错，吞掉它们只会把真正的原因藏起来
OTHER_FAULTS = (
    "CUDA error: an illegal memory access was encountered", "CUDA error: device-side assert triggered", "CUDA error: invalid argument",
    "CUDA error: misaligned address", "CUDA error: unspecified launch failure", "CUDA error: the launch timed out and was terminated",
    "CUDA error: no kernel image is available for execution on the device", "CUDA error: too many resources requested for launch",
    "CUDA error: initialization error", "CUDA error: invalid device ordinal", "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: invalid configuration argument", "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle, opa, opb, m, n, k)`",
    "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx`", "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`",
    "CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasGemmEx`", "CUDA error: CUBLAS_STATUS_ARCH_MISMATCH",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "cuDNN error: CUDNN_STATUS_BAD_PARAM", "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
    "cuDNN error: CUDNN_STATUS_MAPPING_ERROR", "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnSgetrf`",
    "cuFFT error: CUFFT_INVALID_SIZE",
    "NCCL error: ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.",
    "NCCL error: ncclInvalidUsage: This usually reflects invalid usage of NCCL library.", "index out of range in self",
    "shape '[2, 3]' is invalid for input of size 7", "The size of tensor a (16) must match the size of tensor b (17) at non-singleton dimension 1",
    "mat1 and mat2 shapes cannot be multiplied (4x16 and 17x64)", "expected scalar type Float but found Half",
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
    "Trying to backward through the graph a second time", "element 0 of tensors does not require grad and does not have a grad_fn",
    "setStorage: sizes [4, 16], strides [16, 1], storage offset 0 requiring a storage size of 256 are out of bounds for storage of size 128",
    "out of resource: shared memory, Required: 147456, Hardware limit: 101376", "DataLoader worker (pid 123) exited unexpectedly",
    "view size is not compatible with input tensor's size and stride", "Input type and weight type should be the same",
    "allocator_ INTERNAL ASSERT FAILED at \"c10/core/StorageImpl.h\":72", "a leaf Variable that requires grad is being used in an in-place operation",
)


def memory_errors() -> list[tuple[str, Exception]]:
    """(library, error) for every known way to say that memory ran out; new objects each time."""
    errors: list[tuple[str, Exception]] = []
    for library, texts in OUT_OF_MEMORY.items():
        for text in texts:
            errors.append((library, RuntimeError(text)))
            if "allocator" in library or library in ("HIP", "XPU"):
                errors.append((library, torch.OutOfMemoryError(text)))
    windows = OSError("The paging file is too small for this operation to complete")
    # 只有 Windows 上的 OSError 自带这个编号
    windows.winerror = 1455
    return [
        *errors, ("Python", MemoryError()),
        ("numpy", MemoryError("Unable to allocate 8.00 GiB for an array with shape (1073741824,) and data type float64")),
        ("operating system", OSError(errno.ENOMEM, "Cannot allocate memory")), ("operating system", windows),
    ]


def other_errors() -> list[Exception]:
    """Errors that have nothing to do with memory running out."""
    others = [ValueError("out of memory"), IndexError("index out of range"), OSError(errno.ENOENT, "No such file"), KeyError("x")]
    return [*map(RuntimeError, OTHER_FAULTS), *others]
