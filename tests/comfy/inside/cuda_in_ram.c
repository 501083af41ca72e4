/* As much of CUDA's driver as ComfyUI's library for dynamic VRAM asks for, of a card whose memory is RAM.

Loaded as libcuda.so.1. Pages that are reserved and not mapped can't be touched, and what is unmapped is lost. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, NOT_FOUND = 500 };
typedef unsigned long long address;

static size_t total, used;

/* For the tests. */
void card_size(size_t bytes) { total = bytes; }
size_t card_used(void) { return used; }

int cuInit(unsigned flags) { return SUCCESS; }
int cuGetErrorString(int error, const char **text) {
    *text = error ? "an error of the card in RAM" : "no error";
    return SUCCESS;
}
int cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
int cuCtxSynchronize(void) { return SUCCESS; }
int cuDeviceGet(int *device, int number) { *device = number; return SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 0; return SUCCESS; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = total; return SUCCESS; }
int cuDeviceGetName(char *name, int length, int device) { snprintf(name, length, "a card in RAM"); return SUCCESS; }
int cuDeviceGetUuid(unsigned char *uuid, int device) { memset(uuid, 0, 16); return SUCCESS; }
int cuMemGetInfo_v2(size_t *left, size_t *all) { *left = total - used; *all = total; return SUCCESS; }

int cuMemAddressReserve(address *start, size_t size, size_t alignment, address wanted, address flags) {
    void *found = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return OUT_OF_MEMORY;
    *start = (address)(uintptr_t)found;
    return SUCCESS;
}
int cuMemAddressFree(address start, size_t size) { munmap((void *)(uintptr_t)start, size); return SUCCESS; }
int cuMemCreate(address *handle, size_t size, const void *properties, address flags) {
    if (used + size > total) return OUT_OF_MEMORY;
    used += size;
    *handle = size; /* all that is known of it */
    return SUCCESS;
}
int cuMemRelease(address handle) { used -= handle; return SUCCESS; }
int cuMemMap(address start, size_t size, size_t offset, address handle, address flags) {
    return mprotect((void *)(uintptr_t)start, size, PROT_READ | PROT_WRITE) ? OUT_OF_MEMORY : SUCCESS;
}
int cuMemSetAccess(address start, size_t size, const void *who, size_t count) { return SUCCESS; }
int cuMemUnmap(address start, size_t size) {
    mmap((void *)(uintptr_t)start, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return SUCCESS;
}

/* Blocks carry their size in front. */
int cuMemAlloc_v2(address *start, size_t size) {
    if (used + size > total) return OUT_OF_MEMORY;
    size_t *block = malloc(size + 64);
    if (!block) return OUT_OF_MEMORY;
    *block = size;
    used += size;
    *start = (address)(uintptr_t)block + 64;
    return SUCCESS;
}
int cuMemFree_v2(address start) {
    size_t *block = (size_t *)(uintptr_t)(start - 64);
    used -= *block;
    free(block);
    return SUCCESS;
}
int cuMemAllocAsync(address *start, size_t size, void *stream) { return cuMemAlloc_v2(start, size); }
int cuMemFreeAsync(address start, void *stream) { return cuMemFree_v2(start); }
int cuMemAllocHost_v2(void **start, size_t size) { *start = malloc(size); return *start ? SUCCESS : OUT_OF_MEMORY; }
int cuMemFreeHost(void *start) { free(start); return SUCCESS; }
int cuMemHostRegister_v2(void *start, size_t size, unsigned flags) { return SUCCESS; }
int cuMemHostUnregister(void *start) { return SUCCESS; }
int cuMemcpyHtoDAsync_v2(address to, const void *from, size_t size, void *stream) {
    memcpy((void *)(uintptr_t)to, from, size);
    return SUCCESS;
}
int cuEventCreate(void **event, unsigned flags) { *event = &total; return SUCCESS; }
int cuEventDestroy_v2(void *event) { return SUCCESS; }
int cuEventRecord(void *event, void *stream) { return SUCCESS; }
int cuEventSynchronize(void *event) { return SUCCESS; }

int cuGetProcAddress(const char *name, void **found, int version, address flags) {
    char second[80];
    snprintf(second, sizeof second, "%s_v2", name);
    void *self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    *found = dlsym(self, second);
    if (!*found) *found = dlsym(self, name);
    return *found ? SUCCESS : NOT_FOUND;
}
int cuGetProcAddress_v2(const char *name, void **found, int version, address flags, int *status) {
    int error = cuGetProcAddress(name, found, version, flags);
    if (status) *status = error;
    return error;
}
