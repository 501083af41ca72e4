/* CUDA's runtime, and as much of its driver as PyTorch asks for, of a card whose memory is RAM.

Loaded before PyTorch's own CUDA libraries (LD_PRELOAD), it answers in their place: memory that runs out at the size of
the card, streams that work by themselves in the order they were given, events, pinned memory, errors. Copies are real.
Kernels are launched and do nothing: `card.py` gives a stream what they would have computed, as calls.

A hollow card has addresses, and no memory behind them: copies do nothing, and work is done when it is given. */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE ((size_t)2 << 20) /* what the driver hands out memory in */
#define COUNTS(X) \
    X(mallocs) X(frees) X(launches) X(copied_bytes) X(host_waits) X(streams) X(events) X(registered) \
    X(registered_bytes) X(most_registered) X(host_allocated_bytes) X(used)

#define FIELD(name) size_t name;
static struct { COUNTS(FIELD) } count;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static size_t card_bytes, taken_bytes;
static int is_hollow, capability, copy_delay, call_delay; /* microseconds at most */
static char name_of_card[256];
static __thread int last_error, current_device;

/* What the tests set: the nth call from now of one function fails. */
static char failing[64];
static long failing_in;
static int failing_with;

typedef void (*call_fn)(void *);
enum kind { COPY, FILL, CALL, RECORD, WAIT, FREE };
struct event { size_t asked, done; double seconds; };
struct work {
    enum kind kind;
    void *to, *from, *staged;
    size_t size, generation;
    int value;
    struct event *event;
    call_fn call;
    struct work *next;
};
struct stream {
    struct work *first, *last;
    size_t asked, done;
    int runs, priority;
    struct stream *next;
};
struct range { char *start; size_t size; struct range *next; };

static struct stream legacy, *streams = &legacy;
static struct range *memory, *pinned;

__attribute__((constructor)) static void begin(void) {
    const char *text = getenv("CARD_BYTES");
    card_bytes = text ? strtoull(text, NULL, 10) : (size_t)24 << 30;
    text = getenv("CARD_TAKEN");
    taken_bytes = text ? strtoull(text, NULL, 10) : (size_t)512 << 20;
    text = getenv("CARD_CAPABILITY");
    capability = text ? atoi(text) : 86;
    text = getenv("CARD_NAME");
    snprintf(name_of_card, sizeof name_of_card, "%s", text ? text : "NVIDIA GeForce RTX 3090");
    is_hollow = getenv("CARD_HOLLOW") != NULL;
}

/* For the tests. */
void card_delays(int copies, int calls) { copy_delay = copies, call_delay = calls; }
void card_fails(const char *function, long in, int with) {
    pthread_mutex_lock(&lock);
    snprintf(failing, sizeof failing, "%s", function);
    failing_in = in, failing_with = with;
    pthread_mutex_unlock(&lock);
}
void card_size(size_t bytes) { card_bytes = bytes; }
int card_is_hollow(void) { return is_hollow; }
size_t card_count(const char *name) {
    size_t found = (size_t)-1;
    pthread_mutex_lock(&lock);
#define FIND(field) if (!strcmp(name, #field)) found = count.field;
    COUNTS(FIND)
    pthread_mutex_unlock(&lock);
    return found;
}
void card_forget_most(void) { count.most_registered = count.registered_bytes; }

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec / 1e9;
}

/* With the lock held. */
static int fails(const char *function, int *error) {
    if (failing_in <= 0 || strcmp(function, failing) || --failing_in) return 0;
    *error = failing_with;
    return 1;
}

static int result(int error) {
    if (error) last_error = error;
    return error;
}

