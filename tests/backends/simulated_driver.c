/* A stand-in for NVIDIA's driver library, libcuda.so.1, where there is no GPU: enough of the driver API for
   `backends/cuda.py`. Device memory is the computer's, and everything is done at once, on the caller's thread.

   It is strict where the real one is: without a current context most calls are refused, freed addresses and destroyed
   handles are refused, memory is limited, and what is captured is only done when the graph is launched.

   SIMULATED_DRIVER_FAIL="cuMemAlloc:2:719" makes the second call of a function answer with a status; it is sticky from
   then on if it is one of 700 to 721. SIMULATED_DRIVER_INTEGRATED=1 makes it an integrated GPU.
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TOTAL ((size_t)64 << 20)
#define API __attribute__((visibility("default")))

enum { DEVICE_MEMORY = 1, HOST_MEMORY, STREAM, EVENT, GRAPH, EXECUTABLE };

typedef struct Copy { void *to; const void *from; size_t size; struct Copy *next; } Copy;
typedef struct Thing {
    int kind; void *handle; size_t size; struct Thing *next;
    int capturing; Copy *copies; int timed; double at; unsigned flags;
} Thing;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Thing *things;
static size_t allocated;
static int initialized, retained, sticky;
static double clock_ms;
static int context;
static __thread int depth;

static int injected(const char *function) {
    static int calls;
    char wanted[64] = ""; int nth = 0, status = 0;
    const char *order = getenv("SIMULATED_DRIVER_FAIL");
    if (order && sscanf(order, "%63[^:]:%d:%d", wanted, &nth, &status) == 3 && !strcmp(wanted, function)
        && ++calls == nth) {
        if (status >= 700 && status <= 721) sticky = status;
        return status;
    }
    return sticky;
}

#define ENTER(function, needs_context) \
    do { \
        pthread_mutex_lock(&lock); \
        int refused = injected(function); \
        if (!refused && !initialized) refused = 3; \
        if (!refused && (needs_context) && !depth) refused = 201; \
        if (refused) { pthread_mutex_unlock(&lock); return refused; } \
    } while (0)
#define LEAVE(status) do { int left = (status); pthread_mutex_unlock(&lock); return left; } while (0)

static Thing *added(int kind, void *handle, size_t size) {
    Thing *thing = calloc(1, sizeof *thing);
    thing->kind = kind; thing->handle = handle ? handle : thing; thing->size = size;
    thing->next = things; things = thing;
    return thing;
}
static Thing *found(int kind, const void *handle) {
    for (Thing *t = things; t; t = t->next) if (t->kind == kind && t->handle == handle) return t;
    return NULL;
}
static int removed(int kind, const void *handle) {
    for (Thing **at = &things; *at; at = &(*at)->next)
        if ((*at)->kind == kind && (*at)->handle == handle) {
            Thing *gone = *at; *at = gone->next; free(gone); return 1;
        }
    return 0;
}
static int inside(int kind, const void *from, size_t size) {
    for (Thing *t = things; t; t = t->next)
        if (t->kind == kind && (char *)from >= (char *)t->handle
            && (char *)from + size <= (char *)t->handle + t->size) return 1;
    return 0;
}

API int cuInit(unsigned flags) {
    pthread_mutex_lock(&lock);
    int refused = injected("cuInit");
    if (!refused) initialized = 1;
    LEAVE(refused);
}
API int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
API int cuDeviceGetCount(int *count) { ENTER("cuDeviceGetCount", 0); *count = 1; LEAVE(0); }
API int cuDeviceGet(int *device, int ordinal) { ENTER("cuDeviceGet", 0); *device = ordinal; LEAVE(ordinal ? 101 : 0); }
API int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Simulated GPU"); return 0; }
API int cuDeviceGetAttribute(int *value, int attribute, int device) {
    const char *integrated = getenv("SIMULATED_DRIVER_INTEGRATED");
    switch (attribute) {
        case 75: *value = 8; break;                                       /* COMPUTE_CAPABILITY_MAJOR */
        case 76: *value = 9; break;                                       /* COMPUTE_CAPABILITY_MINOR */
        case 18: *value = integrated && *integrated == '1'; break;        /* INTEGRATED */
        case 19: *value = 1; break;                                       /* CAN_MAP_HOST_MEMORY */
        default: *value = 0;
    }
    return 0;
}
API int cuDeviceComputeCapability(int *major, int *minor, int device) { *major = 8; *minor = 9; return 0; }
API int cuDeviceTotalMem(size_t *size, int device) { *size = TOTAL; return 0; }
API int cuDevicePrimaryCtxRetain(void **made, int device) {
    ENTER("cuDevicePrimaryCtxRetain", 0); retained++; *made = &context; LEAVE(0);
}
API int cuDevicePrimaryCtxRelease(int device) {
    ENTER("cuDevicePrimaryCtxRelease", 0); int known = retained > 0; retained -= known; LEAVE(known ? 0 : 201);
}
API int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0; *active = retained > 0; return 0;
}
API int cuCtxPushCurrent(void *pushed) {
    ENTER("cuCtxPushCurrent", 0);
    if (pushed != &context || !retained) LEAVE(201);
    depth++; LEAVE(0);
}
API int cuCtxPopCurrent(void **popped) { ENTER("cuCtxPopCurrent", 1); depth--; if (popped) *popped = &context; LEAVE(0); }
API int cuCtxGetCurrent(void **current) { *current = depth ? &context : NULL; return 0; }
API int cuMemGetInfo(size_t *left, size_t *total) {
    ENTER("cuMemGetInfo", 1); *total = TOTAL; *left = TOTAL - allocated; LEAVE(0);
}
API int cuMemAlloc(uint64_t *address, size_t size) {
    ENTER("cuMemAlloc", 1);
    if (!size) LEAVE(1);
    if (size > TOTAL - allocated) LEAVE(2);
    void *memory = malloc(size);
    memset(memory, 0xA5, size);
    added(DEVICE_MEMORY, memory, size); allocated += size; *address = (uint64_t)(uintptr_t)memory;
    LEAVE(0);
}
API int cuMemFree(uint64_t address) {
    ENTER("cuMemFree", 1);
    Thing *thing = found(DEVICE_MEMORY, (void *)(uintptr_t)address);
    if (!thing) LEAVE(1);
    allocated -= thing->size; free(thing->handle); removed(DEVICE_MEMORY, (void *)(uintptr_t)address);
    LEAVE(0);
}
API int cuMemHostAlloc(void **memory, size_t size, unsigned flags) {
    ENTER("cuMemHostAlloc", 1);
    if (size > TOTAL) LEAVE(2);
    *memory = malloc(size); added(HOST_MEMORY, *memory, size)->flags = flags;
    LEAVE(0);
}
API int cuMemFreeHost(void *memory) {
    ENTER("cuMemFreeHost", 1);
    if (!removed(HOST_MEMORY, memory)) LEAVE(1);
    free(memory); LEAVE(0);
}
API int cuMemHostGetDevicePointer(uint64_t *address, void *memory, unsigned flags) {
    ENTER("cuMemHostGetDevicePointer", 1);
    Thing *thing = found(HOST_MEMORY, memory);
    if (!thing || !(thing->flags & 2)) LEAVE(1);
    *address = (uint64_t)(uintptr_t)memory; LEAVE(0);
}
static int copied(void *stream, void *to, const void *from, size_t size) {
    Thing *thing = found(STREAM, stream);
    if (!thing) return 400;
    if (!thing->capturing) { memcpy(to, from, size); clock_ms += 0.5; return 0; }
    Copy **at = &thing->copies;
    while (*at) at = &(*at)->next;
    *at = calloc(1, sizeof **at);
    (*at)->to = to; (*at)->from = from; (*at)->size = size;
    return 0;
}
API int cuMemcpyHtoDAsync(uint64_t to, const void *from, size_t size, void *stream) {
    ENTER("cuMemcpyHtoDAsync", 1);
    if (!inside(DEVICE_MEMORY, (void *)(uintptr_t)to, size)) LEAVE(1);
    LEAVE(copied(stream, (void *)(uintptr_t)to, from, size));
}
API int cuMemcpyDtoHAsync(void *to, uint64_t from, size_t size, void *stream) {
    ENTER("cuMemcpyDtoHAsync", 1);
    if (!inside(DEVICE_MEMORY, (void *)(uintptr_t)from, size)) LEAVE(1);
    LEAVE(copied(stream, to, (void *)(uintptr_t)from, size));
}
API int cuStreamCreate(void **stream, unsigned flags) {
    ENTER("cuStreamCreate", 1);
    if (flags != 1) LEAVE(1);  /* ours never wait for the default stream */
    *stream = added(STREAM, NULL, 0)->handle; LEAVE(0);
}
API int cuStreamDestroy(void *stream) { ENTER("cuStreamDestroy", 1); LEAVE(removed(STREAM, stream) ? 0 : 400); }
API int cuStreamSynchronize(void *stream) {
    ENTER("cuStreamSynchronize", 1);
    Thing *thing = found(STREAM, stream);
    LEAVE(!thing ? 400 : thing->capturing ? 900 : 0);
}
API int cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
    ENTER("cuStreamWaitEvent", 1); LEAVE(found(STREAM, stream) && found(EVENT, event) ? 0 : 400);
}
API int cuEventCreate(void **event, unsigned flags) {
    ENTER("cuEventCreate", 1);
    Thing *thing = added(EVENT, NULL, 0);
    thing->timed = !(flags & 2); thing->at = -1; *event = thing->handle;
    LEAVE(0);
}
API int cuEventDestroy(void *event) { ENTER("cuEventDestroy", 1); LEAVE(removed(EVENT, event) ? 0 : 400); }
API int cuEventRecord(void *event, void *stream) {
    ENTER("cuEventRecord", 1);
    Thing *thing = found(EVENT, event);
    if (!thing || !found(STREAM, stream)) LEAVE(400);
    thing->at = clock_ms; LEAVE(0);
}
API int cuEventSynchronize(void *event) { ENTER("cuEventSynchronize", 1); LEAVE(found(EVENT, event) ? 0 : 400); }
API int cuEventElapsedTime(float *ms, void *start, void *end) {
    ENTER("cuEventElapsedTime", 1);
    Thing *from = found(EVENT, start), *to = found(EVENT, end);
    if (!from || !to || !from->timed || !to->timed || from->at < 0 || to->at < 0) LEAVE(400);
    *ms = (float)(to->at - from->at); LEAVE(0);
}
API int cuStreamBeginCapture(void *stream, int mode) {
    ENTER("cuStreamBeginCapture", 1);
    Thing *thing = found(STREAM, stream);
    if (!thing || thing->capturing) LEAVE(1);
    thing->capturing = 1; thing->copies = NULL; LEAVE(0);
}
API int cuStreamEndCapture(void *stream, void **graph) {
    ENTER("cuStreamEndCapture", 1);
    Thing *thing = found(STREAM, stream);
    if (!thing || !thing->capturing) LEAVE(1);
    thing->capturing = 0;
    Thing *made = added(GRAPH, NULL, 0);
    made->copies = thing->copies; *graph = made->handle;
    LEAVE(0);
}
API int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
    ENTER("cuGraphInstantiate", 1);
    Thing *thing = found(GRAPH, graph);
    if (!thing) LEAVE(1);
    Thing *made = added(EXECUTABLE, NULL, 0);
    made->copies = thing->copies; *executable = made->handle;
    LEAVE(0);
}
API int cuGraphLaunch(void *executable, void *stream) {
    ENTER("cuGraphLaunch", 1);
    Thing *thing = found(EXECUTABLE, executable);
    if (!thing || !found(STREAM, stream)) LEAVE(400);
    for (Copy *copy = thing->copies; copy; copy = copy->next) memcpy(copy->to, copy->from, copy->size);
    LEAVE(0);
}
API int cuGraphDestroy(void *graph) { ENTER("cuGraphDestroy", 1); LEAVE(removed(GRAPH, graph) ? 0 : 1); }
API int cuGraphExecDestroy(void *graph) { ENTER("cuGraphExecDestroy", 1); LEAVE(removed(EXECUTABLE, graph) ? 0 : 1); }

