// What torch's CUDA library adds to csrc/bindings.cpp, of one device with one stream, so that a library
// of CPU tensors needs no such library: bench/host_runtime.cpp, tests/support/fake_torch.cpp.
#pragma once

#include <cstdint>

extern "C" {

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
    *stream = nullptr;
    return 0;
}
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
    *guard = nullptr;
    return 0;
}
int32_t aoti_torch_delete_device_guard(void*) { return 0; }
}