#define BEGIN(function) \
    int error = 0; \
    pthread_mutex_lock(&lock); \
    if (fails(#function, &error)) { pthread_mutex_unlock(&lock); return result(error); }
#define END pthread_mutex_unlock(&lock); return result(error)

static struct range *around(struct range *ranges, const void *address) {
    for (; ranges; ranges = ranges->next)
        if ((const char *)address >= ranges->start && (const char *)address < ranges->start + ranges->size) return ranges;
    return NULL;
}

static void add(struct range **ranges, void *start, size_t size) {
    struct range *made = malloc(sizeof *made);
    *made = (struct range){start, size, *ranges};
    *ranges = made;
}

static size_t cut(struct range **ranges, void *start) {
    for (; *ranges; ranges = &(*ranges)->next)
        if ((*ranges)->start == start) {
            struct range *gone = *ranges;
            size_t size = gone->size;
            *ranges = gone->next;
            free(gone);
            return size;
        }
    return 0;
}

static int let_go(void *start) {
    size_t size = cut(&memory, start);
    if (!size) return cudaErrorInvalidValue;
    munmap(start, size);
    count.used -= size;
    return 0;
}

/* Streams. */

static void rest(int most) {
    static unsigned seed = 1;
    if (most) usleep(rand_r(&seed) % most);
}

/* Called and left with the lock held. */
static void carry_out(struct work *work) {
    if (work->kind == RECORD) {
        work->event->done = work->generation;
        work->event->seconds = now();
    } else if (work->kind == WAIT) {
        while (work->event->done < work->generation) pthread_cond_wait(&changed, &lock);
    } else if (work->kind == FREE) {
        let_go(work->from);
    } else {
        pthread_mutex_unlock(&lock);
        rest(work->kind == CALL ? call_delay : copy_delay);
        if (work->kind == CALL) work->call(work->from);
        else if (is_hollow) ;
        else if (work->kind == COPY) memmove(work->to, work->staged ? work->staged : work->from, work->size);
        else memset(work->to, work->value, work->size);
        pthread_mutex_lock(&lock);
    }
    free(work->staged);
    free(work);
}

static void *work_off(void *argument) {
    struct stream *stream = argument;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!stream->first) pthread_cond_wait(&changed, &lock);
        struct work *work = stream->first;
        stream->first = work->next;
        if (!stream->first) stream->last = NULL;
        carry_out(work);
        stream->done++;
        pthread_cond_broadcast(&changed);
    }
    return NULL;
}

static struct stream *stream_of(void *handle) {
    return handle == NULL || handle == cudaStreamLegacy || handle == cudaStreamPerThread ? &legacy : handle;
}

static void give(struct stream *stream, struct work todo) {
    struct work *work = malloc(sizeof *work);
    *work = todo;
    stream->asked++;
    if (is_hollow) {
        carry_out(work);
        stream->done++;
        return;
    }
    if (stream->last) stream->last->next = work;
    else stream->first = work;
    stream->last = work;
    if (!stream->runs) {
        pthread_t thread;
        stream->runs = 1;
        pthread_create(&thread, NULL, work_off, stream);
        pthread_detach(thread);
    }
    pthread_cond_broadcast(&changed);
}

/* Who waits must not hold Python's lock, which the calls on a stream need. */
static void *let_python_go(void) {
    int (*is_held)(void) = dlsym(RTLD_DEFAULT, "PyGILState_Check");
    void *(*save)(void) = dlsym(RTLD_DEFAULT, "PyEval_SaveThread");
    int (*is_there)(void) = dlsym(RTLD_DEFAULT, "Py_IsInitialized");
    return is_there && is_there() && is_held() ? save() : NULL;
}
static void hold_python(void *state) {
    void (*restore)(void *) = dlsym(RTLD_DEFAULT, "PyEval_RestoreThread");
    if (state) restore(state);
}

/* Called and left with the lock held. */
static void await_done(const size_t *done, size_t wanted) {
    if (*done >= wanted) return;
    pthread_mutex_unlock(&lock);
    void *state = let_python_go();
    pthread_mutex_lock(&lock);
    while (*done < wanted) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    hold_python(state);
    pthread_mutex_lock(&lock);
}

static void await_stream(struct stream *stream) { await_done(&stream->done, stream->asked); }

static void await_all(void) {
    for (struct stream *stream = streams; stream; stream = stream->next) await_stream(stream);
}

void card_call(void *stream, call_fn call, void *argument) {
    pthread_mutex_lock(&lock);
    give(stream_of(stream), (struct work){.kind = CALL, .call = call, .from = argument});
    pthread_mutex_unlock(&lock);
}