static const struct { int status; const char *name, *text; } TEXTS[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
};
API int cuGetErrorString(int status, const char **text) {
    for (size_t i = 0; i < sizeof TEXTS / sizeof *TEXTS; i++)
        if (TEXTS[i].status == status) { *text = TEXTS[i].text; return 0; }
    *text = "unrecognized error code"; return 1;
}
API int cuGetErrorName(int status, const char **name) {
    for (size_t i = 0; i < sizeof TEXTS / sizeof *TEXTS; i++)
        if (TEXTS[i].status == status) { *name = TEXTS[i].name; return 0; }
    *name = NULL; return 1;
}

/* Asked by the tests: how much of each kind is left. */
API int simulated_driver_holds(int kind) {
    int count = 0;
    for (Thing *t = things; t; t = t->next) count += t->kind == kind;
    return kind ? count : retained;
}

/* cuda-python asks for its functions by name; pycuda is linked against names with their version. */
API int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    static void *self;
    Dl_info info;
    if (!self && dladdr((void *)cuInit, &info)) self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    const char *ours = strcmp(name, "cuGraphInstantiate") ? name : "cuGraphInstantiateWithFlags";
    *function = strcmp(name, "cuGetProcAddress") ? dlsym(self, ours) : (void *)cuGetProcAddress_v2;
    if (status) *status = *function ? 0 : 1;
    return *function ? 0 : 500;
}
API int cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
#define VERSIONED(name, version) \
    __typeof__(name) name##version __attribute__((alias(#name), visibility("default")))
VERSIONED(cuDeviceTotalMem, _v2);
VERSIONED(cuDevicePrimaryCtxRelease, _v2);
VERSIONED(cuCtxPushCurrent, _v2);
VERSIONED(cuCtxPopCurrent, _v2);
VERSIONED(cuMemGetInfo, _v2);
VERSIONED(cuMemAlloc, _v2);
VERSIONED(cuMemFree, _v2);
VERSIONED(cuMemHostGetDevicePointer, _v2);
VERSIONED(cuMemcpyHtoDAsync, _v2);
VERSIONED(cuMemcpyDtoHAsync, _v2);
VERSIONED(cuStreamDestroy, _v2);
VERSIONED(cuEventDestroy, _v2);
VERSIONED(cuStreamBeginCapture, _v2);
VERSIONED(cuEventElapsedTime, _v2);
