/* A CUDA driver without a GPU: what Triton calls of libcuda.so.1. Every call succeeds; a launch is
   recorded with its parameters, and runs nothing. Triton's cuda.h checks the signatures. */

#include <cuda.h>
#include <stdint.h>
#include <string.h>

enum {
  MAX_FUNCTIONS = 256,
  MAX_PARAMETERS = 128, /* over twice those of the largest kernel */
  MAX_LAUNCHES = 64,    /* later launches are not kept, until recorder_forget */
};

/* driver.Record in Python has the same fields. */
struct launch {
  uint64_t function, stream;
  uint32_t grid[3], block[3], shared_bytes, attributes, overlaps, parameters;
  uint64_t values[MAX_PARAMETERS]; /* as many low bytes as the parameter has, the others 0 */
};

static struct launch launches[MAX_LAUNCHES];
static int launches_until_refusal = -1; /* negative: none is refused */
static int launch_count;
static uintptr_t function_count;
static int parameter_counts[MAX_FUNCTIONS];
static uint8_t parameter_bytes[MAX_FUNCTIONS][MAX_PARAMETERS];

/* A launch does not say how large its parameters are: the kernel does. */
void recorder_describe(uint64_t function, int count, const uint8_t* bytes) {
  if (function >= MAX_FUNCTIONS || count > MAX_PARAMETERS) return;
  parameter_counts[function] = count;
  memcpy(parameter_bytes[function], bytes, count);
}

const struct launch* recorder_launches(int* count) {
  *count = launch_count;
  return launches;
}

void recorder_forget(void) { launch_count = 0; }

/* Refuses one launch, after this many more. */
void recorder_refuse(int launches) { launches_until_refusal = launches; }

/* As PyTorch tells the current stream. */
static uint64_t current_stream;
void recorder_set_stream(uint64_t stream) { current_stream = stream; }
int recorder_get_stream(int32_t device, void** stream) {
  *stream = (void*)current_stream;
  return 0;
}

/* Whether the kernel may start while the one before it ends. */
static uint32_t overlaps(const CUlaunchConfig* config) {
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      return config->attrs[i].value.programmaticStreamSerializationAllowed;
  return 0;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction f, void** params, void** extra) {
  uintptr_t function = (uintptr_t)f;
  if (function >= MAX_FUNCTIONS || parameter_counts[function] == 0) return CUDA_ERROR_INVALID_VALUE;
  if (launches_until_refusal-- == 0) return CUDA_ERROR_INVALID_CONTEXT;
  if (launch_count == MAX_LAUNCHES) return CUDA_SUCCESS;
  struct launch* launch = &launches[launch_count++];
  *launch = (struct launch){
      .function = function,
      .stream = (uintptr_t)config->hStream,
      .grid = {config->gridDimX, config->gridDimY, config->gridDimZ},
      .block = {config->blockDimX, config->blockDimY, config->blockDimZ},
      .shared_bytes = config->sharedMemBytes,
      .attributes = config->numAttrs,
      .overlaps = overlaps(config),
      .parameters = parameter_counts[function],
  };
  for (uint32_t i = 0; i < launch->parameters; i++)
    memcpy(&launch->values[i], params[i], parameter_bytes[function][i]);
  return CUDA_SUCCESS;
}

/* A module holds one function, and both have the same number, from 1 on. */
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)++function_count;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

/* The addresses of tensors on the CPU pass as those of a device. */
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)data = pointer;
  return CUDA_SUCCESS;
}

/* An H100. */
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1; /* clocks and the width of the bus, which nobody uses */
  }
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(
    int* count, CUfunction function, const CUlaunchConfig* config) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "refused, or a kernel that the recorder knows nothing of";
  return CUDA_SUCCESS;
}
