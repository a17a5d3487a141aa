// For LD_PRELOAD: Vulkan buffers are never destroyed, and memory never freed. Mesa's software device of version 22.3 looks at
// every binding of a descriptor set, also at those that no shader reads and whose buffers are gone, and spoils the heap.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>

typedef void (*function)(void);
typedef function (*getter)(void * handle, const char * name);

function vkGetInstanceProcAddr(void * instance, const char * name);
function vkGetDeviceProcAddr(void * device, const char * name);

static void keep(void * device, void * handle, const void * allocator) {
    (void) device;
    (void) handle;
    (void) allocator;
}

static function get(const char * symbol, void * handle, const char * name) {
    if (strcmp(name, "vkDestroyBuffer") == 0 || strcmp(name, "vkFreeMemory") == 0) {
        return (function) keep;
    }
    if (strcmp(name, "vkGetInstanceProcAddr") == 0) {
        return (function) vkGetInstanceProcAddr;
    }
    if (strcmp(name, "vkGetDeviceProcAddr") == 0) {
        return (function) vkGetDeviceProcAddr;
    }
    // a library that a program opens later is in no scope that dlsym could go through
    const getter found = (getter) dlsym(dlopen("libvulkan.so.1", RTLD_LAZY), symbol);
    return found(handle, name);
}

function vkGetInstanceProcAddr(void * instance, const char * name) {
    return get("vkGetInstanceProcAddr", instance, name);
}

function vkGetDeviceProcAddr(void * device, const char * name) {
    return get("vkGetDeviceProcAddr", device, name);
}