static int make_stream(cudaStream_t *stream, int priority) {
    struct stream *made = calloc(1, sizeof *made);
    made->priority = priority;
    made->next = streams;
    streams = made;
    count.streams++;
    *stream = (cudaStream_t)made;
    return 0;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    BEGIN(cudaStreamCreate) make_stream(stream, 0);
    END;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    BEGIN(cudaStreamCreateWithFlags) make_stream(stream, 0);
    END;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    BEGIN(cudaStreamCreateWithPriority) make_stream(stream, priority);
    END;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    BEGIN(cudaStreamDestroy) await_stream(stream_of(stream));
    count.streams--;
    END;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = stream_of(stream)->priority;
    return 0;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    BEGIN(cudaStreamSynchronize) count.host_waits++;
    await_stream(stream_of(stream));
    END;
}
cudaError_t cudaDeviceSynchronize(void) {
    BEGIN(cudaDeviceSynchronize) count.host_waits++;
    await_all();
    END;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    struct stream *asked = stream_of(stream);
    return asked->done < asked->asked ? cudaErrorNotReady : cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    BEGIN(cudaStreamWaitEvent) struct event *awaited = (struct event *)event;
    if (awaited->done < awaited->asked)
        give(stream_of(stream), (struct work){.kind = WAIT, .event = awaited, .generation = awaited->asked});
    END;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *data, unsigned flags) {
    BEGIN(cudaStreamAddCallback) await_stream(stream_of(stream));
    pthread_mutex_unlock(&lock);
    call(stream, 0, data);
    return 0;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *data) {
    card_call(stream, call, data);
    return 0;
}

/* Events. One that is destroyed may still be waited for on a stream, so that its few bytes stay. */

static int make_event(cudaEvent_t *event) {
    *event = calloc(1, sizeof(struct event));
    count.events++;
    return 0;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) {
    BEGIN(cudaEventCreate) make_event(event);
    END;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    BEGIN(cudaEventCreateWithFlags) make_event(event);
    END;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    BEGIN(cudaEventDestroy) count.events--;
    END;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    BEGIN(cudaEventRecord) struct event *recorded = (struct event *)event;
    recorded->asked++;
    give(stream_of(stream), (struct work){.kind = RECORD, .event = recorded, .generation = recorded->asked});
    END;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    struct event *asked = (struct event *)event;
    return asked->done < asked->asked ? cudaErrorNotReady : cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    BEGIN(cudaEventSynchronize) struct event *awaited = (struct event *)event;
    count.host_waits++;
    await_done(&awaited->done, awaited->asked);
    END;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = (((struct event *)end)->seconds - ((struct event *)start)->seconds) * 1000;
    if (*milliseconds <= 0) *milliseconds = 1e-3f;
    return 0;
}

/* Memory of the card. What is freed can't be touched any more. */

static int take(void **start, size_t size) {
    size_t whole = (size + PAGE - 1) / PAGE * PAGE;
    if (taken_bytes + count.used + whole > card_bytes) return cudaErrorMemoryAllocation;
    int access = is_hollow ? PROT_NONE : PROT_READ | PROT_WRITE;
    char *found = mmap(NULL, whole + PAGE, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return cudaErrorMemoryAllocation;
    char *aligned = (char *)(((size_t)found + PAGE - 1) / PAGE * PAGE);
    if (aligned > found) munmap(found, aligned - found);
    munmap(aligned + whole, found + PAGE - aligned);
    add(&memory, *start = aligned, whole);
    count.used += whole;
    return 0;
}
cudaError_t cudaMalloc(void **start, size_t size) {
    BEGIN(cudaMalloc) error = take(start, size);
    if (!error) count.mallocs++;
    END;
}
/* From a pool, which makes nobody wait. */
cudaError_t cudaMallocAsync(void **start, size_t size, cudaStream_t stream) {
    BEGIN(cudaMallocAsync) error = take(start, size);
    END;
}
cudaError_t cudaFree(void *start) {
    if (!start) return 0;
    BEGIN(cudaFree) await_all();
    error = let_go(start);
    if (!error) count.frees++;
    END;
}
cudaError_t cudaFreeAsync(void *start, cudaStream_t stream) {
    BEGIN(cudaFreeAsync) give(stream_of(stream), (struct work){.kind = FREE, .from = start});
    END;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) { *pool = (cudaMemPool_t)&legacy; return 0; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) { return 0; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
    *(size_t *)value = count.used;
    return 0;
}
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t keep) { return 0; }
cudaError_t cudaMemPoolSetAccess(cudaMemPool_t pool, const struct cudaMemAccessDesc *who, size_t number) { return 0; }
cudaError_t cudaDeviceSetGraphMemAttribute(int device, enum cudaGraphMemAttributeType attribute, void *value) { return 0; }
cudaError_t cudaDeviceGetGraphMemAttribute(int device, enum cudaGraphMemAttributeType attribute, void *value) {
    *(size_t *)value = 0;
    return 0;
}
cudaError_t cudaMemGetInfo(size_t *left, size_t *all) {
    BEGIN(cudaMemGetInfo) *all = card_bytes;
    *left = card_bytes - taken_bytes - count.used;
    END;
}

