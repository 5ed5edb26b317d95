// A CUDA runtime, a driver and cuBLAS that need no GPU. fake_cuda_check.py compiles this file, and adds an empty
// function for everything else that PyTorch calls. Device memory is reserved address space that nothing
// writes to. Kernels do nothing. Streams and events are numbers.
//
// FAKE_SM: compute capability, such as 80. FAKE_GIB: memory of all devices. FAKE_GPUS: their number.
#include <driver_types.h>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sys/mman.h>

#define API(name, ...) int name(__VA_ARGS__)

static long setting(const char* name, long fallback) {
  const char* text = getenv(name);
  return text ? atol(text) : fallback;
}

static const int SM = setting("FAKE_SM", 80);
static const int GPUS = setting("FAKE_GPUS", 1);
static const long TOTAL = setting("FAKE_GIB", 80) << 30;
static const bool IS_DATACENTER = SM == 80 || (SM >= 90 && SM < 120);
// Shared memory of a multiprocessor, in bytes (CUDA programming guide, table of compute capabilities).
static const int SHARED = SM == 75 ? 65536 : SM == 80 ? 166912 : IS_DATACENTER ? 232448 : 101376;
static const int THREADS = SM == 75 ? 1024 : IS_DATACENTER ? 2048 : 1536;

// Blocks of memory by their start, with their size.
typedef std::map<char*, size_t> Blocks;
static Blocks device_blocks, pinned_blocks;
static std::mutex mutex;
static long used, handles;
static thread_local int current_device;

static void add(Blocks& blocks, void* start, size_t size) {
  std::lock_guard<std::mutex> lock(mutex);
  blocks[(char*)start] = size;
}

// Forget a block; returns its size, or 0 if there is none.
static size_t drop(Blocks& blocks, void* start) {
  std::lock_guard<std::mutex> lock(mutex);
  auto block = blocks.find((char*)start);
  if (block == blocks.end()) return 0;
  size_t size = block->second;
  blocks.erase(block);
  return size;
}

static bool contains(Blocks& blocks, const void* address) {
  std::lock_guard<std::mutex> lock(mutex);
  auto block = blocks.upper_bound((char*)address);
  return block != blocks.begin() && (--block, (char*)address < block->first + block->second);
}

static int zero() { return 0; }

extern "C" {

// --- driver ---

API(cuCtxGetCurrent, void** context) {
  *context = (void*)1;
  return 0;
}

API(cuDevicePrimaryCtxGetState, int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}

API(cudaGetDriverEntryPointByVersion, const char* name, void** function, unsigned, unsigned long long, int* status) {
  *function = strstr(name, "CtxGetState") ? (void*)cuDevicePrimaryCtxGetState : (void*)zero;
  *status = 0;
  return 0;
}

// --- devices ---

API(cudaGetDeviceCount, int* count) {
  *count = GPUS;
  return 0;
}

API(cudaGetDevice, int* device) {
  *device = current_device;
  return 0;
}

API(cudaSetDevice, int device) {
  if (device < 0 || device >= GPUS) return cudaErrorInvalidDevice;
  current_device = device;
  return 0;
}

API(cudaDriverGetVersion, int* version) {
  *version = 13000;
  return 0;
}

API(cudaGetDeviceProperties, cudaDeviceProp* result, int) {
  static cudaDeviceProp properties;
  properties = {"fake"};
  properties.major = SM / 10;
  properties.minor = SM % 10;
  properties.totalGlobalMem = TOTAL;
  properties.warpSize = 32;
  properties.sharedMemPerBlock = 49152;
  properties.regsPerBlock = 65536;
  properties.sharedMemPerBlockOptin = properties.sharedMemPerMultiprocessor = SHARED;
  properties.multiProcessorCount = 108;
  properties.maxThreadsPerMultiProcessor = THREADS;
  properties.maxThreadsPerBlock = 1024;
  for (int axis = 0; axis < 3; axis++) {
    properties.maxThreadsDim[axis] = axis < 2 ? 1024 : 64;
    properties.maxGridSize[axis] = axis ? 65535 : 1 << 30;
  }
  *result = properties;
  return 0;
}

API(cudaDeviceGetAttribute, int* value, int attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = SM / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = SM % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = 108; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = SHARED; break;
    default: *value = 1024;
  }
  return 0;
}

// --- memory ---

API(cudaMalloc, void** start, size_t size) {
  if (used + (long)size > TOTAL) return cudaErrorMemoryAllocation;
  used += size;
  *start = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  add(device_blocks, *start, size);
  return 0;
}

API(cudaFree, void* start) {
  size_t size = drop(device_blocks, start);
  used -= size;
  if (size) munmap(start, size);
  return 0;
}

API(cudaMemGetInfo, size_t* free, size_t* total) {
  *total = TOTAL;
  *free = TOTAL - used;
  return 0;
}

API(cudaHostAlloc, void** start, size_t size, unsigned) {
  *start = malloc(size);
  add(pinned_blocks, *start, size);
  return 0;
}

API(cudaFreeHost, void* start) {
  drop(pinned_blocks, start);
  free(start);
  return 0;
}

API(cudaPointerGetAttributes, cudaPointerAttributes* result, const void* address) {
  *result = {contains(device_blocks, address)   ? cudaMemoryTypeDevice
             : contains(pinned_blocks, address) ? cudaMemoryTypeHost
                                                : cudaMemoryTypeUnregistered};
  return 0;
}

// A copy from the device gives zeros, and true if it is one byte, a bool: so everything is finite.
API(cudaMemcpyAsync, void* to, const void* from, size_t size, int, void*) {
  if (contains(device_blocks, to)) return 0;
  if (contains(device_blocks, from))
    memset(to, size == 1, size);
  else
    memcpy(to, from, size);
  return 0;
}

// --- streams, events, kernels ---

API(cudaStreamCreateWithPriority, long* stream, unsigned, int) {
  *stream = handles += 16;
  return 0;
}

API(cudaEventCreateWithFlags, long* event, unsigned) {
  *event = handles += 16;
  return 0;
}

API(cudaDeviceGetStreamPriorityRange, int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return 0;
}

API(cudaStreamIsCapturing, void*, int* status) {
  *status = 0;
  return 0;
}

API(cudaStreamGetCaptureInfo, void*, int* status, unsigned long long* id) {
  *status = 0;
  if (id) *id = 0;
  return 0;
}

API(cudaFuncGetAttributes, cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = SM;
  return 0;
}

API(cudaOccupancyMaxActiveBlocksPerMultiprocessor, int* blocks, const void*, int, size_t) {
  *blocks = 2;
  return 0;
}

// --- cuBLAS ---

API(cublasCreate_v2, long* handle) {
  *handle = handles += 16;
  return 0;
}

API(cublasLtMatmulAlgoGetHeuristic, void*, void*, void*, void*, void*, void*, void*, int, void*, int* found) {
  *found = 1;
  return 0;
}
