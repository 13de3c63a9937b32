// What Hugging Face's kernel-builder compiles as the binding: registration.h, which includes Python.h,
// and TORCH_EXTENSION_NAME are its own. The architectures are those of build.toml; the two files are
// csrc/bindings.cpp and csrc/choose.cpp under names that it does not compile by themselves.
#include "registration.h"

#define NASA_CUDA_ARCHS "8.0,9.0a,10.0,12.0"
#define NASA_WITH_SM90
#include "../csrc/bindings.h"
#include "../csrc/choose.h"