/* Pinned memory. */

cudaError_t cudaHostRegister(void *start, size_t size, unsigned flags) {
    BEGIN(cudaHostRegister)
    if (around(pinned, start) || around(pinned, (char *)start + size - 1)) error = cudaErrorHostMemoryAlreadyRegistered;
    else {
        add(&pinned, start, size);
        count.registered++;
        count.registered_bytes += size;
        if (count.registered_bytes > count.most_registered) count.most_registered = count.registered_bytes;
    }
    END;
}
cudaError_t cudaHostUnregister(void *start) {
    BEGIN(cudaHostUnregister) await_all();
    size_t size = cut(&pinned, start);
    if (!size) error = cudaErrorHostMemoryNotRegistered;
    else {
        count.registered--;
        count.registered_bytes -= size;
    }
    END;
}
cudaError_t cudaHostAlloc(void **start, size_t size, unsigned flags) {
    BEGIN(cudaHostAlloc) *start = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    add(&pinned, *start, size);
    count.host_allocated_bytes += size;
    END;
}
cudaError_t cudaFreeHost(void *start) {
    BEGIN(cudaFreeHost) await_all();
    count.host_allocated_bytes -= cut(&pinned, start);
    free(start);
    END;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address) {
    BEGIN(cudaPointerGetAttributes) int on_card = around(memory, address) != NULL, registered = around(pinned, address) != NULL;
    *found = (struct cudaPointerAttributes){
        .type = on_card ? cudaMemoryTypeDevice : registered ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered,
        .devicePointer = (void *)address,
        .hostPointer = on_card ? NULL : (void *)address,
    };
    END;
}

/* Copies. */

static int copy(void *to, const void *from, size_t size, struct stream *stream) {
    if (!size) return 0;
    struct range *target = around(memory, to), *source = around(memory, from);
    if (target && (char *)to + size > target->start + target->size) return cudaErrorInvalidValue;
    if (source && (const char *)from + size > source->start + source->size) return cudaErrorInvalidValue;
    struct work todo = {.kind = COPY, .to = to, .from = (void *)from, .size = size};
    count.copied_bytes += size;
    int is_pageable = (!target && !around(pinned, to)) || (!source && !around(pinned, from));
    if (is_pageable && !source && !is_hollow) todo.staged = memcpy(malloc(size), from, size);
    give(stream, todo);
    if (is_pageable && source) await_stream(stream); /* to pageable memory: there when the call returns */
    return 0;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    BEGIN(cudaMemcpyAsync) error = copy(to, from, size, stream_of(stream));
    END;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    BEGIN(cudaMemcpy) error = copy(to, from, size, &legacy);
    count.host_waits++;
    await_stream(&legacy);
    END;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int there, const void *from, int here, size_t size, cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, stream);
}
cudaError_t cudaMemcpy2DAsync(
    void *to, size_t to_pitch, const void *from, size_t pitch, size_t width, size_t height, enum cudaMemcpyKind kind,
    cudaStream_t stream) {
    BEGIN(cudaMemcpy2DAsync)
    for (size_t i = 0; i < height && !error; i++)
        error = copy((char *)to + i * to_pitch, (const char *)from + i * pitch, width, stream_of(stream));
    END;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    BEGIN(cudaMemsetAsync) give(stream_of(stream), (struct work){.kind = FILL, .to = to, .value = value, .size = size});
    END;
}
cudaError_t cudaMemset(void *to, int value, size_t size) { return cudaMemsetAsync(to, value, size, NULL); }
cudaError_t cudaMemcpyToSymbol(const void *to, const void *from, size_t size, size_t at, enum cudaMemcpyKind kind) {
    return 0;
}
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) { return result(cudaErrorInvalidSymbol); }

/* The device. */

