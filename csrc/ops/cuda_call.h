// A call into the CUDA library from an op: device, stream, and errors as exceptions.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "fusewright/cuda_api.h"
#include "tensor_rows.h"

// torch declares it where its CUDA build flag is set, which asks for the CUDA toolkit's headers.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

// The tensors that the CUDA ops serve. Under the emulator, whose device memory is the host's, those of the CPU.
#if !defined(FUSEWRIGHT_CUDA_KEY)
#define FUSEWRIGHT_CUDA_KEY CUDA
#endif

namespace fusewright::ops {

// Makes the device of a tensor the current one for its lifetime, and knows the stream to launch on.
class CudaCall {
 public:
  CudaCall(const char* op, const Tensor& tensor) : op_(op), guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }

  void* stream() const { return stream_; }

  void check(int error) const {
    STD_TORCH_CHECK(error == 0, op_, ": CUDA error ", error, ", ", fusewright_cuda_error_string(error));
  }

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace fusewright::ops