cudaError_t cudaGetDeviceCount(int *number) { *number = 1; return 0; }
cudaError_t cudaGetDevice(int *device) { *device = current_device; return 0; }
cudaError_t cudaSetDevice(int device) {
    if (device) return result(cudaErrorInvalidDevice);
    current_device = device;
    return 0;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    memset(found, 0, sizeof *found);
    memcpy(found->name, name_of_card, sizeof found->name);
    found->totalGlobalMem = card_bytes;
    found->major = capability / 10, found->minor = capability % 10;
    found->multiProcessorCount = 82;
    found->warpSize = 32;
    found->maxThreadsPerBlock = 1024;
    found->maxThreadsPerMultiProcessor = 1536;
    found->sharedMemPerBlock = 48 << 10;
    found->sharedMemPerBlockOptin = 99 << 10;
    found->sharedMemPerMultiprocessor = 100 << 10;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536;
    found->l2CacheSize = 6 << 20;
    found->textureAlignment = 512;
    for (int i = 0; i < 3; i++) found->maxThreadsDim[i] = 1024 >> (i == 2) * 4, found->maxGridSize[i] = i ? 65535 : 2147483647;
    return 0;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp all;
    cudaGetDeviceProperties(&all, device);
    *value = attribute == cudaDevAttrComputeCapabilityMajor   ? all.major
        : attribute == cudaDevAttrComputeCapabilityMinor      ? all.minor
        : attribute == cudaDevAttrMultiProcessorCount         ? all.multiProcessorCount
        : attribute == cudaDevAttrMaxSharedMemoryPerBlock     ? (int)all.sharedMemPerBlock
        : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? (int)all.sharedMemPerBlockOptin
        : attribute == cudaDevAttrMaxThreadsPerBlock          ? all.maxThreadsPerBlock
        : attribute == cudaDevAttrWarpSize                    ? all.warpSize
        : attribute == cudaDevAttrMaxGridDimX                 ? all.maxGridSize[0]
                                                              : 0;
    return 0;
}
cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) { snprintf(text, length, "0000:01:00.0"); return 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0, *greatest = -5; return 0; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int one, int other) { *can = 0; return 0; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
cudaError_t cudaGetLastError(void) {
    int error = last_error;
    last_error = 0;
    return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorString(cudaError_t error) {
    static __thread char text[64];
    if (error == cudaErrorMemoryAllocation) return "out of memory";
    snprintf(text, sizeof text, error ? "error %d of the card in RAM" : "no error", error);
    return text;
}
const char *cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
static int refuse(void) { return CUDA_ERROR_NOT_SUPPORTED; }
cudaError_t cudaGetDriverEntryPointByVersion(
    const char *symbol, void **function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *found) {
    *function = dlsym(RTLD_DEFAULT, symbol);
    if (!*function) *function = refuse;
    if (found) *found = cudaDriverEntryPointSuccess;
    return 0;
}

/* Kernels: launched, and nothing happens. */

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterFunction(
    void **handle, const char *host, char *device, const char *name, int limit, void *a, void *b, void *c, void *d, int *e) {}
void __cudaRegisterVar(
    void **handle, char *host, char *device, const char *name, int external, size_t size, int constant, int global) {}
char __cudaInitModule(void **handle) { return 1; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) { return 0; }
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) { *kernel = (cudaKernel_t)host; return 0; }
int card_launches(void) {
    BEGIN(cudaLaunchKernel) count.launches++;
    END;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return card_launches();
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return card_launches();
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *kernel, void **arguments) { return card_launches(); }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 64;
    found->binaryVersion = found->ptxVersion = capability;
    found->maxDynamicSharedSizeBytes = 99 << 10;
    return 0;
}
cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value) { return 0; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, enum cudaFuncAttribute attribute, int value, int device) {
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *kernel, int threads, size_t shared, unsigned flags) {
    *blocks = 2;
    return 0;
}

/* Graphs are never captured. */

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return 0;
}
#undef cudaStreamGetCaptureInfo
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *number) {
    *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    return 0;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return 0; }

/* The driver: only what PyTorch asks at the side. */

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { return cudaDriverGetVersion(version); }
CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return 0; }
CUresult cuDeviceGetCount(int *number) { *number = 1; return 0; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    return cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device);
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) { *flags = 0, *active = 1; return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = cudaGetErrorString(error);
    return 0;
}
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return 0; }
CUresult cuCtxSetCurrent(CUcontext context) { return 0; }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    return CUDA_ERROR_INVALID_VALUE;
}
